"""Neighbours that hang, stall or lie, and a stall of our own that is nobody's fault but ours."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway.kv.keys import object_keys
from loadtests import attack_windows as windows
from loadtests.attack_engine import ROOT_MODEL, StoringEngine, harness
from loadtests.attack_rig import Gateway, Ground, Reply, Trials, Verdict, first_false, together, verdict, wait_for
from tests.support.fakes.engine import Exchange
from tests.support.harness import CHUNK, cache_server
from tests.support.tier_harness import RedisServer

TRIALS = Trials()
_TEXT = "a conversation of some length, so that it fills a few chunks "
_SOON_S = 3.0


@TRIALS.add
def stall_of_ours(ground: Ground) -> Verdict:
    """After the gateway itself stood still for 4 s, the next turn is answered: the engine is not blamed"""
    engine = ground.engine()
    gateway = ground.gateway(engine.url, engine_check_s=0.2, connect_timeout_s=1)
    looked = threading.Event()

    def slowly(exchange: Exchange) -> None:
        looked.set()
        time.sleep(0.3)
        exchange.json({})

    engine.on_health = slowly
    for _ in range(4):  # each time in the middle of a look at the engine's health
        looked.clear()
        looked.wait(5)
        os.kill(gateway.process.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(gateway.process.pid, signal.SIGCONT)
    seen = [gateway.chat(f"s{n}", "x").status for n in range(4)]
    ejected = "ejected" in gateway.log
    return verdict(seen == [200] * 4 and not ejected, f"turns right after it: {seen}, engine ejected: {ejected}")


class _BothTiers(StoringEngine):
    """Stores into Redis as well."""

    redis: "redis.Redis"

    def _store(self, ids: list[int], salt: str | None) -> None:
        super()._store(ids, salt)
        for key in object_keys(ROOT_MODEL, ids, CHUNK, 1, salt) if salt else ():
            try:
                self.redis.set(str(key), str(key).encode() * 4)
            except redis.RedisError:
                return


def _with_redis(ground: Ground) -> tuple[_BothTiers, Gateway, RedisServer]:
    kv = ground.folder / "kv"
    kv.mkdir()
    server = RedisServer(ground.folder).start()
    ground.enter(_Stopping(server))
    engine = _BothTiers(kv)
    engine.redis = redis.Redis(port=server.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
    ground.engine(engine)
    gateway = ground.gateway(
        engine.url, cache_url=ground.enter(cache_server()), kv_dir=kv, kv_redis_url=f"redis://127.0.0.1:{server.port}",
        freeze_timeout_s=5,
    )  # fmt: skip
    return engine, gateway, server


class _Stopping:
    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def __enter__(self) -> None:
        """It runs already."""

    def __exit__(self, *_: object) -> None:
        self._server.process.send_signal(signal.SIGCONT)
        self._server.stop()


def _timed(deed: Callable[[], Reply]) -> tuple[int, float]:
    began = time.monotonic()
    status = deed().status
    return status, time.monotonic() - began


@TRIALS.add
def redis_that_hangs(ground: Ground) -> Verdict:
    """While Redis hangs (SIGSTOP), verbs pay for it once and then take at most 3 s; nobody waits for a deletion"""
    _, gateway, server = _with_redis(ground)
    for name in ("a", "b", "c", "d"):
        gateway.chat(name, name + _TEXT * 2)
        gateway.freeze(name, f"w-{name}")
    whole = gateway.get("/admin/windows/w-a").json().get("kv_cache", {}).get("tiers", {})
    server.process.send_signal(signal.SIGSTOP)
    first = _timed(lambda: gateway.get("/admin/windows/w-a", timeout=60))
    deeds: dict[str, Callable[[], Reply]] = {
        "status": lambda: gateway.get("/admin/windows/w-a", timeout=60),
        "verify": lambda: gateway.post("/admin/windows/w-a/verify", timeout=60),
        "cache": lambda: gateway.get("/admin/cache", timeout=60),
        "health": lambda: gateway.get("/admin/health", timeout=60),
        "freeze": lambda: gateway.freeze("a", "again"),
        "thaw": lambda: gateway.post("/admin/windows/w-c/thaw", timeout=60),
        "clone": lambda: gateway.post("/admin/windows/w-c/clone", {"target_window": "cloned"}, timeout=60),
        "delete": lambda: gateway.delete("/admin/windows/w-b", timeout=60),
        "turn": lambda: gateway.chat("e", "x"),
    }
    took = {name: _timed(deed) for name, deed in deeds.items()}
    both = together(
        lambda: _timed(lambda: gateway.delete("/admin/windows/w-d", timeout=60)),
        lambda: (
            time.sleep(0.1),
            _timed(lambda: gateway.post("/admin/windows/w-c/clone", {"target_window": "beside"})),
        )[1],
    )
    server.process.send_signal(signal.SIGCONT)
    back = wait_for(lambda: gateway.post("/admin/windows/w-a/verify").json().get("ok") is True, 45)
    checks = {
        f"{name} {status} in {seconds:.1f} s": seconds < _SOON_S and status < 500
        for name, (status, seconds) in took.items()
    }
    beside = both[1] or (0, 60.0)
    checks[f"a clone beside a deletion in {beside[1]:.1f} s"] = beside[1] < _SOON_S
    checks["well again when Redis goes on"] = back
    return first_false(
        checks, f"first {first[1]:.1f} s, tiers {sorted(whole)}, longest {max(s for _, s in took.values()):.1f} s"
    )


@TRIALS.add
def redis_that_is_dead(ground: Ground) -> Verdict:
    """With Redis killed every verb works from the disk, with a warning"""
    _, gateway, server = _with_redis(ground)
    gateway.chat("a", _TEXT * 2)
    gateway.freeze("a", "w")
    server.process.kill()
    wrong = [fault for fault in windows.faults(gateway, ["w"]) if "verify" not in fault]
    frozen = _timed(lambda: gateway.freeze("a", "v"))
    return verdict(
        not wrong and frozen[0] == 201 and frozen[1] < 15, *wrong, f"freeze {frozen[0]} in {frozen[1]:.1f} s"
    )


@TRIALS.add
def objects_cut_while_read(ground: Ground) -> Verdict:
    """A KV object that is cut while it is checked is corrupt, and kills nobody (SIGBUS)"""
    engine, gateway = harness(ground)
    size = engine.object_size = 48 * 2**20
    gateway.chat("a", _TEXT * 2)
    gateway.freeze("a", "w")
    pins = list((ground.folder / "kv-pins").rglob("*.data"))
    seen: list[int] = []

    def cut(after_s: float) -> None:
        time.sleep(after_s)
        for file in pins:
            os.truncate(file, 4096)

    for after_s in (0.02, 0.04, 0.06, 0.1, 0.15, 0.2):
        together(lambda: seen.append(gateway.post("/admin/windows/w/verify", timeout=60).status), partial(cut, after_s))
        if not gateway.alive:
            break
        for file in pins:
            os.truncate(file, size)
    code = gateway.process.poll()
    figures = f"exit code {code}" if code is not None else f"{len(pins)} objects of {size >> 20} MB"
    return verdict(gateway.alive and bool(pins), f"verify {seen}", figures)


@TRIALS.add
def engine_that_restarts(ground: Ground) -> Verdict:
    """An engine that restarts in the middle of streams: each ends, and turns work within 10 s of its return"""
    engine = ground.engine()
    gateway = ground.gateway(engine.url, engine_check_s=0.5)
    seen = []
    for _ in range(3):
        streams = [lambda n=n: gateway.chat(f"s{n}", "x", stream=True, timeout=10).status for n in range(8)]
        together(*streams, engine.drop_connections, within=15)
        engine.stop()
        down = gateway.chat("down", "x", timeout=10).status
        engine.start()
        began = time.monotonic()
        back = wait_for(lambda: gateway.chat("back", "x", timeout=5).status == 200, 15)
        seen.append((down, round(time.monotonic() - began, 1) if back else None))
    return verdict(all(down in (502, 503) and took is not None and took < 10 for down, took in seen), seen)


@TRIALS.add
def kv_of_nobody(ground: Ground) -> Verdict:
    """KV of a batch, with an id and without, belongs to somebody, and goes with its session"""
    engine, gateway = harness(ground, sweep_every_s=0.5)
    kv = ground.folder / "kv"

    def batch(exchange: Exchange) -> None:
        for conversation in exchange.request.json["messages"]:
            engine.keep({**exchange.request.json, "messages": conversation})
        exchange.json({"choices": []})

    engine.on_other = batch
    gateway.chat("s", "x")
    before = _stored(kv)
    for number in range(4):
        body = {"model": "demo", "messages": [[{"role": "user", "content": f"{number} {_TEXT}"}]]}
        gateway.post("/v1/chat/completions/batch", body, {"x-session-id": "s"} if number % 2 else {})
    stored = len(_stored(kv) - before)

    def unknown() -> int:
        return sum(tier["unknown"]["objects"] for tier in _tiers(gateway.get("/admin/cache").json()))

    known = wait_for(lambda: not unknown(), 5)  # whose it is may be written down a moment later
    left = unknown()
    gateway.delete("/admin/sessions/s")
    gone = wait_for(lambda: len(_stored(kv) - before) <= stored // 2, 10)
    return verdict(known and gone and stored > 0, f"{stored} objects, {left} of nobody, the session's gone: {gone}")


def _stored(kv: Path) -> set[str]:
    return {file.name for file in kv.glob("*.data")}


def _tiers(value: object) -> list[dict[str, Any]]:
    """Whatever in an answer counts objects of nobody."""
    if isinstance(value, list):
        return [found for each in value for found in _tiers(each)]
    if not isinstance(value, dict):
        return []
    own = [value] if isinstance(value.get("unknown"), dict) else []
    return own + [found for each in value.values() for found in _tiers(each)]
