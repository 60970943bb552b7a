"""Take the recordings of this folder from a real engine: `python -m tests.recordings.remake` (about two minutes).

It starts the local stack with the demo model, asks vLLM itself, past any gateway, and writes each stream as it came.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import httpx

from gateway.stack import local
from tests.support import local_stack

FOLDER = Path(__file__).parent
_TOOL = {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}
_SAY = [{"role": "user", "content": "Say something. 日本 🎉"}]
_SAMPLED: dict[str, Any] = {"model": "demo", "temperature": 1}
_CHAT: dict[str, Any] = {"messages": _SAY, "max_tokens": 6, "ignore_eos": True}
_TEXT: dict[str, Any] = {"prompt": "Once upon a time 日本", "max_tokens": 6, "ignore_eos": True}
_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": False}}
_CALL: dict[str, Any] = {
    "messages": _SAY,
    "max_tokens": 40,
    "tools": [{"type": "function", "function": _TOOL}],
    "tool_choice": {"type": "function", "function": {"name": "now"}},
}

# name -> path, body. What ends in `-usage` is the same request as without, but for the usage that it asks for.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", _CHAT),
    "chat-logprobs": ("/v1/chat/completions", {**_CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
    "chat-two": ("/v1/chat/completions", {**_CHAT, "n": 2}),
    "chat-tools": ("/v1/chat/completions", _CALL),
    "completions": ("/v1/completions", _TEXT),
    "completions-logprobs": ("/v1/completions", {**_TEXT, "logprobs": 2, "max_tokens": 3}),
    "completions-two": ("/v1/completions", {**_TEXT, "n": 2}),
    "completions-echo": ("/v1/completions", {**_TEXT, "echo": True}),
    "completions-ids": ("/v1/completions", {**_TEXT, "prompt": [5, 6, 7, 8], "return_token_ids": True}),
    "responses": ("/v1/responses", {"input": _SAY, "max_output_tokens": 6}),
    "responses-tools": (
        "/v1/responses",
        {
            "input": _SAY,
            "max_output_tokens": 40,
            "tools": [{"type": "function", **_TOOL}],
            "tool_choice": {"type": "function", "name": "now"},
        },
    ),
    "messages": ("/v1/messages", {"messages": _SAY, "max_tokens": 6}),
    "messages-tools": (
        "/v1/messages",
        {
            "messages": _SAY,
            "max_tokens": 40,
            "tools": [{"name": "now", "description": "The time", "input_schema": _TOOL["parameters"]}],
            "tool_choice": {"type": "tool", "name": "now"},
        },
    ),
}
REQUESTS |= {
    f"{name}-usage": (path, {**body, **_USAGE})
    for name, (path, body) in REQUESTS.items()
    if path in ("/v1/chat/completions", "/v1/completions")
}
# The demo model is random: not with every seed does it call the tool that it is told to.
_CALLED = re.compile(rb'"tool_calls":\[|function_call_arguments.delta|input_json_delta')


def record(engine: httpx.Client, name: str) -> bytes:
    """One stream as the engine sends it, under its own salt."""
    path, body = REQUESTS[name]
    for seed in range(7, 99):
        sampled = {**_SAMPLED, "seed": seed, **body, "stream": True, "cache_salt": f"{name}{seed}"}
        answer = engine.post(path, json=sampled).raise_for_status().content
        if "tools" not in body or _CALLED.search(answer):
            return answer
    raise SystemExit(f"{name}: no seed made a call")


def main() -> None:
    """Write every recording."""
    with tempfile.TemporaryDirectory(prefix="cwg-recordings-") as root:
        options = local.LocalStack(data_dir=Path(root), demo="random", max_model_len=2048)
        with local_stack.running(options) as (plan, _), httpx.Client(base_url=plan.engine_url, timeout=120) as engine:
            for name in REQUESTS:
                (FOLDER / f"{name}.sse").write_bytes(record(engine, name))


if __name__ == "__main__":
    main()
