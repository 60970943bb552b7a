"""What the cache has saved, from a client's turn to the ledger: booked once each, at every API, and over restarts."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cli import cwg
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of

pytestmark = pytest.mark.usefixtures("each_store")


def _stream(gateway: Gateway, session: str, text: str) -> None:
    """A streamed turn: it tells when the first token came."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
    with gateway.http.stream("POST", f"/s/{session}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        answer.read()


def _teach(gateway: Gateway) -> None:
    """Cold prompts of several sizes."""
    for size in (100, 400, 1600):
        _stream(gateway, f"cold-{size}", f"{size}" * (size // 3))


def _ledger(gateway: Gateway) -> dict[str, Any]:
    answer: dict[str, Any] = gateway.http.get("/admin/ledger").raise_for_status().json()
    return answer


def test_turns_thaws_and_asks_are_booked_once_each(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        assert _ledger(gateway)["total"]["reason"] == "no request yet whose cached tokens the engine counted"
        _teach(gateway)
        gateway.chat("s", "hi")
        gateway.freeze("s", "w")
        before = _ledger(gateway)["total"]["tokens"]
        url = "/admin/windows/w"
        thawed = gateway.http.post(f"{url}/thaw", json={"new_session_id": "t", "warm": "gpu"}).json()
        thaw = thawed["receipt"]["saved"]
        assert thaw["tokens"] == thawed["receipt"]["cached_tokens"] > 0
        assert (thaw["requests"], thaw["tokens_estimated"], thaw["reason"]) == (1, thaw["tokens"], None)
        assert thaw["seconds_estimated"] is not None
        turn = gateway.chat("t", "And then?").json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        asked = gateway.http.post(f"{url}/ask", json={"question": "What?"}).json()["receipt"]
        ledger = _ledger(gateway)
        assert ledger["thaws"]["tokens"] == thaw["tokens"]
        assert ledger["asks"]["tokens"] == asked["saved"]["tokens"] == asked["cached_tokens"]
        # The first turn finds what the thaw has found already.
        assert ledger["total"]["tokens"] - before == max(turn, thaw["tokens"]) + asked["cached_tokens"]
        (line,) = ledger["windows"]
        assert (line["name"], line["saved"]["requests"]) == ("w", 3)
        status = gateway.http.get(url).json()
        assert status["saved"] == line["saved"] == gateway.http.get("/admin/windows").json()["windows"][0]["saved"]
        session = gateway.http.get("/admin/sessions/t").json()
        assert session["saved"]["tokens"] == max(turn, thaw["tokens"])
        cold = gateway.http.post(f"{url}/thaw", json={"warm": "none"}).json()
        assert cold["receipt"]["saved"] is None


def test_a_curve_is_learned_and_survives_a_restart(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        _stream(gateway, "s", "hello" * 20)
        _stream(gateway, "s", "hello" * 20)
        assert _ledger(gateway)["total"]["seconds_estimated"] is None
        _teach(gateway)
        ledger = _ledger(gateway)
        (curve,) = ledger["curves"]
        assert (curve["engine"], curve["model"], curve["current"], curve["samples"]) == (engine.url, MODEL, True, 4)
        assert curve["tokens_reach"] > 4000
        assert curve["seconds_by_tokens"].keys() == {"1000", "2000", "4000", "8000"}
        assert ledger["total"]["seconds_estimated"] is not None
        (turn, _) = gateway.http.get("/admin/sessions/s").json()["turns"]
        assert 0 < turn["first_token_ms"] <= turn["duration_ms"]
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        again = _ledger(gateway)
        assert {name: again[name] for name in ("total", "turns", "curves", "since", "sessions")} == {
            name: ledger[name] for name in ("total", "turns", "curves", "since", "sessions")
        }


def test_sums_of_two_workers_are_those_of_their_answers_and_survive_a_kill(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, workers=2) as gateway:
        _teach(gateway)
        before = _ledger(gateway)["turns"]
        with ThreadPoolExecutor(8) as clients:  # each on connections of its own, so both workers serve
            usages = list(clients.map(lambda n: _ask(gateway, f"s{n % 5}", n), range(40)))
        after = _ledger(gateway)["turns"]
        assert after["requests"] - before["requests"] == 40
        assert after["prompt_tokens"] - before["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        assert after["tokens"] - before["tokens"] == cached > 0
        sessions = gateway.http.get("/admin/sessions").json()["sessions"]
        assert sum(session["saved"]["tokens"] for session in sessions) == after["tokens"]
        gateway.process.kill()
        gateway.process.wait()
        eventually(lambda: not _listens(gateway.port), "its workers end")
        assert _ledger(gateway.start().wait())["turns"] == after


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _ask(gateway: Gateway, session: str, number: int) -> dict[str, Any]:
    """A turn on a connection of its own; its usage."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"question {number % 3} " * 9}]}
    answer = httpx.post(f"{gateway.url}/s/{session}/v1/chat/completions", json=body, timeout=60)
    usage: dict[str, Any] = answer.raise_for_status().json()["usage"]
    return usage


def test_held_kv_is_counted_from_the_start(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        held = _ledger(gateway)["held"]
        assert (held["bytes"], held["byte_hours"]) == (0, 0)


def test_cli_shows_what_was_saved(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        done = cwg("saved", url=gateway.url)
        assert (done.returncode, done.stdout.split()[:3]) == (0, ["saved", "nothing", "yet"])
        _teach(gateway)
        gateway.chat("s", "hi")
        gateway.freeze("s", "w")
        thawed = cwg("thaw", "w", "--session", "t", url=gateway.url)
        (line,) = [line for line in thawed.stdout.splitlines() if line.startswith("saved")]
        assert "tokens from the cache in" in line
        assert "computing them takes about" in line
        asked = cwg("ask", "w", "What?", url=gateway.url)
        assert "computing them takes about" in asked.stderr
        saved = cwg("saved", "--limit", "3", url=gateway.url).stdout
        for shown in (saved, *(cwg("status", name, url=gateway.url).stdout for name in ("w", "t"))):
            assert "computing them takes about" in shown
        assert [line.split()[0] for line in saved.splitlines() if line][:3] == ["saved", "thaws", "asks"]
        metrics = gateway.http.get("/metrics").text
        thaws = gateway.http.get("/admin/ledger").json()["thaws"]["tokens"]
        assert f'cwg_saved_tokens_total{{source="thaw"}} {thaws:.1f}' in metrics


def test_limit_is_checked(gateway: Gateway) -> None:
    answer: httpx.Response = gateway.http.get("/admin/ledger", params={"limit": "0"})
    assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "limit")


def test_thaw_into_a_session_is_booked_once(engine: FakeEngine, tmp_path: Path) -> None:
    """What it has found, its first turn finds again, however many turns the session had before."""
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat("s", "hi")
        gateway.freeze("s", "w")
        gateway.chat("s", "something else, which is dropped")
        for number in range(2):
            before = _ledger(gateway)["total"]["tokens"]
            body = {"into_session": "s", "at_turn": 1, "warm": "gpu"}
            thawed = gateway.http.post("/admin/windows/w/thaw", json=body).json()
            found = thawed["receipt"]["saved"]["tokens"]
            assert found == thawed["receipt"]["cached_tokens"] > 0
            turn = gateway.chat("s", f"And then? {number}").json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert _ledger(gateway)["total"]["tokens"] - before == max(turn, found)
            again = gateway.chat("s", "And?").json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert _ledger(gateway)["total"]["tokens"] - before == max(turn, found) + again
        (line,) = _ledger(gateway)["windows"]
        assert (line["name"], line["saved"]["requests"]) == ("w", 4)
