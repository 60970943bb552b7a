"""Text completions on the real engine: as without a gateway, and frozen and thawed as text and as token ids."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, same_bytes
from tests.stack.restart import across_restart
from tests.support.conversations import without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
_VOLATILE = re.compile(rb'"(id|created)":("[^"]*"|\d+)')
_GREEDY: dict[str, Any] = {"model": "demo", "max_tokens": 12, "temperature": 0, "seed": 1}
STORY = "Once upon a time there was a king who counted: " + " ".join(map(str, range(150)))
IDS = [5 + n * 7 % 500 for n in range(300)]


def complete(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    """One completion of exact length."""
    return client.completions.create(prompt=prompt, **{**_GREEDY, "extra_body": {"ignore_eos": True}, **more})


def cached(answer: Any) -> int:
    """Tokens that the engine did not have to compute."""
    return int(answer.usage.prompt_tokens_details.cached_tokens)


@pytest.mark.parametrize(
    "more",
    [
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "n": 2, "temperature": 1},
        {"stream": True, "logprobs": 2, "echo": True},
        {"stream": True, "prompt": IDS[:20], "return_token_ids": True},
        {"stream": True, "prompt": ["Once", "Twice"]},
        {"stream": True, "stop": ["e", "a"]},
        {"stream": "yes"},
        {},
        {"logprobs": 2, "echo": True, "n": 2, "temperature": 1},
        {"prompt": IDS[:20]},
        {"prompt": ["Once", "Twice"]},
        {"suffix": "the end"},
        {"prompt": ""},
        {"prompt": [5, "x"]},
        {"max_tokens": 0, "echo": True},
    ],
)
def test_what_a_client_gets_is_the_engines_own_but_for_ids_and_times(
    stack: Stack, shared: Gateway, more: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    body = {**_GREEDY, "prompt": "Once upon", **more}

    def ask(salt: str) -> tuple[bytes, bytes]:
        direct = stack.engine.post("/v1/completions", json={**body, "cache_salt": f"{request.node.name}{salt}"})
        relayed = shared.http.post("/v1/completions", json=body)
        assert relayed.status_code == direct.status_code
        # Choices that are made at once come in the order that the engine makes them in.
        one, other = (sorted(_VOLATILE.sub(b"", a.content).split(b"\n\n")) for a in (relayed, direct))
        return b"\n\n".join(one), b"\n\n".join(other)

    same_bytes(ask)


def test_the_openai_client_completes_and_streams_and_is_counted(shared: Gateway) -> None:
    client = shared.client("told")
    whole = complete(client, "Once upon")
    parts = list(complete(client, "Once upon", stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert all(part.usage is None for part in parts)
    session = shared.http.get("/admin/sessions/told").json()
    assert session["turn_count"] == 2
    assert session["token_count"] == whole.usage.total_tokens
    assert session["turns"][0]["completion_tokens"] == 12


@dataclass
class Told:
    """A conversation that was frozen before the restart."""

    prompt: Any
    window: dict[str, Any]
    control: Any = None

    @property
    def whole(self) -> int:
        """Tokens in whole chunks."""
        return int(self.window["receipt"]["chunks"]) * CHUNK


@dataclass
class Shelf:
    """Three of them: a text, token ids that came with ids, token ids that came with text."""

    gateway: Gateway
    text: Told
    row: Told
    mixed: Told


@across_restart
def shelf(_: Stack, gateway: Gateway) -> Iterator[Shelf]:
    """Tell and freeze."""
    text = _told(gateway, "text", STORY)
    row = _told(gateway, "row", IDS, extra_body={"ignore_eos": True, "return_token_ids": True})
    mixed = _told(gateway, "mixed", IDS[::-1])
    yield Shelf(gateway, text, row, mixed)


def _told(gateway: Gateway, name: str, prompt: Any, **more: Any) -> Told:
    """Two turns, a window, and the next turn where it is never frozen."""
    client = gateway.client(name)
    for _ in range(2):
        choice = complete(client, prompt, **more).choices[0]
        ids = (choice.model_extra or {}).get("token_ids")
        # With no ids a client has to make its own of the text.
        prompt = prompt + choice.text if isinstance(prompt, str) else [*prompt, *(ids or _ids(gateway, choice.text))]
    told = Told(prompt, gateway.freeze(name, name))
    assert told.window["kv"] == "complete", told.window["warnings"]
    assert told.whole > 4 * CHUNK
    told.control = complete(client, _longer(prompt), logprobs=3)
    return told


def _ids(gateway: Gateway, text: str) -> list[int]:
    body = {"model": "demo", "prompt": text, "add_special_tokens": False}
    return list(gateway.http.post("/tokenize", json=body).json()["tokens"])


def _longer(prompt: Any) -> Any:
    return prompt + " And then" if isinstance(prompt, str) else [*prompt, 9, 10, 11]


def _new(prompt: Any) -> Any:
    return " And then" if isinstance(prompt, str) else [9, 10, 11]


@pytest.mark.parametrize("name", ["text", "row", "mixed"])
def test_a_thawed_conversation_hits_and_continues_as_if_never_frozen(shelf: Shelf, name: str) -> None:
    told: Told = getattr(shelf, name)
    thawed = shelf.gateway.thaw(name)
    answer = complete(shelf.gateway.client(thawed["session_id"]), _longer(told.prompt), logprobs=3)
    assert cached(answer) >= told.whole
    assert answer.usage.prompt_tokens == told.control.usage.prompt_tokens
    assert answer.choices[0].text == told.control.choices[0].text
    one, other = (a.choices[0].logprobs.token_logprobs for a in (answer, told.control))
    assert one == pytest.approx(other, abs=1e-3)  # how many are computed in one go changes the last bits


@pytest.mark.parametrize("name", ["text", "row"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_new_is_enough(shelf: Shelf, name: str, stream: bool) -> None:
    told: Told = getattr(shelf, name)
    thawed = shelf.gateway.thaw(name, warm="gpu")
    assert thawed["receipt"]["cached_tokens"] >= told.whole
    session = thawed["session_id"]
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = complete(shelf.gateway.client(session), _new(told.prompt), **more)
    *parts, last = list(answer) if stream else [answer, answer]
    assert "".join(part.choices[0].text for part in parts) == told.control.choices[0].text
    assert last.usage.prompt_tokens == told.control.usage.prompt_tokens
    assert cached(last) >= told.whole
    if name == "text":
        shelf.gateway.freeze(session, f"went-on-{stream}")
        kept = without_turns(shelf.gateway.http.get(f"/admin/windows/went-on-{stream}/messages").json()["messages"])
        assert kept == [{"role": "text", "content": _longer(told.prompt) + told.control.choices[0].text}]


def test_ids_alone_cannot_follow_a_reply_that_is_known_as_text_and_no_chat_follows_either(shelf: Shelf) -> None:
    refused = complete_raw(shelf, "mixed", {"prompt": [9, 10, 11]})
    assert "return_token_ids" in refused["message"]
    for name, prompt in (("text", [9, 10]), ("row", " And then")):
        assert "cannot follow" in complete_raw(shelf, name, {"prompt": prompt})["message"]
        session = shelf.gateway.thaw(name)["session_id"]
        with pytest.raises(openai.BadRequestError, match="a chat cannot follow"):
            shelf.gateway.client(session).chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "And then?"}]
            )


def complete_raw(shelf: Shelf, window: str, body: dict[str, Any]) -> dict[str, Any]:
    """The refusal of a completion in a freshly thawed session."""
    session = shelf.gateway.thaw(window)["session_id"]
    answer = shelf.gateway.http.post(f"/s/{session}/v1/completions", json={**_GREEDY, **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    return dict(answer.json()["error"])
