"""An engine whose every reply is known beforehand: it depends on the request's `seed` alone.

`python -m loadtests.scripted_upstream --port 9000`. With a real engine the reply depends on the seed and the prompt;
here the author of a trace knows the reply to each turn. Everything else is as in `canned_upstream`.
"""

import argparse
import asyncio
import json
import random
import re
from enum import IntEnum
from typing import Any

import orjson
import uvloop

from loadtests.canned_upstream import BACKLOG, CannedProtocol

Message = dict[str, Any]

MODEL = "canned"
_PROSE = (
    "the cache holds what was read before, and a prefix that is shared costs nothing twice; naïve keys collide when "
    "their salt is missing — so look at the log, change one line, run the test again and tell me what it said: "
    "passed, failed, or “never began” 🙂 path engine token window branch merge value error function return None"
)
_WORDS = _PROSE.split()
_FILES = ("src/main.py", "src/store/rows.py", "tests/unit/store/test_store.py", "README.md", "docs/über.md")
_PIECE = 4  # words in an event of a stream
_SEED = re.compile(rb'"seed":(\d+)')
_STREAM = re.compile(rb'"stream":true')
_WITH_USAGE = re.compile(rb'"include_usage":\s*true')


class Kind(IntEnum):
    """The outcome of a request, encoded in its seed."""

    TEXT = 0
    TOOL = 1
    TOOLS = 2  # several at once
    THINKING = 3
    THINKING_TOOL = 4
    FAILS = 5  # 503
    CUT = 6  # half of a stream, then nothing until the client disconnects
    STALLS = 7  # nothing at all until the client disconnects
    EMPTY = 8  # an empty reply


def seed_of(kind: Kind, sample: int) -> int:
    """Return the seed of a reply of this kind; `sample` stands for the sampler's random choice."""
    return sample * len(Kind) + kind


def kind_of(seed: int) -> Kind:
    """Return the kind of reply that a seed produces."""
    return Kind(seed % len(Kind))


def reply(seed: int) -> Message:
    """Return the message that a seed produces; of a cut one, the part that the client receives."""
    rng, kind = random.Random(seed), kind_of(seed)
    message: Message = {"role": "assistant", "content": _text(rng, 5, 60)}
    if kind in (Kind.THINKING, Kind.THINKING_TOOL):
        message["reasoning"] = _text(rng, 10, 80)
    if kind in (Kind.TOOL, Kind.TOOLS, Kind.THINKING_TOOL):
        message["content"] = _text(rng, 3, 12) if rng.random() < 0.4 else None
        message["tool_calls"] = [_call(rng) for _ in range(rng.randint(2, 4) if kind is Kind.TOOLS else 1)]
    if kind is Kind.EMPTY:
        message["content"] = ""
    if kind is Kind.CUT:
        message["content"] = "".join(_pieces(message["content"])[:2])
    return message


def _text(rng: random.Random, least: int, most: int) -> str:
    words = " ".join(rng.choices(_WORDS, k=rng.randint(least, most)))
    return words + rng.choice(("", "", ".", "\n", ".\n\n"))  # models do end replies with blank lines


def _call(rng: random.Random) -> dict[str, Any]:
    arguments = rng.choice((
        {"path": rng.choice(_FILES), "offset": float(rng.randint(1, 900)), "limit": 200},
        {"command": f"pytest -q {rng.choice(_FILES)}", "timeout": 1.5, "env": {}},
        {"path": rng.choice(_FILES), "old": _text(rng, 3, 20), "new": _text(rng, 3, 20)},
        {"todos": [{"id": rng.randint(1, 9), "done": False, "note": None}], "ratio": 1e-3},
    ))  # fmt: skip
    name = "read" if "offset" in arguments else "bash" if "command" in arguments else "edit"
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"chatcmpl-tool-{rng.getrandbits(64):016x}", "type": "function", "function": function}


def _pieces(text: str) -> list[str]:
    words = re.findall(r"\S+\s*", text)
    return ["".join(words[i : i + _PIECE]) for i in range(0, len(words), _PIECE)]


def _whole(message: Message, usage: dict[str, int]) -> bytes:
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": [],
             "reasoning": None}  # fmt: skip
    reason = "tool_calls" if "tool_calls" in message else "stop"
    choice = {"index": 0, "message": {**empty, **message}, "logprobs": None, "finish_reason": reason}
    return orjson.dumps({"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice],
                         "usage": usage})  # fmt: skip


def _deltas(message: Message) -> list[dict[str, Any]]:
    calls = [
        {"tool_calls": [{**part, "index": index}]}
        for index, call in enumerate(message.get("tool_calls", ()))
        for part in _call_parts(call)
    ]
    thoughts = [{"reasoning": piece} for piece in _pieces(message.get("reasoning") or "")]
    return [
        {"role": "assistant", "content": ""},
        *thoughts,
        *({"content": piece} for piece in _pieces(message["content"] or "")),
        *calls,
    ]


def _call_parts(call: dict[str, Any]) -> list[dict[str, Any]]:
    arguments = call["function"]["arguments"]
    half = len(arguments) // 2
    return [
        {**call, "function": {"name": call["function"]["name"], "arguments": ""}},
        {"function": {"arguments": arguments[:half]}},
        {"function": {"arguments": arguments[half:]}},
    ]


def _event(choices: list[dict[str, Any]], **more: object) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"data: %b\n\n" % orjson.dumps({**head, "choices": choices, **more})


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _json(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status, len(body), body,
    )  # fmt: skip


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def answer(body: bytes) -> bytes:
    """Return the complete response to a chat completion; b"" if the engine never answers."""
    match = _SEED.search(body)
    if match is None:
        return _json(400, b'{"error":{"message":"seed: required","code":400}}')
    seed = int(match[1])
    kind = kind_of(seed)
    if kind is Kind.FAILS:
        return _json(503, b'{"error":{"message":"overloaded","code":503}}')
    return b"" if kind is Kind.STALLS else _respond(body, reply(seed), kind)


def _respond(body: bytes, message: Message, kind: Kind) -> bytes:
    prompt = len(body) // 4
    usage = {"prompt_tokens": prompt, "completion_tokens": 20, "total_tokens": prompt + 20}
    if not _STREAM.search(body):
        return _json(200, _whole(message, usage))
    events = [_event([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in _deltas(message)]
    if kind is Kind.CUT:
        return _STREAM_HEAD + b"".join(map(_chunk, events))
    reason = "tool_calls" if "tool_calls" in message else "stop"
    events.append(_event([{"index": 0, "delta": {}, "finish_reason": reason}]))
    if _WITH_USAGE.search(body):
        events.append(_event([], usage=usage))
    return _STREAM_HEAD + b"".join(map(_chunk, [*events, b"data: [DONE]\n\n"])) + b"0\r\n\r\n"


class ScriptedProtocol(CannedProtocol):
    """One connection to the engine."""

    def _chat(self, body: bytes) -> None:
        self._transport.write(answer(body))


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    computed: set[object] = set()
    server = await loop.create_server(lambda: ScriptedProtocol(loop, computed), "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9000)
    uvloop.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
