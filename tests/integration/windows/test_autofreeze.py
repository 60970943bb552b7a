"""Windows that come by themselves, before an engine that is quick and without a cache."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.records import Session
from gateway.store.types import FreezeCandidate
from gateway.windows.autofreeze.service import AutofreezeService, retry_after
from tests.support.admin_requests import error_of
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.harness import CHUNK, GatewayHarness

QUICK: dict[str, Any] = {
    "auto_freeze": True,
    "auto_freeze_every_s": 0.2,
    "auto_freeze_cooldown_s": 0.01,
    "auto_freeze_idle_minutes": 0,
    "auto_freeze_share": 0,
}
_SOON = 0.5 / 60


def windows(gateway: Gateway, **query: Any) -> list[dict[str, Any]]:
    """The windows, newest first."""
    found = gateway.http.get("/admin/windows", params={"limit": 100, **query}).json()["windows"]
    assert isinstance(found, list)
    return found


def wait_for(gateway: Gateway, count: int, **query: Any) -> list[dict[str, Any]]:
    """Wait until there are so many windows."""
    eventually(lambda: len(windows(gateway, **query)) == count, f"{count} windows", 15, lambda: gateway.log)
    return windows(gateway, **query)


def put(gateway: Gateway, **rules: Any) -> dict[str, Any]:
    """Set rules at run time."""
    response = gateway.http.put("/admin/policies", json=rules)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def check(gateway: Gateway, session: str) -> dict[str, Any]:
    """Ask what the policies say of a session."""
    response = gateway.http.post("/admin/policies/check", json={"session_id": session})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def test_w5_a_session_left_alone_is_a_window_and_is_frozen_once(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(
        engine.url,
        tmp_path,
        **QUICK | {"auto_freeze_idle_minutes": _SOON, "workers": 2, "auto_freeze_tags": "auto-freeze"},
    ) as gateway:
        gateway.chat("user:7")
        (window,) = wait_for(gateway, 1)
        assert window["name"].startswith("auto-user-7-20")
        assert (window["session_id"], window["tags"]) == ("user:7", ["auto-freeze", "auto"])
        assert window["description"].startswith("Frozen automatically: idle for")
        eventually(lambda: check(gateway, "user:7")["held_back"] is not None, "the session is marked")
        assert gateway.http.get("/admin/sessions/user:7").json()["state"] == "frozen"
        time.sleep(1.5)  # several sweeps of two workers
        assert [w["name"] for w in windows(gateway)] == [window["name"]]
        gateway.chat("user:7", "more")
        assert wait_for(gateway, 2)[0]["token_count"] > window["token_count"]
        frozen = "it is frozen and has not continued since"
        eventually(lambda: check(gateway, "user:7")["held_back"] == frozen, frozen)


def test_w5_a_threshold_freezes_once_after_the_turn_that_crosses_it(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, **QUICK | {"auto_freeze_tokens": 500}) as gateway:
        gateway.chat("s", "x" * 100)
        told = check(gateway, "s")
        assert (told["triggered"], told["reason"], told["context_limit"]) == (False, None, 4096)
        gateway.chat("s", "x" * 600)
        (window,) = wait_for(gateway, 1)
        assert "(threshold 500)" in window["description"]
        gateway.chat("s", "x" * 700)
        time.sleep(1)
        assert len(windows(gateway)) == 1
        gateway.chat("s", "x" * 50)  # it was compacted
        eventually(lambda: check(gateway, "s")["covered_tokens"] < 500, "the shrunk session is noticed")
        time.sleep(0.5)
        gateway.chat("s", "x" * 800)
        wait_for(gateway, 2)


def test_w5_a_cool_down_holds_back_what_the_policies_say_and_then_no_more(engine: FakeEngine, tmp_path: Path) -> None:
    own = "tests.support.fakes.policies:Turns"
    with gateway_in_front_of(engine.url, tmp_path, **QUICK | {"auto_freeze_policies": own}) as gateway:
        put(gateway, cooldown_seconds=2, policies=[{"use": own, "turns": 1}])
        gateway.chat("s")
        wait_for(gateway, 1)
        began = time.monotonic()
        gateway.chat("s", "more")
        told = check(gateway, "s")
        assert (told["triggered"], told["reason"]) == (False, "2 turns")
        assert "cool-down" in told["held_back"]
        wait_for(gateway, 2)
        assert time.monotonic() - began > 1


def test_the_last_automatic_windows_are_kept_and_what_a_user_made_always(engine: FakeEngine, tmp_path: Path) -> None:
    own = "tests.support.fakes.policies:Turns"
    settings = QUICK | {"auto_freeze_policies": own, "auto_freeze_keep": 2}
    with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway:
        gateway.chat("s")
        assert gateway.freeze("s", "mine", tags=["auto"]).status_code == 201
        for turn in range(2, 6):
            gateway.chat("s", f"turn {turn}")
            eventually(lambda: gateway.http.get("/admin/sessions/s").json()["state"] == "frozen", "frozen", 10)
            time.sleep(0.3)
        names = [w["description"] for w in wait_for(gateway, 3)]
        assert names == ["Frozen automatically: 5 turns", "Frozen automatically: 4 turns", ""]


def test_a_storm_of_300_idle_sessions_is_worked_off_while_requests_stay_quick(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, **QUICK) as gateway:
        with ThreadPoolExecutor(8) as pool:
            assert {r.status_code for r in pool.map(lambda n: gateway.chat(f"s{n}"), range(300))} == {200}
        put(gateway, idle_timeout_minutes=0.001)
        slowest, total = 0.0, 0
        end = time.monotonic() + 60
        while total < 300:
            assert time.monotonic() < end, gateway.log
            began = time.monotonic()
            assert gateway.http.get("/v1/models").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
            total = gateway.http.get("/admin/windows?limit=1").json()["total"]
        assert slowest < 1
        time.sleep(0.5)
        assert gateway.http.get("/admin/windows?limit=1").json()["total"] == 300
        assert "ERROR" not in gateway.log


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_that_is_stopped_first_freezes_what_its_policy_says(
    engine: FakeEngine, tmp_path: Path, workers: int
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, **QUICK | {"workers": workers}) as gateway:
        put(gateway, at_shutdown=True)
        for number in range(5):
            gateway.chat(f"s{number}")
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log
        gateway.start().wait()
        made = windows(gateway)
        assert sorted(w["session_id"] for w in made) == [f"s{n}" for n in range(5)]
        assert {w["description"] for w in made} == {"Frozen automatically: the gateway was stopped"}


def test_an_engine_that_hangs_holds_the_end_up_no_longer_than_it_may(engine: FakeEngine, tmp_path: Path) -> None:
    settings = QUICK | {"auto_freeze_at_shutdown": True, "shutdown_freeze_s": 1}
    with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway:
        gateway.chat("s")
        engine.on_tokenize = lambda exchange: exchange.gone() and None
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(15) == 0
        assert 0.9 < time.monotonic() - began < 6
        assert "shutdown_freeze_s (1 s) ran out" in gateway.log
    engine.reset()  # the shared gateway may start before the next test asks for an engine that is well


def test_policies_that_fail_lie_or_dawdle_are_logged_and_hurt_no_request(engine: FakeEngine, tmp_path: Path) -> None:
    own = [f"tests.support.fakes.policies:{name}" for name in ("Failing", "Lying", "Slow", "Turns")]
    with gateway_in_front_of(engine.url, tmp_path, **QUICK | {"auto_freeze_policies": ",".join(own)}) as gateway:
        took = []
        for turn in range(4):
            for session in ("s1", "s2"):
                began = time.monotonic()
                assert gateway.chat(session, f"turn {turn}").status_code == 200
                took.append(time.monotonic() - began)
        assert max(took) < 0.9  # Slow sleeps a second for each session
        eventually(lambda: len(windows(gateway)) >= 2, "the one good policy decides", 15, lambda: gateway.log)
        assert {w["session_id"] for w in windows(gateway)} == {"s1", "s2"}
        assert gateway.log.count("RuntimeError: no idea what to do with") == 1
        assert gateway.log.count("must return Freeze(reason) or None") == 1


def test_a_freeze_that_fails_is_logged_and_tried_again_later_not_at_once(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, **QUICK | {"auto_freeze_tokens": 10}) as gateway:
        engine.on_tokenize = lambda exchange: exchange.json({"error": "out of order"}, 500)
        gateway.chat("s")
        eventually(lambda: "could not be frozen automatically" in gateway.log, "logged", more=lambda: gateway.log)
        time.sleep(1)
        assert gateway.log.count("could not be frozen automatically") == 1
        assert "its last freeze failed, 1 in a row" in check(gateway, "s")["held_back"]
    engine.reset()


def test_w5_x19_what_is_set_at_run_time_survives_a_restart_until_it_is_taken_back(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, **QUICK) as gateway:
        before = gateway.http.get("/admin/policies").json()
        assert before["set_at_run_time"] == []
        put(gateway, idle_timeout_minutes=30, naming_pattern="{timestamp}_{session_id}")
        put(gateway, token_threshold=1000, idle_timeout_minutes=None)
        assert gateway.stop() == 0
        gateway.start().wait()
        after = gateway.http.get("/admin/policies").json()
        assert (after["idle_timeout_minutes"], after["token_threshold"]) == (None, 1000)
        assert after["naming_pattern"] == "{timestamp}_{session_id}"
        assert after["set_at_run_time"] == ["idle_timeout_minutes", "naming_pattern", "token_threshold"]
        assert gateway.http.delete("/admin/policies").json() == before


@pytest.mark.parametrize(
    ("rules", "code", "field"),
    [
        ({"idle_timeout": 5}, "unknown_parameter", "idle_timeout"),
        ({"naming_pattern": "{session_id.__class__}-{timestamp}"}, "invalid_request", "naming_pattern"),
        ({"token_threshold": 0}, "invalid_request", "token_threshold"),
        ({"token_threshold": 4097}, "invalid_request", "token_threshold"),
        ({"policies": [{"use": "subprocess:Popen", "args": "id"}]}, "invalid_request", "policies[0]"),
        ({"policies": [{"use": "tests.support.fakes.policies:Turns"}]}, "invalid_request", "policies[0]"),
        ({"policies": ["idle_timeout"]}, "invalid_request", "policies[0]"),
        ({"keep": 2, "policies": [{"use": "any_of", "policies": 5}]}, "invalid_request", "policies[0]"),
    ],
)
def test_x17_rules_that_do_not_fit_are_refused_and_change_nothing(
    gateway: Gateway, rules: dict[str, Any], code: str, field: str
) -> None:
    before = gateway.http.get("/admin/policies").json()
    response = gateway.http.put("/admin/policies", json=rules)
    assert error_of(response) == (400, code)
    assert response.json()["error"]["details"] == {"field": field}
    assert gateway.http.get("/admin/policies").json() == before


def test_a_check_of_no_session_is_an_error(gateway: Gateway) -> None:
    nobody = gateway.http.post("/admin/policies/check", json={"session_id": "nobody"})
    assert error_of(nobody) == (404, "session_not_found")
    assert error_of(gateway.http.post("/admin/policies/check", json={})) == (400, "invalid_request")


def test_a_policy_of_the_settings_that_is_not_there_stops_the_start(engine: FakeEngine, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, engine.url, auto_freeze_policies="tests.support.fakes.policies:Nobody").start()
    try:
        assert gateway.process.wait(15) != 0
        assert "auto_freeze_policies" in gateway.log
        assert "has no 'Nobody'" in gateway.log
        assert "Traceback" not in gateway.log
    finally:
        gateway.close()


def test_failures_in_a_row_are_retried_less_and_less_often() -> None:
    waits = [retry_after(failures) for failures in (0, 1, 2, 6, 7, 1000)]
    assert waits == [30, 60, 120, 1920, 3600, 3600]


@pytest.mark.anyio
async def test_policies_are_not_asked_about_a_session_that_has_to_wait(harness: GatewayHarness) -> None:
    await harness.services.store.add_sessions([Session("t", "s", lineage="s", state="active", token_count=10**6)])
    settings = harness.settings.model_copy(update={"auto_freeze_tokens": 10})
    autofreeze = AutofreezeService(replace(harness.services, settings=settings))
    session = await harness.services.store.session("t", "s")
    assert session is not None
    async with autofreeze:
        now = time.time()
        waits = {"over": now - 1, "cool-down": now + 30, "after a failure": now + 3599, "a wrong clock's": now + 10**6}
        asked = [
            name
            for name, not_before in waits.items()
            if [
                one
                async for one in autofreeze._sessions_to_freeze([FreezeCandidate(session, 0, not_before, 0)], "turn")
            ]
        ]
    assert asked == ["over", "a wrong clock's"]


@pytest.mark.anyio
async def test_a_session_without_a_whole_chunk_is_not_frozen_where_windows_hold_kv(harness: GatewayHarness) -> None:
    assert harness.services.cache is not None
    await harness.services.cache.info()
    settings = harness.settings.model_copy(update={"auto_freeze_tokens": 1})
    text_only = replace(harness.services, cache=None, settings=settings)
    for services, frozen in ((replace(harness.services, settings=settings), [CHUNK]), (text_only, [CHUNK - 1, CHUNK])):
        async with AutofreezeService(services) as autofreeze:
            rows = [
                FreezeCandidate(Session("t", f"s{tokens}", lineage="s", token_count=tokens, transcript=b"t"), 0, 0.0, 0)
                for tokens in (CHUNK - 1, CHUNK)
            ]
            asked = [row async for row, _ in autofreeze._sessions_to_freeze(rows, "turn")]
            assert [row.session.token_count for row in asked] == frozen
            short = autofreeze._held_back(rows[0], time.time())
            assert ("shorter than one chunk (16 tokens)" in short) == (len(frozen) == 1)


@pytest.mark.anyio
async def test_a_session_whose_last_turn_lies_in_the_future_is_idle(harness: GatewayHarness) -> None:
    now = time.time()
    autofreeze = AutofreezeService(harness.services)
    for last in (now - 3600, now + 3600):
        one = FreezeCandidate(Session("t", "s", lineage="s", last_active_at=last), 0, 0.0, 0)
        assert autofreeze._observation(one, "sweep", now).idle_s == pytest.approx(3600)
