"""Searches, and questions to whichever windows match, at the admin API, in the CLI and over MCP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.admin_requests import error_of
from tests.support.cli import cwg, cwg_on_terminal
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.refusals import assert_refused

pytestmark = pytest.mark.usefixtures("each_store")

SAID = {
    "billing": "We decided that billing goes by the hour, with Zephyr.",
    "weather": "What will the weather be in Oslo? 天気はどうですか",
    "code": 'Fix foo_bar.baz(qux) in <b>gateway</b>, please: it\'s 100% "broken"',
}


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeEngine]]:
    """A gateway with a window of each conversation, and a clone."""
    engine = FakeEngine().start()
    with gateway_in_front_of(engine.url, tmp_path_factory.mktemp("stocked")) as gateway:
        for name, said in SAID.items():
            gateway.chat(f"s-{name}", said)
            assert gateway.freeze(f"s-{name}", name, tags=["t"]).status_code == 201
        gateway.http.post("/admin/windows/billing/clone", json={"target_window": "billing-copy"})
        yield gateway, engine
    engine.stop()


def found(gateway: Gateway, text: str) -> dict[str, Any]:
    page = gateway.http.get("/admin/windows", params={"search": text}).json()
    assert page["total"] == len(page["windows"])
    assert page["truncated"] is False
    return {one["name"]: one["match"] for one in page["windows"]}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("zephyr", {"billing", "billing-copy"}), ("hour billing", {"billing", "billing-copy"}), ("天気", {"weather"}),
        ("foo_bar.baz(qux)", {"code"}), ('"broken"', {"code"}), ("<b>gateway</b>", {"code"}), ("it's 100%", {"code"}),
        ("zephyr AND oslo", set()), ("zephyr OR oslo", set()), ("NOT zephyr", set()), ("ephyr", set()),
        ("hello", set(SAID) | {"billing-copy"}),
    ],
)  # fmt: skip
def test_list_is_searched_literally(stocked: tuple[Gateway, FakeEngine], text: str, names: set[str]) -> None:
    assert set(found(stocked[0], text)) == names


def test_place_of_a_match(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, _ = stocked
    assert found(gateway, "zephyr")["billing"] == {
        "field": "message", "message": 0, "role": "user", "snippet": SAID["billing"]
    }  # fmt: skip
    assert found(gateway, "-copy") == {
        "billing-copy": {"field": "name", "message": None, "role": None, "snippet": "billing-copy"}
    }
    assert "match" not in gateway.http.get("/admin/windows").json()["windows"][0]


def test_search_finds_windows_and_sessions(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, _ = stocked
    answer = gateway.http.get("/admin/search", params={"q": "Oslo"}).json()
    assert [(one["kind"], one["name"], one["state"]) for one in answer["results"]] == [
        ("window", "weather", "frozen"), ("session", "s-weather", "frozen")
    ]  # fmt: skip
    assert (answer["all_words"], answer["truncated"]) == (True, False)
    some = gateway.http.get("/admin/search", params={"q": "Oslo chromodynamics"}).json()
    assert ([one["name"] for one in some["results"]], some["all_words"]) == (["weather", "s-weather"], False)
    one = gateway.http.get("/admin/search", params={"q": "zephyr", "limit": 1}).json()
    assert (len(one["results"]), one["truncated"]) == (1, True)
    assert gateway.http.get("/admin/search", params={"q": "qqq"}).json()["results"] == []


def test_search_refuses_what_is_no_text(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, _ = stocked
    assert_refused(gateway.http.get("/admin/search"), "invalid_request", "q")
    assert_refused(gateway.http.get("/admin/search", params={"q": " "}), "invalid_request", "q")
    assert_refused(gateway.http.get("/admin/windows", params={"search": "x" * 10_001}), "invalid_request", "search")
    assert gateway.http.get("/admin/windows", params={"search": "x " * 5000}).json()["total"] == 0


def test_deleted_conversations_are_not_found(engine: FakeEngine, tmp_path: Path) -> None:
    """Neither after the gateway was killed while it was deleting, nor while it is started again."""
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for number in range(6):
            gateway.chat(f"s{number}", f"zebra number {number}")
            gateway.freeze(f"s{number}", f"w{number}")
            gateway.http.delete(f"/admin/sessions/s{number}")
        for number in range(5):
            gateway.http.delete(f"/admin/windows/w{number}")
        gateway.process.kill()
        gateway.process.wait()
        gateway.start().wait()
        assert set(found(gateway, "zebra")) == {"w5"}
        names = [one["name"] for one in gateway.http.get("/admin/search?q=zebra").json()["results"]]
        assert names == ["w5"]


def test_imported_windows_are_found(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat("s", "zebra")
        gateway.freeze("s", "w")
        file = gateway.http.get("/admin/windows/w/export").content
        gateway.http.delete("/admin/windows/w")
        gateway.http.delete("/admin/sessions/s")
        assert found(gateway, "zebra") == {}
        imported = gateway.http.post("/admin/windows/import?window_name=new", content=file)
        assert imported.json()["title"] == "zebra"
        assert set(found(gateway, "zebra")) == {"new"}


def test_cli_search(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, _ = stocked
    shown = cwg_on_terminal("search", "zephyr", url=gateway.url).stdout
    assert "message 0, user: We decided that billing goes by the hour, with Zephyr." in shown
    listed = cwg("list", "--search", "zephyr", url=gateway.url).stdout
    assert "message 0, user: We decided" in listed
    nothing = cwg("search", "qqq", url=gateway.url)
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "nothing found\n")
    assert "these have some" in cwg("search", "oslo qqq", url=gateway.url).stderr
    assert json.loads(cwg("search", "oslo", "--json", url=gateway.url).stdout)["results"][0]["name"] == "weather"


def asked(engine: FakeEngine, count: int) -> list[str]:
    """The first messages of the conversations that were asked last."""
    return [request.json["messages"][0]["content"] for request in engine.seen("/v1/chat/completions")[-count:]]


def test_question_goes_to_the_windows_that_match(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, engine = stocked
    question = {"question": "What did we decide about bills?", "max_tokens": 9}
    answer = gateway.http.post("/admin/ask", json=question).json()
    (one,) = answer["answers"]
    assert (one["window_name"], one["title"], one["answer"], one["error"]) == (
        "billing-copy", SAID["billing"], "Hello there!", None
    )  # fmt: skip
    assert one["receipt"]["prompt_tokens"] > 0
    assert (one["match"]["field"], answer["warnings"]) == ("message", [])
    last = engine.seen("/v1/chat/completions")[-1].json
    assert (last["messages"][0]["content"], last["messages"][-1]["content"], last["max_tokens"]) == (
        SAID["billing"], question["question"], 9
    )  # fmt: skip


def test_question_without_a_match_is_asked_nobody(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, engine = stocked
    before = len(engine.seen("/v1/chat/completions"))
    answer = gateway.http.post("/admin/ask", json={"question": "What is chromodynamics?"}).json()
    assert (answer["answers"], answer["warnings"]) == ([], ["no window has anything of this: none was asked"])
    assert len(engine.seen("/v1/chat/completions")) == before
    ended = cwg("ask", "--any", "chromodynamics?", url=gateway.url)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "none was asked" in ended.stderr


def test_failure_of_one_window_does_not_lose_the_others(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, engine = stocked

    def fail_for_oslo(exchange: Exchange) -> None:
        said = exchange.request.json["messages"][0]["content"]
        exchange.cut() if "Oslo" in said else engine.answer_chat(exchange)

    engine.on_chat = fail_for_oslo
    try:
        body = {"question": "What?", "search": "oslo qux"}
        answers = gateway.http.post("/admin/ask", json=body).json()["answers"]
        assert {one["window_name"]: (one["answer"], (one["error"] or {}).get("code")) for one in answers} == {
            "weather": (None, "engine_unreachable"),
            "code": ("Hello there!", None),
        }
        ended = cwg("ask", "--any", "What?", "--search", "oslo qux", url=gateway.url)
        assert (ended.returncode, "Hello there!" in ended.stdout) == (0, True)
        only = gateway.http.post("/admin/ask", json={**body, "max_windows": 1}).json()["answers"]
        assert len(only) == 1
    finally:
        engine.on_chat = engine.answer_chat


def test_answers_are_waited_for_no_longer_than_said(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, engine = stocked
    engine.on_chat = Exchange.gone  # type: ignore[assignment]
    try:
        answer = gateway.http.post("/admin/ask", json={"question": "Oslo?", "timeout_seconds": 1}).json()
    finally:
        engine.on_chat = engine.answer_chat
    (one,) = answer["answers"]
    assert (one["answer"], one["error"]["code"]) == (None, "engine_timeout")
    assert "timeout_seconds" in one["error"]["hint"]


def test_expired_windows_are_not_asked(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, _ = stocked
    gateway.chat("brief", "about okapis")
    gateway.freeze("brief", "brief", ttl_seconds=0.001)
    assert gateway.http.post("/admin/ask", json={"question": "okapis?"}).json()["answers"] == []


def test_ask_refuses_what_it_does_not_take(stocked: tuple[Gateway, FakeEngine]) -> None:
    gateway, _ = stocked
    for body, field in (
        ({}, "question"),
        ({"question": "q", "max_windows": 11}, "max_windows"),
        ({"question": "q", "timeout_seconds": 0}, "timeout_seconds"),
    ):
        assert_refused(gateway.http.post("/admin/ask", json=body), "invalid_request", field)
    assert (
        error_of(gateway.http.post("/admin/ask", json={"question": "q", "window_name": "w"}))[1] == "unknown_parameter"
    )
    assert cwg("ask", "--any", "billing", "what?", url=gateway.url).returncode == 2
    assert cwg("ask", "billing", "what?", "--windows", "2", url=gateway.url).returncode == 2
