"""OpenAI text completions: `/v1/completions`. The envelope is that of chat; the conversation is one text."""

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import structs

from gateway.dialects import text_transcripts
from gateway.dialects.base import Call, Reply, engine_token_counts
from gateway.dialects.chat import ChatDialect
from gateway.dialects.stream_reader import StreamReader
from gateway.errors import GatewayError
from gateway.records import Message

# With these, what is generated does not follow the prompt, or the prompt is no text.
_NOT_A_TURN = ("suffix", "prompt_embeds")


class CompletionsDialect(ChatDialect):
    """See `gateway.dialects.base.Dialect`."""

    name = "completions"

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """See `Dialect.read`. Several prompts at once are answered, but are not a turn of one conversation."""
        special = body.get("add_special_tokens")
        return structs.replace(
            super().read(body, raw),
            messages=_conversation(body),
            frame={} if special is None else {"add_special_tokens": special},
            echoes=_echoes(body) is True,
        )

    def write_with_salt(self, call: Call, salt: str) -> bytes:
        """See `Dialect.write_with_salt`."""
        if call.front is not None:
            body = {**call.body, **call.front.frame, "prompt": _prompt(call.whole)}
            call = structs.replace(call, body=body, raw=b"", front=None)
        return super().write_with_salt(call, salt)

    def _read_answer(self, answer: dict[str, Any]) -> Reply:
        text = _TextStream()
        text.add(answer)
        message = text.message()
        return Reply(message, text.usage, text.error)

    def _read_stream(self, chunks: Iterable[bytes]) -> Reply:
        return _TextStream().read(chunks)


class _TextStream(StreamReader):
    """The first choice's text, and its token ids where every part of it brought them."""

    def __init__(self) -> None:
        super().__init__()
        self._texts: list[str] = []
        self._ids: list[int] | None = []

    def add(self, event: dict[str, Any]) -> None:
        self.usage = engine_token_counts(event.get("usage")) or self.usage
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice.get("text"), str) and choice.get("index", 0) == 0:
                self._texts.append(choice["text"])
                ids = choice.get("token_ids")
                if not isinstance(ids, list):
                    self._ids = None
                elif self._ids is not None:
                    self._ids += ids

    def message(self) -> Message | None:
        if not self._texts:
            self.error = "the reply holds no text"
            return None
        message: Message = {"role": text_transcripts.TEXT, "content": "".join(self._texts)}
        return message if self._ids is None else {**message, "token_ids": self._ids}


def _conversation(body: dict[str, Any]) -> list[Message]:
    prompt = body.get("prompt")
    if any(body.get(name) for name in _NOT_A_TURN) or _echoes(body) is None:
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
    """Whether the reply's text repeats the prompt, as vLLM does unless it returns ids; None where that is unclear."""
    echo, ids = body.get("echo") or False, body.get("return_token_ids") or False
    if not isinstance(echo, bool) or not isinstance(ids, bool):
        return None  # one engine may take "yes" for true, and another may not
    return echo and not ids


def _prompt(conversation: Sequence[Message]) -> Any:
    if len(conversation) > 1:
        raise GatewayError(
            "invalid_request",
            "the window's last reply is stored as text only, so token ids alone cannot follow it",
            hint="send the whole conversation's token ids; with return_token_ids a turn's reply is kept as ids",
        )
    return conversation[0]["content"]
