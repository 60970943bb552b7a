"""The Responses API: which responses are stored, listed, replaced and deleted."""

import json
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.store.sqlite import SqliteStore
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine
from tests.support.fakes.responses import PATH, event, response_of, said, serve, stream_of, usage_of
from tests.support.gateway_process import Gateway
from tests.support.raw_http import RawHttpClient
from tests.support.stored_answers import TOOL, answer_of, ask, error_of, finished, texts


@pytest.mark.anyio
async def test_an_answer_replaces_another_of_its_id_in_its_own_session_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with SqliteStore(tmp_path / "x.db", turns_kept=5) as store:
        await store.record([finished("resp_x", session="first", at=1.0)])
        await store.record([finished("resp_x", session="second", at=2.0), finished("resp_y", session="second", at=3.0)])
        kept = await store.response("default", "resp_x")
        assert kept is not None
        assert (kept.session_id, kept.created_at) == ("first", 1.0)
        assert await store.response("default", "resp_y")
        assert len(await store.turns("default", "second", 5)) == 2  # the turn is recorded all the same
        assert "'resp_x' is that of another session" in caplog.text
        await store.record([finished("resp_x", session="first", at=4.0)])
        again = await store.response("default", "resp_x")
        assert again is not None
        assert again.created_at == 4.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"store": "yes"}, "store"),
        ({"previous_response_id": 7}, "previous_response_id"),
        ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id"),
    ],
)
def test_what_is_not_served_is_refused_by_its_field(
    engine: FakeEngine, gateway: Gateway, body: dict[str, Any], param: str
) -> None:
    response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", **body})
    assert error_of(response) == (400, "invalid_request", param)
    assert engine.seen(PATH) == []


@pytest.mark.parametrize("text", [[], [{"type": "item_reference", "id": "x"}], 7])
def test_an_input_that_cannot_follow_is_refused(engine: FakeEngine, gateway: Gateway, text: Any) -> None:
    start = answer_of(ask(gateway, "one"))["id"]
    response = gateway.http.post(PATH, json={"model": MODEL, "input": text, "previous_response_id": start})
    assert error_of(response) == (400, "invalid_request", "input")
    assert len(engine.seen(PATH)) == 1


def test_an_answer_that_is_more_than_one_message_is_kept_but_not_gone_on_from(
    engine: FakeEngine, gateway: Gateway
) -> None:
    serve(engine, [said("a"), said("b")])
    start = answer_of(ask(gateway, "one"))["id"]
    response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", "previous_response_id": start})
    assert error_of(response) == (400, "invalid_request", "previous_response_id")
    assert len(gateway.http.get(f"{PATH}/{start}").json()["output"]) == 2


def test_what_the_client_did_not_want_stored_is_not(engine: FakeEngine, gateway: Gateway) -> None:
    first = ask(gateway, "one", store=False)
    start = answer_of(first)["id"]
    gateway.turns(first.headers["x-session-id"])
    assert error_of(gateway.http.get(f"{PATH}/{start}")) == (404, "response_not_found", None)
    response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", "previous_response_id": start})
    assert error_of(response)[:2] == (404, "previous_response_not_found")


@pytest.mark.parametrize("how", ["error", "failed", "ended", "cut"])
def test_a_stream_that_broke_is_not_kept(engine: FakeEngine, gateway: Gateway, session: str, how: str) -> None:
    response = response_of({}, [said("one two three")], usage_of(5, 3))
    events = stream_of(response)
    bad = {
        "error": [event("error", 4, code="x", message="it broke", param=None)],
        "failed": [event("response.failed", 4, response={**response, "status": "failed", "error": "it broke"})],
        "ended": [],
        "cut": [events[4][:20]],
    }[how]

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for one in [*events[:4], *bad]:
            exchange.chunk(one)
        if how == "cut":
            exchange.cut()
        else:
            exchange.end()

    engine.on_other = answer
    with RawHttpClient(gateway.url) as wire:
        body = json.dumps({"model": MODEL, "input": "x", "stream": True}).encode()
        wire.post(PATH, body, f"x-session-id: {session}")
        assert wire.head() == 200
        stream = b"".join(wire.chunks())
    assert stream.startswith(b"".join(events[:4]))
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == ("engine_cut" if how == "cut" else "engine_error")
    assert gateway.http.get(f"{PATH}/{response['id']}").status_code == 404
    if how == "cut":  # the client gets an event with the next sequence number
        last = json.loads(stream.rpartition(b"data: ")[2])
        assert (last["type"], last["code"], last["sequence_number"]) == ("error", "engine_unreachable", 4)
        assert stream.rpartition(b"\n\nevent: ")[2].startswith(b"error\n")


def test_a_kept_answer_is_what_the_client_got_and_what_only_the_gateway_knows(
    engine: FakeEngine, gateway: Gateway
) -> None:
    first = answer_of(ask(gateway, "one", instructions="long", tools=[TOOL], metadata={"a": "b"}))
    second = answer_of(ask(gateway, "two", first["id"], stream=True))
    for answer, previous in ((first, None), (second, first["id"])):
        kept = gateway.http.get(f"{PATH}/{answer['id']}")
        assert kept.headers["content-type"] == "application/json"
        assert kept.json() == {**answer, "previous_response_id": previous, "store": True}


def test_deleting_a_response_keeps_those_that_continue_it(engine: FakeEngine, gateway: Gateway) -> None:
    first = answer_of(ask(gateway, "one"))["id"]
    second = answer_of(ask(gateway, "two", first))["id"]
    assert gateway.http.delete(f"{PATH}/{first}").json() == {"id": first, "object": "response", "deleted": True}
    assert error_of(gateway.http.delete(f"{PATH}/{first}")) == (404, "response_not_found", None)
    assert error_of(gateway.http.get(f"{PATH}/{first}")) == (404, "response_not_found", None)
    assert gateway.http.get(f"{PATH}/{first}/input_items").status_code == 404
    ask(gateway, "three", second)
    assert len(texts(engine.seen(PATH)[-1])) == 5


def test_a_deleted_session_takes_its_answers_with_it(engine: FakeEngine, gateway: Gateway) -> None:
    first = ask(gateway, "one")
    fork = ask(gateway, "x", answer_of(ask(gateway, "other"))["id"])
    gateway.turns(first.headers["x-session-id"])
    assert gateway.http.delete(f"/admin/sessions/{first.headers['x-session-id']}").status_code == 200
    assert gateway.http.get(f"{PATH}/{answer_of(first)['id']}").status_code == 404
    assert gateway.http.get(f"{PATH}/{answer_of(fork)['id']}").status_code == 200


def test_input_items_come_in_pages_newest_first(engine: FakeEngine, gateway: Gateway) -> None:
    items = [
        {"role": "user", "content": "0"},
        {"type": "message", "id": "msg_mine", "role": "assistant", "content": [{"type": "output_text", "text": "1"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "2"}]},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
    ]
    path = f"{PATH}/{answer_of(ask(gateway, items))['id']}/input_items"
    every = gateway.http.get(path).json()
    assert [item["type"] for item in every["data"]] == [
        "function_call_output", "function_call", "message", "message", "message",
    ]  # fmt: skip
    assert [item["content"][0] for item in every["data"][2:]] == [
        {"type": "input_text", "text": "2"}, {"type": "output_text", "text": "1"}, {"type": "input_text", "text": "0"},
    ]  # fmt: skip
    assert (every["object"], every["has_more"]) == ("list", False)
    assert (every["first_id"], every["last_id"]) == (every["data"][0]["id"], every["data"][-1]["id"])
    assert every["data"][3]["id"] == "msg_mine"
    assert len({item["id"] for item in every["data"]}) == 5
    page = gateway.http.get(path, params={"limit": 2, "order": "asc"}).json()
    assert (len(page["data"]), page["has_more"], page["last_id"]) == (2, True, "msg_mine")
    rest = gateway.http.get(path, params={"limit": 3, "order": "asc", "after": "msg_mine"}).json()
    assert [*page["data"], *rest["data"]] == every["data"][::-1]
    assert rest["has_more"] is False
    after = gateway.http.get(path, params={"after": every["last_id"]}).json()
    assert after == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for bad in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "nobody"}):
        assert gateway.http.get(path, params=bad).status_code == 400
    unknown = gateway.http.get(path, params={"lmit": 1}).json()["error"]
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "lmit")


def test_the_openai_client_reads_what_is_kept(engine: FakeEngine, gateway: Gateway) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(model=MODEL, input="one")
        second = client.responses.create(model=MODEL, input="two", previous_response_id=first.id)
        kept = client.responses.retrieve(second.id)
        assert (kept.output_text, kept.previous_response_id) == ("Hello there!", first.id)
        (item,) = client.responses.input_items.list(second.id)
        assert item.content[0].text == "two"  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            client.responses.cancel(second.id)
        with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
            list(client.responses.retrieve(second.id, stream=True))
        client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError, match=second.id):
            client.responses.retrieve(second.id)
        with pytest.raises(openai.NotFoundError) as unknown:
            client.responses.create(model=MODEL, input="x", previous_response_id=second.id)
    assert (unknown.value.code, unknown.value.param) == ("previous_response_not_found", "previous_response_id")


def test_of_other_paths_the_engine_gets_those_that_are_known(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_other = lambda exchange: exchange.json({"target": exchange.request.target})
    assert gateway.http.post(f"{PATH}/render", json={}).json() == {"target": f"{PATH}/render"}
    for method, path in [("POST", "/compact"), ("PATCH", "/resp_1"), ("GET", "/resp_1/x")]:
        answer = gateway.http.request(method, f"{PATH}{path}", json={} if method == "POST" else None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert [request.target for request in engine.asked] == [f"{PATH}/render"]


@pytest.mark.anyio
async def test_stored_responses_are_limited_for_each_tenant(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5, responses_kept=3) as store:
        for number in range(8):
            await store.record([finished(f"r{number}", session=f"s{number}", at=float(number))])
        await store.record([finished("theirs", tenant="other", session="t")])
        kept = [number for number in range(8) if await store.response("default", f"r{number}")]
        assert kept == [5, 6, 7]
        assert await store.response("other", "theirs")
        oldest = await store.response("default", "r5")
        assert oldest is not None
        assert oldest.request_input is not None
        assert oldest.transcript is not None
        assert oldest.answer == {"id": "r5", "output": [], "instructions": "long", "tools": []}
        for number in (5, 6, 7):  # what only the answer holds stays as long as the answer
            assert await store.delete_session("default", f"s{number - 5}")
            assert await store.messages(oldest.request_input) == [{"role": "user", "content": "r5"}]
        assert await store.delete_response("default", "r6")
        assert not await store.delete_response("default", "r6")
        assert await store.messages(oldest.transcript) == [
            {"role": "user", "content": "r5"}, {"role": "assistant", "content": "a"},
        ]  # fmt: skip
        assert await store.delete_session("default", "s5")
        assert await store.response("default", "r5") is None
        assert await store.messages(oldest.request_input) == []


def test_many_requests_at_once_continue_one_response(engine: FakeEngine, gateway: Gateway) -> None:
    start = answer_of(ask(gateway, "one"))["id"]
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(answer_of(ask(gateway, str(n), start)))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer in answers}) == 8
    for answer in answers:  # whichever came last in their session, each can be continued
        ask(gateway, "next", answer["id"])
        sent = texts(engine.seen(PATH)[-1])
        assert len(sent) == 5
        items = gateway.http.get(f"{PATH}/{answer['id']}/input_items").json()["data"]
        assert sent[2] == ("user", items[0]["content"][0]["text"])
