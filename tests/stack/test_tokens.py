"""Estimates of prompts against the real engine's counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.sessions.tokenizer import read
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat

pytestmark = pytest.mark.stack

TEXTS = [
    "How long is a context window, and who pays for it?",
    "def f(x):\n    return [y ** 2 for y in x if y % 3]\n" * 8,
    "日本語のテキストと中文、🎉👩‍👩‍👧‍👦 naïve café\n",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9"}\n' * 10,
    "   \n\n\t spaces   and\r\n  tabs  \n" * 5,
    "tell me of windows " * 80,
]


@pytest.fixture
def tokenizer(stack: Stack) -> Path:
    """The served model's."""
    return stack.plan.data_dir / stack.plan.model.key / "tokenizer.json"


@pytest.fixture
def knowing(stack: Stack, tokenizer: Path, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that can read it."""
    settings = stack.settings(tmp_path / "data", CWG_TOKENIZER_FILE=str(tokenizer))
    gateway = Gateway(settings, tmp_path / "gateway.log").start()
    yield gateway
    gateway.close()


def test_a_conversations_prompts_are_estimated_with_the_models_own_tokenizer(
    stack: Stack, tokenizer: Path, knowing: Gateway
) -> None:
    client = knowing.client("estimated")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are terse."}]
    for text in TEXTS:
        messages.append({"role": "user", "content": text})
        reply = chat(client, messages, max_tokens=20)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        encoded = stack.engine.post("/tokenize", json={"model": "demo", "prompt": text, "add_special_tokens": False})
        assert encoded.json()["count"] == read(tokenizer).count(text)
    shown = knowing.http.get("/admin/sessions/estimated").json()
    assert (shown["estimates"]["source"], shown["estimates"]["exact"]) == ("tokenizer", True)
    off = [turn["estimated_tokens"] - turn["prompt_tokens"] for turn in reversed(shown["turns"])]
    print("estimated - counted:", off, "of", [turn["prompt_tokens"] for turn in reversed(shown["turns"])])
    print("estimates:", shown["estimates"])
    # What the template puts around messages is learned from the first turn; what stays is the last reply, which is
    # rendered in other tokens than it was sampled in.
    assert abs(off[0]) <= 12
    for turn, wrong in list(zip(reversed(shown["turns"]), off, strict=True))[1:]:
        assert abs(wrong) / turn["prompt_tokens"] < 0.03


def test_without_the_tokenizer_the_bytes_of_a_token_are_learned(shared: Gateway) -> None:
    client = shared.client("by-bytes")
    messages: list[dict[str, Any]] = []
    for text in TEXTS:
        messages.append({"role": "user", "content": text})
        reply = chat(client, messages, max_tokens=20)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    shown = shared.http.get("/admin/sessions/by-bytes").json()
    print("without:", shown["estimates"])
    assert shown["estimates"]["source"] == "bytes_per_token"
    assert 1 < shown["estimates"]["bytes_per_token"] < 4
    assert shown["estimates"]["mean_error"] is not None
