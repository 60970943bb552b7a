"""The scripts of the replaced system's guides run as they stand, in front of an engine with room for 100,000 tokens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import old_guide
from tests.support.conversations import without_turns
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.fakes.responses import serve
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.old_guide_scripts import SCRIPTS


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of their own: they name sessions and windows as they like."""
    engine = FakeEngine().start()
    engine.context_limit = 131_072
    try:
        with gateway_in_front_of(engine.url, tmp_path_factory.mktemp("guide")) as gateway:
            yield gateway
    finally:
        engine.stop()


def given(gateway: Gateway, script: old_guide.Script) -> None:
    """What is there before the script."""
    for session in {*script.sessions, *(window["session_id"] for window in script.windows.values())}:
        assert gateway.chat(session).status_code == 200
    for name, window in script.windows.items():
        if gateway.http.get(f"/admin/windows/{name}").status_code == 404:
            answer = gateway.http.post("/admin/windows", json={"window_name": name, **window})
            assert answer.status_code == 201, answer.text


def run(gateway: Gateway, script: old_guide.Script) -> old_guide.Outcome:
    """Run it; what goes on meanwhile is said in the session that is named."""

    def meanwhile(line: str) -> None:
        session, colon, text = line.partition(": ")
        if colon:
            assert gateway.chat(session, text).status_code == 200

    given(gateway, script)
    return old_guide.run(gateway.url, script, meanwhile)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_the_old_guide_runs_as_it_stands(large: Gateway, name: str) -> None:
    run(large, SCRIPTS[name])


def test_w06_the_script_prints_what_it_is_for(large: Gateway) -> None:
    large.chat("watched")
    printed = run(large, SCRIPTS["W6"]).printed
    assert printed[0] in {"Status: degraded", "Status: healthy"}  # there is no cache
    assert printed[1].startswith("Uptime: ")
    assert any(line.startswith("cwg_turns_total: ") for line in printed)


def test_w14_the_script_prints_a_hit_rate_before_anything_was_measured(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as fresh:
        assert fresh.http.get("/admin/cache").json()["hit_rate"] is None
        assert run(fresh, replace(SCRIPTS["W14"], windows={})).printed[-1] == "Hit rate: 0.00%"


def test_w13_the_script_names_what_is_not_healthy(large: Gateway) -> None:
    health = large.http.get("/admin/health").json()
    assert (health["status"], health["components"]["cache"]["status"]) == ("degraded", "degraded")
    names = run(large, SCRIPTS["W13"]).names
    assert [one["name"] for one in names["health"]["components"]] == [*health["components"]]
    assert names["health"]["by_name"]["cache"]["message"] == "no cache is configured"


def test_w12_one_component_has_its_status_at_the_top(large: Gateway) -> None:
    assert run(large, SCRIPTS["W12"]).printed == ["healthy serves demo"]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_w02_for_a_client_that_sends_only_new_messages(engine: FakeEngine, tmp_path: Path, api: str) -> None:
    """The script as it stands but for `into`: there the gateway keeps the history, from a window or a conversation."""
    with gateway_in_front_of(engine.url, tmp_path) as gateway:

        def say(text: str) -> None:
            if api == "chat":
                answer = gateway.chat("exploration", text)
            else:
                body = {"model": MODEL, "input": text, "conversation": "exploration"}
                answer = gateway.http.post("/v1/responses", json=body)
            assert answer.status_code == 200, answer.text

        if api == "chat":
            gateway.chat("base", "the base")
            gateway.freeze("base", "base")
            gateway.http.post("/admin/windows/base/thaw", json={"new_session_id": "exploration"})
        else:
            serve(engine)
        say("what could be done?")
        thaw = 'window_thaw(window_name="before-experiment"'
        text = SCRIPTS["W2"].text.replace(thaw, f'{thaw}, into="exploration"')
        old_guide.run(gateway.url, replace(SCRIPTS["W2"], text=text), lambda line: say(line.partition(": ")[2]))
        before, a, b = (
            without_turns(gateway.http.get(f"/admin/windows/{name}/messages").json()["messages"])
            for name in ("before-experiment", "approach-a", "approach-b")
        )
        for made, said in ((a, "approach A"), (b, "approach B")):
            assert made[:-2] == before
            assert made[-2] == {"role": "user", "content": said}
        turns = [*engine.seen("/v1/chat/completions"), *engine.seen("/v1/responses")]
        assert len({turn.json["cache_salt"] for turn in turns}) == 1
