"""KV that a request leaves without a finished turn: it is not shared, and is deleted when no session needs it."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.tier_harness import DiskTierHarness, key, value

PASSING = [
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ("/v1/score", {"text_1": "x", "text_2": "y"}),
    ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "x"}]]}),
]
OBJECTS = 3


class Kept:
    """A gateway over a disk tier, which a test fills as LMCache does."""

    def __init__(self, gateway: Gateway, disk: DiskTierHarness, engine: FakeEngine) -> None:
        self.gateway = gateway
        self.disk = disk
        self._engine = engine

    def land(self, salt: str) -> None:
        """LMCache has written objects under a salt."""
        for number in range(OBJECTS):
            self.disk.put(key(number, salt=salt), value(100))

    def objects(self, owner: str) -> int:
        """Objects in the tier that are of a kind of owner."""
        seen = self.gateway.http.get("/admin/cache").json()["tiers"]["disk"]
        return int(seen[owner]["objects"])

    def salt(self, path: str) -> str:
        """The salt of the last request to the engine."""
        return str(self._engine.seen(path)[-1].json["cache_salt"])


@pytest.fixture
def kept(tmp_path: Path, engine: FakeEngine) -> Iterator[Kept]:
    """One that sweeps only when it is told to, by starting again."""
    disk = DiskTierHarness(tmp_path)
    with gateway_in_front_of(engine.url, tmp_path, kv_dir=disk.kv, sweep_every_s=3600) as gateway:
        yield Kept(gateway, disk, engine)


@pytest.fixture
def sweeping(tmp_path: Path, engine: FakeEngine) -> Iterator[Kept]:
    disk = DiskTierHarness(tmp_path)
    with gateway_in_front_of(engine.url, tmp_path, kv_dir=disk.kv, sweep_every_s=0.2, workers=2) as gateway:
        yield Kept(gateway, disk, engine)


def answered(engine: FakeEngine) -> None:
    """Whatever else it is asked, it answers."""
    engine.on_other = lambda exchange: exchange.json({"data": []})


@pytest.mark.parametrize(("path", "body"), PASSING)
def test_two_requests_without_a_session_never_share_a_salt(
    engine: FakeEngine, gateway: Gateway, path: str, body: dict[str, Any]
) -> None:
    answered(engine)
    for more in ({}, {}, {"user": "a"}, {"user": "a"}, {"cache_salt": "mine"}, {"cache_salt": "mine"}):
        assert gateway.http.post(path, json={"model": MODEL, **body, **more}).status_code == 200
    salts = {request.json["cache_salt"] for request in engine.seen(path)}
    assert len(salts) == 6


@pytest.mark.parametrize(("path", "body"), PASSING[-1:])
def test_a_session_shares_what_passes_through_with_its_own_turns(
    engine: FakeEngine, gateway: Gateway, session: str, path: str, body: dict[str, Any]
) -> None:
    answered(engine)
    headers = {"x-session-id": session}
    gateway.chat(session)
    gateway.http.post(path, json={"model": MODEL, **body}, headers=headers)
    assert engine.seen(path)[-1].json["cache_salt"] == engine.seen("/v1/chat/completions")[-1].json["cache_salt"]


@pytest.mark.parametrize("named", [False, True], ids=["nobody", "a-new-session"])
@pytest.mark.parametrize(("path", "body"), PASSING)
def test_kv_of_what_passes_through_goes_at_a_sweep(
    engine: FakeEngine, sweeping: Kept, session: str, path: str, body: dict[str, Any], named: bool
) -> None:
    answered(engine)
    headers = {"x-session-id": session} if named else {}
    sweeping.gateway.http.post(path, json={"model": MODEL, **body}, headers=headers)
    sweeping.land(sweeping.salt(path))
    eventually(lambda: not list(sweeping.disk.kv.iterdir()), "it is gone", more=lambda: sweeping.gateway.log)


def test_kv_of_what_passes_through_stays_while_it_is_made(engine: FakeEngine, sweeping: Kept, session: str) -> None:
    path, body = PASSING[0]
    release = threading.Event()
    engine.on_other = lambda exchange: (release.wait(WITHIN), exchange.json({"data": []}))[1]
    asking = threading.Thread(
        target=sweeping.gateway.http.post, args=(path,), kwargs={"json": {"model": MODEL, **body}}
    )
    asking.start()
    eventually(lambda: bool(engine.seen(path)), "the engine is asked")
    sweeping.land(sweeping.salt(path))
    eventually(lambda: sweeping.objects("forgotten") == OBJECTS, "it is known whose it is")
    # A sweep takes what is another's, and this is still there: it was looked at, too.
    sweeping.gateway.chat(session)
    other = sweeping.salt("/v1/chat/completions")
    for number in range(10, 10 + OBJECTS):
        sweeping.disk.put(key(number, salt=other), value(100))
    sweeping.gateway.http.delete(f"/admin/sessions/{session}")
    sweeping.disk.put(key(20, salt=other), value(100))
    eventually(lambda: sweeping.disk.live(key(20, salt=other)) is None, "a sweep was here")
    assert sweeping.objects("forgotten") == OBJECTS
    release.set()
    asking.join()
    eventually(lambda: not list(sweeping.disk.kv.iterdir()), "it is gone")


def test_kv_of_a_known_session_under_another_salt_goes_with_the_session(
    engine: FakeEngine, kept: Kept, session: str
) -> None:
    answered(engine)
    kept.gateway.chat(session)
    path, body = PASSING[-1]
    kept.gateway.turns(session)
    sent = {"model": MODEL, "cache_salt": "mine", **body}
    kept.gateway.http.post(path, json=sent, headers={"x-session-id": session})
    kept.land(kept.salt(path))
    eventually(lambda: kept.objects("sessions") == OBJECTS, "it is the session's")
    assert kept.gateway.http.delete(f"/admin/sessions/{session}").json()["blocks_deleted"] == OBJECTS


@pytest.mark.parametrize("named", [False, True], ids=["no-id", "id"])
def test_the_salt_of_a_first_turn_is_noted_early_and_swept_after_a_kill(
    engine: FakeEngine, kept: Kept, tmp_path: Path, session: str, named: bool
) -> None:
    def hang(exchange: Exchange) -> None:
        exchange.begin()
        exchange.gone()

    engine.on_chat = hang
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": session}]}
    headers = {"x-session-id": session} if named else {}
    path = "/v1/chat/completions"
    with kept.gateway.http.stream("POST", path, json=body, headers=headers):
        kept.land(kept.salt(path))
        eventually(lambda: kept.objects("unknown") == 0, "it is known whose it is")
        assert kept.objects("forgotten") == OBJECTS
        kept.gateway.process.send_signal(signal.SIGKILL)
        kept.gateway.process.wait()
    kept.gateway.start().wait()
    assert (kept.objects("unknown"), kept.objects("forgotten")) == (0, OBJECTS)
    kept.gateway.stop()
    with gateway_in_front_of(engine.url, tmp_path, kv_dir=kept.disk.kv, sweep_every_s=0.1) as again:
        eventually(lambda: not list(kept.disk.kv.iterdir()), "it is gone", more=lambda: again.log)


def test_a_turn_that_is_recorded_keeps_its_kv(engine: FakeEngine, sweeping: Kept, session: str) -> None:
    release = threading.Event()
    engine.on_chat = lambda exchange: (release.wait(WITHIN), engine.answer_chat(exchange))[1]
    asking = threading.Thread(target=sweeping.gateway.chat, args=(session,))
    asking.start()
    eventually(lambda: bool(engine.seen("/v1/chat/completions")), "the engine is asked")
    sweeping.land(sweeping.salt("/v1/chat/completions"))
    eventually(lambda: sweeping.objects("forgotten") == OBJECTS, "the salt is noted")
    release.set()
    asking.join()
    sweeping.gateway.turns(session)
    eventually(lambda: sweeping.objects("sessions") == OBJECTS, "it is the session's")
    assert (sweeping.objects("forgotten"), sweeping.objects("unknown")) == (0, 0)
