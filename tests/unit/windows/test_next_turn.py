"""The token ids that every next turn begins with, from an engine whose templates do what real ones do."""

import re
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import pytest

from gateway.engines.client import HttpEngineClient
from gateway.errors import GatewayError
from gateway.windows.next_turn import next_turn_ids
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine

pytestmark = pytest.mark.anyio
RENDER = "/v1/chat/completions/render"
Template = Callable[[Sequence[Mapping[str, Any]]], str]

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "reasoning": "be polite"},
]
TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call-7", "function": {"name": "f", "arguments": "{}"}}],
    },
]


def append_only(messages: Sequence[Mapping[str, Any]]) -> str:
    """Each message is written the same wherever it stands."""
    return "".join(f"<{m['role']}>{m.get('content') or ''}{m.get('tool_calls', '')}</>" for m in messages)


def forgets_reasoning(messages: Sequence[Mapping[str, Any]]) -> str:
    """As the templates of reasoning models: a reply keeps its reasoning until the user speaks again."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    return "".join(
        f"<{m['role']}>{'(' + m['reasoning'] + ')' if m.get('reasoning') and i > last_user else ''}{m['content']}</>"
        for i, m in enumerate(messages)
    )


@pytest.fixture
async def asks(engine: FakeEngine) -> AsyncIterator[HttpEngineClient]:
    async with HttpEngineClient(engine.url, api_key="", fingerprint="", connect_timeout_s=5, timeout_s=5) as asks:
        yield asks


def rendering(engine: FakeEngine, template: Template) -> None:
    """Give the engine a template, one token for each character."""

    def answer(exchange: Exchange) -> None:
        assert exchange.request.path == RENDER
        body = exchange.request.json
        assert body["add_generation_prompt"] is False
        exchange.json({"request_id": "x", "token_ids": [ord(c) for c in template(body["messages"])]})

    engine.on_other = answer


def text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


async def test_appending_template_gives_whole_conversation(engine: FakeEngine, asks: HttpEngineClient) -> None:
    rendering(engine, append_only)
    ids = await next_turn_ids(asks, MODEL, {}, TALK)
    assert text(ids) == "<user>hi</><assistant>hello</>"
    assert len(engine.seen(RENDER)) == 2


async def test_template_dropping_reasoning_gives_the_kept_part(engine: FakeEngine, asks: HttpEngineClient) -> None:
    rendering(engine, forgets_reasoning)
    ids = await next_turn_ids(asks, MODEL, {}, TALK)
    assert text(ids) == "<user>hi</><assistant>hello</><user>"
    assert "polite" not in text(ids)
    for following in ("and?", "a", "#", "", "日本"):
        whole = forgets_reasoning([*TALK, {"role": "user", "content": following}])
        assert whole.startswith(text(ids))


async def test_tool_call_is_followed_by_its_result(engine: FakeEngine, asks: HttpEngineClient) -> None:
    rendering(engine, append_only)
    ids = await next_turn_ids(asks, MODEL, {}, TOOLS)
    assert text(ids) == append_only(TOOLS)
    *_, probe = engine.seen(RENDER)
    assert probe.json["messages"][-1] == {"role": "tool", "tool_call_id": "call-7", "content": "a"}


async def test_template_closing_late_shares_no_end(engine: FakeEngine, asks: HttpEngineClient) -> None:
    rendering(engine, lambda messages: append_only(messages) + "<eos>")
    ids = await next_turn_ids(asks, MODEL, {}, TALK)
    assert text(ids) == append_only(TALK) + "<user>"


async def test_probes_with_common_start_share_only_that(engine: FakeEngine, asks: HttpEngineClient) -> None:
    rendering(engine, lambda messages: f"{len(messages)}:" + append_only(messages))
    ids = await next_turn_ids(asks, MODEL, {}, TALK)
    one, other = (f"3:{append_only([*TALK, {'role': 'user', 'content': c}])}" for c in ("yes", "no"))
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    assert text(ids) == shared


async def test_frame_is_sent_with_every_rendering(engine: FakeEngine, asks: HttpEngineClient) -> None:
    rendering(engine, append_only)
    frame = {"tools": [{"type": "function"}], "chat_template_kwargs": {"thinking": False}}
    await next_turn_ids(asks, MODEL, frame, TALK)
    for request in engine.seen(RENDER):
        assert {name: request.json[name] for name in frame} == frame
        assert request.json["model"] == MODEL
        assert "cache_salt" not in request.json


async def test_system_messages_stay_first(engine: FakeEngine, asks: HttpEngineClient) -> None:
    def answer(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        if any(message["role"] == "system" for message in messages[1:]):
            exchange.json({"error": {"message": "System message must be at the beginning.", "code": 400}}, 400)
        else:
            exchange.json({"token_ids": [ord(c) for c in append_only(messages)]})

    engine.on_other = answer
    between = [TALK[0], {"role": "system", "content": "hurry"}, TALK[1]]
    assert text(await next_turn_ids(asks, MODEL, {}, between)) == append_only([between[1], *TALK])
    assert text(await next_turn_ids(asks, MODEL, {}, TALK)) == append_only(TALK)


@pytest.mark.parametrize("status", [403, 404])
async def test_engine_without_render_is_asked_to_tokenize(
    engine: FakeEngine, asks: HttpEngineClient, status: int
) -> None:
    engine.on_other = lambda exchange: exchange.json({"error": {"message": "no"}}, status)
    ids = await next_turn_ids(asks, MODEL, {}, TALK)
    assert bytes(ids) == b"<user>hi</><assistant>hello</>"
    assert [r.json["add_generation_prompt"] for r in engine.seen("/tokenize")] == [False, False]


@pytest.mark.parametrize(
    ("status", "code"), [(400, "invalid_request"), (422, "invalid_request"), (500, "engine_unreachable")]
)
async def test_engine_that_cannot_render_raises(
    engine: FakeEngine, asks: HttpEngineClient, status: int, code: str
) -> None:
    engine.on_other = lambda exchange: exchange.json({"error": {"message": "the template failed"}}, status)
    with pytest.raises(GatewayError, match="the template failed") as failed:
        await next_turn_ids(asks, MODEL, {}, TALK)
    assert failed.value.code == code
    assert engine.seen("/tokenize") == []


# --- texts and rows of token ids


def merging(engine: FakeEngine) -> None:
    """A tokeniser with a token for each word and its space, `1` in front where special tokens are asked for."""

    def answer(exchange: Exchange) -> None:
        body = exchange.request.json
        words = re.findall(r" ?\w+|\s+|[^\w\s]+", body["prompt"])
        exchange.json({"tokens": [1] * body["add_special_tokens"] + [zlib.crc32(word.encode()) for word in words]})

    engine.on_tokenize = answer


@pytest.mark.parametrize(
    ("text", "certain"), [("a b c", "a b"), ("a b.", "a b"), ("a b ", "a b"), ("a 12", "a"), ("word", "")]
)
async def test_text_end_that_may_merge_is_left_out(
    engine: FakeEngine, asks: HttpEngineClient, text: str, certain: str
) -> None:
    merging(engine)
    ids = await next_turn_ids(asks, MODEL, {}, [{"role": "text", "content": text}])
    assert ids == await asks.tokenize(MODEL, certain)
    for following in ("x", "7", ".", " ", "\n", " d", ", e"):
        assert (await asks.tokenize(MODEL, text + following))[: len(ids)] == ids


async def test_special_tokens_are_added_as_in_the_turns(engine: FakeEngine, asks: HttpEngineClient) -> None:
    merging(engine)
    conversation = [{"role": "text", "content": "a b c"}]
    with_them = await next_turn_ids(asks, MODEL, {"add_special_tokens": True}, conversation)
    without = await next_turn_ids(asks, MODEL, {"add_special_tokens": False}, conversation)
    assert with_them == [1, *without]


async def test_token_ids_stay_and_text_reply_is_appended(engine: FakeEngine, asks: HttpEngineClient) -> None:
    row = {"role": "tokens", "content": [7, 8, 9]}
    assert await next_turn_ids(asks, MODEL, {}, [row]) == [7, 8, 9]
    assert engine.asked == []
    merging(engine)
    reply = await asks.tokenize(MODEL, " d e", special=False)
    assert await next_turn_ids(asks, MODEL, {}, [row, {"role": "text", "content": " d e"}]) == [7, 8, 9, *reply]


@pytest.mark.parametrize("any_length", [True, False])
async def test_a_transcript_longer_than_the_context_is_rendered_on_request_only(
    engine: FakeEngine, asks: HttpEngineClient, any_length: bool
) -> None:
    message = "This model's maximum context length is 30 tokens. However, your prompt contains at least 31 input tokens"
    engine.on_other = lambda exchange: exchange.json({"error": {"message": message, "code": 400}}, 400)
    if any_length:
        assert bytes(await next_turn_ids(asks, MODEL, {}, TALK, any_length=True)) == append_only(TALK).encode()
        return
    with pytest.raises(GatewayError, match="maximum context length") as caught:
        await next_turn_ids(asks, MODEL, {}, TALK)
    assert caught.value.code == "invalid_request"
