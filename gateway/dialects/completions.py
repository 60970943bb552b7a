"""OpenAI text completions: `/v1/completions`. The envelope is that of chat; the conversation is one text."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from gateway.dialects import sse, text_transcripts
from gateway.dialects.base import Call, Reply, usage_of
from gateway.dialects.chat import ChatDialect
from gateway.dialects.events import json_object
from gateway.errors import GatewayError
from gateway.records import Message, Usage

_CHAT = ChatDialect()
_DONE = b"[DONE]"
# With these, what is generated does not follow the prompt, or the prompt is no text.
_NO_TURN = ("suffix", "prompt_embeds")


class CompletionsDialect:
    """See `gateway.dialects.base.Dialect`."""

    name = "completions"
    last_event: tuple[bytes, ...] = (b"data: [DONE]",)

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """See `Dialect.read`. Several prompts at once are answered, but are no turn of one conversation."""
        call = _CHAT.read(body, raw)
        special = body.get("add_special_tokens")
        return replace(
            call,
            messages=_conversation(body),
            frame={} if special is None else {"add_special_tokens": special},
            echoes=_echoes(body) is True,
        )

    def write(self, call: Call, salt: str) -> bytes:
        """See `Dialect.write`."""
        if call.front is None:
            return _CHAT.write(call, salt)
        body = {**call.body, **call.front.frame, "prompt": _prompt(call.whole)}
        return _CHAT.write(replace(call, body=body, raw=b"", front=None), salt)

    def reply(self, chunks: Iterable[bytes], *, streamed: bool) -> Reply:
        """See `Dialect.reply`. The message is of role `text`, with `token_ids` where the engine sent them."""
        return _streamed(chunks) if streamed else _whole(chunks)

    def error(self, error: GatewayError) -> bytes:
        """See `Dialect.error`."""
        return _CHAT.error(error)

    def error_event(self, error: GatewayError, sent: Sequence[bytes] = ()) -> bytes:
        """See `Dialect.error_event`."""
        return _CHAT.error_event(error, sent)


def _conversation(body: dict[str, Any]) -> list[Message]:
    prompt = body.get("prompt")
    if any(body.get(name) for name in _NO_TURN) or _echoes(body) is None:
        return []
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a list of one prompt is what some clients always send
    if not isinstance(prompt, str | list) or not prompt:
        return []
    if isinstance(prompt, str):
        return [{"role": text_transcripts.TEXT, "content": prompt}]
    # The engine refuses a list of mixed types. The text of an echo would hold the prompt's.
    is_row = isinstance(prompt[0], int) and not _echoes(body)
    return [{"role": text_transcripts.TOKENS, "content": prompt}] if is_row else []


def _echoes(body: dict[str, Any]) -> bool | None:
    """Whether the reply's text repeats the prompt, as vLLM does unless it returns ids; None where that is not clear."""
    echo, ids = body.get("echo") or False, body.get("return_token_ids") or False
    if not isinstance(echo, bool) or not isinstance(ids, bool):
        return None  # the engine may take "yes" for a yes, and another may not
    return echo and not ids


def _prompt(conversation: Sequence[Message]) -> Any:
    if len(conversation) > 1:
        raise GatewayError(
            "invalid_request",
            "the window's last reply is stored as text only, so token ids alone cannot follow it",
            hint="send the whole conversation's token ids; with return_token_ids a turn's reply is kept as ids",
        )
    return conversation[0]["content"]


def _whole(chunks: Iterable[bytes]) -> Reply:
    answer = json_object(b"".join(chunks))
    if answer is None:
        return Reply(None, None, "the reply is not a JSON object")
    text = _Assembled()
    text.add(answer)
    return Reply(text.whole(), usage_of(answer.get("usage")), "" if text.whole() else "the reply holds no text")


def _streamed(chunks: Iterable[bytes]) -> Reply:
    text = _Assembled()
    usage: Usage | None = None
    error = ""
    events = list(sse.events(chunks))
    done = events[-1:] == [_DONE]
    for event in map(json_object, events[:-1] if done else events):
        if event is None:
            error = "the stream holds an event that is not a JSON object"
        elif "error" in event:
            error = str(event["error"])
        else:
            usage = usage_of(event.get("usage")) or usage
            text.add(event)
    if not error and not done:
        error = "the stream ended before [DONE]"
    if not error and text.whole() is None:
        error = "the reply holds no text"
    return Reply(None if error else text.whole(), usage, error)


class _Assembled:
    """The first choice's text, and its token ids where every part of it brought them."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] | None = []

    def add(self, event: dict[str, Any]) -> None:
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice.get("text"), str) and choice.get("index", 0) == 0:
                self._texts.append(choice["text"])
                ids = choice.get("token_ids")
                if not isinstance(ids, list):
                    self._ids = None
                elif self._ids is not None:
                    self._ids += ids

    def whole(self) -> Message | None:
        if not self._texts:
            return None
        message: Message = {"role": text_transcripts.TEXT, "content": "".join(self._texts)}
        return message if self._ids is None else {**message, "token_ids": self._ids}
