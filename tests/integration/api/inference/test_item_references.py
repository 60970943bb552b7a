"""Items that a request names by their ids: how Vercel's AI SDK sends a conversation back, from its second turn on."""

import sqlite3
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.store.schema import MIGRATIONS
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.fakes.responses import PATH, called, said, serve
from tests.support.gateway_process import Gateway
from tests.support.stored_answers import TOOL, answer_of, ask, error_of, texts

USER = {"role": "user", "content": [{"type": "input_text", "text": "one"}]}
NEXT = {"role": "user", "content": [{"type": "input_text", "text": "two"}]}


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    """One that speaks the Responses API."""
    serve(engine)
    return engine


def references(answer: dict[str, Any]) -> list[dict[str, str]]:
    """What stands for an answer in the next request."""
    return [{"type": "item_reference", "id": item["id"]} for item in answer["output"]]


def refused(gateway: Gateway, *items: dict[str, Any]) -> httpx.Response:
    """The answer to a request with these items."""
    return gateway.http.post(PATH, json={"model": MODEL, "input": list(items)})


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_refers_to_its_answers_is_one_session(
    engine: FakeEngine, gateway: Gateway, *, stream: bool
) -> None:
    first = ask(gateway, [USER], stream=stream)
    second = ask(gateway, [USER, *references(answer_of(first)), NEXT], stream=stream)
    assert texts(engine.seen(PATH)[-1]) == [("user", "one"), ("assistant", "Hello there!"), ("user", "two")]
    assert second.headers["x-session-id"] == first.headers["x-session-id"]
    assert second.headers["x-session-match"] == "prefix"


def test_tool_calls_can_be_referenced(engine: FakeEngine, gateway: Gateway) -> None:
    serve(engine, [called("now", "{}", "call_1")])
    call = answer_of(ask(gateway, [USER], tools=[TOOL]))
    result = {"type": "function_call_output", "call_id": call["output"][0]["call_id"], "output": "noon"}
    ask(gateway, [USER, *references(call), result], tools=[TOOL])
    assert engine.seen(PATH)[-1].json["input"] == [USER, *call["output"], result]


def test_what_is_not_kept_is_not_found(engine: FakeEngine, gateway: Gateway) -> None:
    secret = references(answer_of(ask(gateway, [USER], store=False)))
    deleted = answer_of(ask(gateway, [USER]))
    assert gateway.http.delete(f"{PATH}/{deleted['id']}").status_code == 200
    for item in (*secret, *references(deleted), {"type": "item_reference", "id": "msg_of_nobody"}):
        answer = refused(gateway, USER, item, NEXT)
        assert error_of(answer) == (400, "invalid_request", "input")
        assert item["id"] in answer.text
    assert len(engine.seen(PATH)) == 2


def test_an_item_is_referred_to_once(engine: FakeEngine, gateway: Gateway) -> None:
    (item,) = references(answer_of(ask(gateway, [USER])))
    assert error_of(refused(gateway, USER, item, item, NEXT)) == (400, "invalid_request", "input")
    assert len(engine.seen(PATH)) == 1


def test_answers_that_were_kept_before_can_be_referred_to(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "old.db")
    for statement in chain(*MIGRATIONS[:14]):
        db.execute(statement)
    db.execute(
        "INSERT INTO responses VALUES (1, 't', 'resp_1', 's', 's', 0, CAST(? AS BLOB), x'00', 0, NULL, NULL)",
        ['{"output": [{"id": "msg_1"}, {"id": 5}, {}, 7]}'],
    )
    for statement in MIGRATIONS[14]:
        db.execute(statement)
    assert db.execute("SELECT * FROM response_items").fetchall() == [("t", "msg_1", 1)]
    db.execute("DELETE FROM responses")
    assert db.execute("SELECT * FROM response_items").fetchall() == []
    db.close()


def test_the_answer_to_a_reference_has_its_items_as_input(gateway: Gateway) -> None:
    first = answer_of(ask(gateway, [USER]))
    second = answer_of(ask(gateway, [USER, *references(first), NEXT]))
    shown = gateway.http.get(f"{PATH}/{second['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [item["type"] for item in shown] == ["message"] * 3
    assert shown[1]["id"] == first["output"][0]["id"]
    assert said("x")["role"] == shown[1]["role"]
