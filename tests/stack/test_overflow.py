"""A conversation that outgrows the model's context, on the real engine: frozen whole, and continued."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway

pytestmark = pytest.mark.stack

CHUNK = 64
SYSTEM = "You are terse."
SENTENCE = "What do you think of this sentence? "
QUESTION = 1050  # tokens: seven of these fit into the 8,192 of the stack's model, and an eighth does not


@pytest.fixture(scope="module")
def going_on(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("full")
    settings = stack.settings(folder / "data", CWG_ON_FULL="successor")
    gateway = Gateway(settings, folder / "gateway.log").start()
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def text(stack: Stack) -> str:
    """What makes a question of that many tokens."""
    body = {"model": "demo", "prompt": SENTENCE * 100, "add_special_tokens": False}
    counted = stack.engine.post("/tokenize", json=body).json()["count"]
    return SENTENCE * (QUESTION * 100 // counted)


def _history(text: str, count: int) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    for number in range(count):
        question = f"Question {number}: {text}"
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": "Nothing."}]
    return said[:-1]


def _body(dialect: str, said: list[dict[str, Any]]) -> dict[str, Any]:
    common = {"model": "demo", "temperature": 0}
    if dialect == "responses":
        return {**common, "input": said, "instructions": SYSTEM, "max_output_tokens": 4}
    if dialect == "messages":
        return {**common, "messages": said, "system": SYSTEM, "max_tokens": 4}
    return {**common, "messages": [{"role": "system", "content": SYSTEM}, *said], "max_tokens": 4}


def _cached(dialect: str, answer: httpx.Response) -> tuple[int, int]:
    """How many tokens of the prompt were found, and how many it had."""
    usage = answer.json()["usage"]
    if dialect == "chat":
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
    if dialect == "responses":
        return usage["input_tokens_details"]["cached_tokens"], usage["input_tokens"]
    cached = usage.get("cache_read_input_tokens") or 0
    return cached, usage["input_tokens"] + cached + (usage.get("cache_creation_input_tokens") or 0)


@pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
def test_a_full_conversation_continues_and_nothing_of_it_is_lost(going_on: Gateway, text: str, dialect: str) -> None:
    path = {"chat": "chat/completions"}.get(dialect, dialect)
    session = f"outgrowing-{dialect}"

    def ask(count: int) -> httpx.Response:
        answer = going_on.http.post(f"/s/{session}/v1/{path}", json=_body(dialect, _history(text, count)))
        assert answer.status_code == 200, (answer.headers.get("x-context-hint"), answer.text)
        return answer

    fits = ask(7)
    assert "x-context-ancestor" not in fits.headers
    _, whole = _cached(dialect, fits)
    answer = ask(8)
    assert answer.headers["x-session-id"] == f"{session}.2"
    dropped = int(answer.headers["x-context-dropped-messages"])
    cached, prompt = _cached(dialect, answer)
    assert dropped % 2 == 0
    assert prompt <= 4096 < whole
    window = going_on.http.get(f"/admin/windows/{answer.headers['x-context-ancestor']}").json()
    assert (window["kv"], window["session_id"]) == ("complete", session)
    assert window["token_count"] >= whole
    # The same is left out of the next turn, so all that the engine has seen of this one is found.
    following = ask(9)
    assert int(following.headers["x-context-dropped-messages"]) == dropped
    cached, longer = _cached(dialect, following)
    assert longer > prompt
    assert cached >= (prompt - 16) // CHUNK * CHUNK
    if dialect == "chat":
        said = going_on.http.post(
            f"/admin/windows/{window['name']}/ask", json={"question": "What was the first question?", "max_tokens": 4}
        ).json()
        assert said["receipt"]["cached_tokens"] >= window["token_count"] // CHUNK * CHUNK
