"""Replies that begin with what the model thought, in every dialect, on the real engine.

The demo model thinks where a request asks for it, and ends its thoughts where a bias or a budget makes it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import anthropic
import openai
import orjson
import pytest

from gateway.dialects import messages_to_chat, response_items, sse
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway
from tests.support.conversations import without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
TOPIC = "What do you think of it? " * 40
MORE = {"role": "user", "content": "And then?"}
# What differs between two answers to the same request: ids, times, and numbers of events.
# The engine's signature is a random id too.
_VOLATILE = re.compile(rb'"(id|item_id|created|created_at|completed_at|sequence_number|signature)":("[^"]*"|[\d.]+)')
_BUDGET = {"type": "enabled", "budget_tokens": 1024}  # the least that is taken


@dataclass(frozen=True)
class Reply:
    """What the official client made of an answer, and the two ways of sending it back."""

    thought: str
    said: str
    prompt: int
    cached: int
    whole: list[Any]
    without_thought: list[Any]
    id: str = ""


class Talk:
    """An official client with nothing changed but its base URL, which names no session."""

    def __init__(self, url: str, more: dict[str, Any]) -> None:
        self.sessions: list[str] = []
        self._more = more
        hooks = {"response": [lambda response: self.sessions.append(response.headers["x-session-id"])]}
        common: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 120}
        # Each of them brings its own kind of HTTP client.
        to_openai = openai.DefaultHttpxClient(event_hooks=hooks)
        to_anthropic = anthropic.DefaultHttpxClient(event_hooks=hooks)  # type: ignore[arg-type]
        self._openai = openai.OpenAI(base_url=f"{url}/v1", http_client=to_openai, **common)
        self._anthropic = anthropic.Anthropic(base_url=url, http_client=to_anthropic, **common)

    def __enter__(self) -> "Talk":
        return self

    def __exit__(self, *_: object) -> None:
        self._openai.close()
        self._anthropic.close()

    def ask(self, dialect: str, said: list[Any], *, stream: bool = False, short: bool = False, **more: Any) -> Reply:
        """One turn in which the model is asked to think; in a short one its thoughts do not end."""
        ask = {"chat": self._chat, "responses": self._responses, "messages": self._messages}[dialect]
        return ask(said, stream, short, more)

    def _chat(self, said: list[Any], stream: bool, short: bool, more: dict[str, Any]) -> Reply:
        arguments: dict[str, Any] = {"model": "demo", "messages": said, "reasoning_effort": "high", **more}
        arguments |= {"max_tokens": 8, "temperature": 0} if short else {"max_tokens": 40, **self._more}
        if stream:
            streamed = list(
                self._openai.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
            )
            deltas = [chunk.choices[0].delta for chunk in streamed if chunk.choices]
            thought = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
            content, usage = "".join(delta.content or "" for delta in deltas), streamed[-1].usage
        else:
            answer = self._openai.chat.completions.create(**arguments)
            thought, content = answer.choices[0].message.reasoning or "", answer.choices[0].message.content or ""
            usage = answer.usage
        plain = {"role": "assistant", "content": content}
        cached = usage.prompt_tokens_details.cached_tokens
        return Reply(thought, content, usage.prompt_tokens, cached, [{**plain, "reasoning": thought}], [plain])

    def _responses(self, said: list[Any], stream: bool, short: bool, more: dict[str, Any]) -> Reply:
        arguments: dict[str, Any] = {"model": "demo", "input": said, "reasoning": {"effort": "high"}, **more}
        arguments |= {"max_output_tokens": 8, "temperature": 0} if short else {"max_output_tokens": 40}
        arguments["extra_body"] = {} if short else self._more
        if stream:
            events = list(self._openai.responses.create(**arguments, stream=True))
            answer = events[-1].response
            thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
            assert "".join(thoughts) == "".join(i.content[0].text for i in answer.output if i.type == "reasoning")
        else:
            answer = self._openai.responses.create(**arguments)
        thought = "".join(item.content[0].text for item in answer.output if item.type == "reasoning")
        sent = [item.model_dump(exclude_none=True) for item in answer.output]
        plain = [item for item in sent if item["type"] != "reasoning"]
        usage = answer.usage
        cached = usage.input_tokens_details.cached_tokens
        return Reply(thought, answer.output_text, usage.input_tokens, cached, sent, plain, answer.id)

    def _messages(self, said: list[Any], stream: bool, short: bool, more: dict[str, Any]) -> Reply:
        arguments: dict[str, Any] = {"model": "demo", "messages": said, "output_config": {"effort": "high"}, **more}
        arguments |= {"max_tokens": 8} if short else {"max_tokens": 1048, "thinking": _BUDGET}
        arguments |= {"extra_body": {"temperature": 0}}
        if stream:
            with self._anthropic.messages.stream(**arguments) as streamed:
                answer = streamed.get_final_message()
        else:
            answer = self._anthropic.messages.create(**arguments)
        blocks = [block.to_dict() for block in answer.content]
        thought = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        plain = [{"role": "assistant", "content": [block for block in blocks if block["type"] != "thinking"]}]
        usage = answer.usage
        cached = usage.cache_read_input_tokens or 0
        prompt = usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0)
        return Reply(thought, text, prompt, cached, [{"role": "assistant", "content": blocks}], plain)


@pytest.fixture(scope="module")
def sampling(stack: Stack) -> Callable[[str], dict[str, Any]]:
    """`_sampling`, which may have to try many seeds, once for each text."""
    return cache(partial(_sampling, stack))


def _sampling(stack: Stack, text: str) -> dict[str, Any]:
    """Options under which the model, which is random, ends its thoughts about a text once and says something then."""
    token = stack.engine.post("/tokenize", json={"model": "demo", "prompt": "</think>", "add_special_tokens": False})
    (end,) = token.json()["tokens"]
    body = {"model": "demo", "messages": [_user(text)], "max_tokens": 40, "reasoning_effort": "high"}
    for seed in range(100):
        options = {"temperature": 1, "seed": seed, "logit_bias": {str(end): 24.5}}
        answer = stack.engine.post("/v1/chat/completions", json={**body, **options, "cache_salt": f"seek{seed}"})
        message = answer.json()["choices"][0]["message"]
        thought, content = message["reasoning"] or "", message["content"] or ""
        if len(thought) > 20 and len(content.strip()) > 20 and "think>" not in thought + content:
            return options
    raise AssertionError("no seed with which it thinks and then speaks")


def _user(text: str = TOPIC) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- compared with the engine alone


def test_without_being_asked_to_the_model_does_not_think(stack: Stack) -> None:
    for body in ({}, {"reasoning_effort": "none"}, {"chat_template_kwargs": {"thinking": False}}):
        answer = stack.engine.post(
            "/v1/chat/completions", json={"model": "demo", "messages": [MORE], "max_tokens": 60, "seed": 1, **body}
        ).json()
        message = answer["choices"][0]["message"]
        assert message["content"]
        assert message["reasoning"] is None
        assert "think>" not in message["content"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
def test_what_a_client_receives_is_the_engines_own_but_for_ids_and_times(
    stack: Stack, sampling: Callable[[str], dict[str, Any]], shared: Gateway, dialect: str, stream: bool
) -> None:
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": [_user()], "max_tokens": 40, "reasoning_effort": "high"}),
        "responses": ("/v1/responses", {"input": TOPIC, "max_output_tokens": 40, "reasoning": {"effort": "high"}}),
        "messages": ("/v1/messages", {"messages": [_user()], "max_tokens": 40, "output_config": {"effort": "high"}}),
    }[dialect]
    body |= {"model": "demo", "stream": stream} | ({"temperature": 0} if dialect == "messages" else sampling(TOPIC))
    if dialect == "messages" and stream:  # takes a while, so once
        body |= {"max_tokens": 1048, "thinking": _BUDGET}
    # Each salt's first request misses, so that the counts of what was cached are equal.
    salt = f"direct-{dialect}-{stream}"
    direct = stack.engine.post(path, json={**body, "cache_salt": salt})
    relayed = shared.http.post(path, json=body, headers={"x-session-id": salt})
    assert direct.status_code == relayed.status_code == 200, direct.text
    assert (b"thinking" if dialect == "messages" else b"reasoning") in direct.content
    assert _events(relayed.content, stream) == _events(direct.content, stream)


def _events(answer: bytes, stream: bool) -> list[tuple[Any, str]]:
    """An answer without ids and times; two words that the engine put into one event are two again."""
    plain = _VOLATILE.sub(b'"_":0', answer)
    found: list[tuple[Any, str]] = []
    for data in sse.events([plain]) if stream else [plain]:
        event = orjson.loads(data) if data != b"[DONE]" else {}
        text = _cut(event)
        if text and found and found[-1][0] == event:
            found[-1] = (event, found[-1][1] + text)
        else:
            found.append((event, text))
    return found


def _cut(event: dict[str, Any]) -> str:
    """Take the piece of text out of an event, if it is one."""
    choices = event.get("choices")
    place = choices[0].get("delta") if choices else event.get("delta")
    if isinstance(place, str):
        event["delta"] = ""
        return place
    name = next((name for name in ("content", "reasoning", "text", "thinking") if (place or {}).get(name)), "")
    if not name:
        return ""
    text, place[name] = place[name], ""
    return str(text)


# --- the official clients, and what is kept of what they hear


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
def test_a_thought_is_recorded_and_the_conversation_continues_with_and_without_it(
    sampling: Callable[[str], dict[str, Any]], shared: Gateway, dialect: str, stream: bool
) -> None:
    text = f"{dialect} {stream} {TOPIC}"
    with Talk(shared.url, {} if dialect == "messages" else sampling(text)) as talk:  # a budget ends those thoughts
        _check_continuation(shared, talk, dialect, stream, text)


def _check_continuation(shared: Gateway, talk: Talk, dialect: str, stream: bool, text: str) -> None:
    asked = [_user(text)]
    first = talk.ask(dialect, asked, stream=stream)
    session = talk.sessions[-1]
    assert first.thought
    assert first.said
    name = f"thought-{dialect}-{stream}"
    kept = shared.freeze(session, name)
    window = shared.http.get(f"/admin/windows/{name}/messages").json()
    assert window["frame"]["reasoning_effort"] == "high"
    (recorded,) = without_turns(window["messages"][-1:])
    assert recorded == _in_chat(dialect, first.whole)
    assert (recorded["reasoning"], recorded.get("content") or "") == (first.thought, first.said)
    # The next turn, by a client that sends back what it heard, and by one that drops the thought.
    for sent_back in (first.whole, first.without_thought):
        following = talk.ask(dialect, [*asked, *sent_back, MORE], short=True)
        assert talk.sessions[-1] == session
        same = kept["token_count"] if sent_back is first.whole else first.prompt
        assert following.cached >= same // CHUNK * CHUNK
    assert kept["kv"] == "complete"
    # A continuation of the window that does not mention thinking thinks as its conversation did.
    path, word = {
        "chat": ("chat/completions", b'"reasoning":"'),
        "responses": ("responses", b'"type":"reasoning"'),
        "messages": ("messages", b'"type":"thinking"'),
    }[dialect]
    new = {"input": [MORE], "max_output_tokens": 8} if dialect == "responses" else {"messages": [MORE], "max_tokens": 8}
    answer = shared.http.post(f"/w/{name}/v1/{path}", json={"model": "demo", **new})
    assert word in answer.content, answer.text


def _in_chat(dialect: str, said: list[Any]) -> dict[str, Any]:
    """A reply as the engine gets it when it is sent back."""
    if dialect == "chat":
        (message,) = said
    elif dialect == "responses":
        (message,) = response_items.read(said) or []
    else:
        (message,) = messages_to_chat.conversation({"messages": said})
    return dict(message)


@pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
def test_a_window_of_thoughts_thaws_into_every_dialect_with_all_whole_chunks(
    sampling: Callable[[str], dict[str, Any]], shared: Gateway, dialect: str
) -> None:
    text = f"for {dialect} {TOPIC}"
    with Talk(f"{shared.url}/s/thinker-{dialect}", sampling(text)) as talk:
        first = talk.ask("chat", [_user(text)])
    assert first.thought
    assert first.said
    window = shared.freeze(f"thinker-{dialect}", f"thinker-{dialect}")
    whole = window["receipt"]["chunks"] * CHUNK
    assert whole > first.prompt
    thawed = shared.thaw(f"thinker-{dialect}", warm="gpu")
    assert thawed["receipt"]["cached_tokens"] == whole
    with Talk(f"{shared.url}/s/{thawed['session_id']}", {}) as talk:
        following = talk.ask(dialect, [MORE], short=True)
    assert following.prompt > window["token_count"]
    assert following.cached >= whole


def test_a_chain_of_responses_keeps_its_thoughts(
    stack: Stack, sampling: Callable[[str], dict[str, Any]], shared: Gateway
) -> None:
    text = f"chain {TOPIC}"
    asked = [_user(text)]
    with Talk(shared.url, sampling(text)) as talk:
        first = talk.ask("responses", asked)
        following = talk.ask("responses", [MORE], short=True, previous_response_id=first.id)
    assert first.thought
    assert first.said
    assert talk.sessions[0] == talk.sessions[1]
    whole = {"model": "demo", "input": [*asked, *first.whole, MORE], "reasoning": {"effort": "high"}}
    rendered = stack.engine.post("/v1/responses/render", json=whole).json()["token_ids"]
    assert following.prompt == len(rendered)
    assert following.cached >= first.prompt // CHUNK * CHUNK


@pytest.mark.parametrize("asked", ["thinking", "enable_thinking"])
def test_arguments_of_the_template_are_part_of_the_frame(
    sampling: Callable[[str], dict[str, Any]], shared: Gateway, asked: str
) -> None:
    client = shared.client(f"frame-{asked}")
    body = {**sampling(TOPIC), "chat_template_kwargs": {asked: True}}
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": TOPIC}], max_tokens=40, extra_body=body
    )
    assert answer.choices[0].message.reasoning  # type: ignore[attr-defined]
    window = shared.freeze(f"frame-{asked}", f"frame-{asked}")
    frame = shared.http.get(f"/admin/windows/frame-{asked}/messages").json()["frame"]
    assert frame["chat_template_kwargs"] == {asked: True}
    # A continuation that does not mention thinking thinks, because the window does.
    thawed = shared.client(shared.thaw(f"frame-{asked}")["session_id"])
    following = thawed.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "And then?"}], max_tokens=8, temperature=0
    )
    assert following.choices[0].message.reasoning  # type: ignore[attr-defined]
    assert following.usage is not None
    assert following.usage.prompt_tokens_details is not None
    assert following.usage.prompt_tokens_details.cached_tokens >= window["receipt"]["chunks"] * CHUNK
