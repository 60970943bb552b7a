"""Dependencies that hang, fail or corrupt data, and a stall of the gateway that must not be blamed on them."""

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
from loadtests.attack_engine import ROOT_MODEL, StoringEngine, start_storing_stack
from loadtests.attack_harness import (
    Gateway,
    Reply,
    Testbed,
    Trials,
    Verdict,
    check_all,
    run_concurrently,
    verdict,
    wait_for,
)
from tests.support.fakes.engine import Exchange
from tests.support.harness import CHUNK, cache_server
from tests.support.tier_harness import RedisServer

TRIALS = Trials()
_TEXT = "a conversation of some length, so that it fills a few chunks "
_SOON_S = 3.0


@TRIALS.add
def gateway_stall(testbed: Testbed) -> Verdict:
    """After the gateway itself was stopped for 4 s, the next turn is answered: the engine is not blamed"""
    engine = testbed.engine()
    gateway = testbed.gateway(engine.url, engine_check_s=0.2, connect_timeout_s=1)
    probed = threading.Event()

    def slowly(exchange: Exchange) -> None:
        probed.set()
        time.sleep(0.3)
        exchange.json({})

    engine.on_health = slowly
    for _ in range(4):  # each time during a health check of the engine
        probed.clear()
        probed.wait(5)
        os.kill(gateway.process.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(gateway.process.pid, signal.SIGCONT)
    statuses = [gateway.chat(f"s{n}", "x").status for n in range(4)]
    ejected = "ejected" in gateway.log
    return verdict(
        statuses == [200] * 4 and not ejected, f"turns right afterwards: {statuses}, engine ejected: {ejected}"
    )


class _BothTiers(StoringEngine):
    """A storing engine that writes to Redis as well."""

    redis: "redis.Redis"

    def _store(self, ids: list[int], salt: str | None) -> None:
        super()._store(ids, salt)
        for key in object_keys(ROOT_MODEL, ids, CHUNK, 1, salt) if salt else ():
            try:
                self.redis.set(str(key), str(key).encode() * 4)
            except redis.RedisError:
                return


def _with_redis(testbed: Testbed) -> tuple[_BothTiers, Gateway, RedisServer]:
    kv = testbed.folder / "kv"
    kv.mkdir()
    server = RedisServer(testbed.folder).start()
    testbed.enter_context(_StopOnExit(server))
    engine = _BothTiers(kv)
    engine.redis = redis.Redis(port=server.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
    testbed.engine(engine)
    gateway = testbed.gateway(
        engine.url, cache_url=testbed.enter_context(cache_server()), kv_dir=kv,
        kv_redis_url=f"redis://127.0.0.1:{server.port}", freeze_timeout_s=5,
    )  # fmt: skip
    return engine, gateway, server


class _StopOnExit:
    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def __enter__(self) -> None:
        """Do nothing: the server runs already."""

    def __exit__(self, *_: object) -> None:
        self._server.process.send_signal(signal.SIGCONT)
        self._server.stop()


def _timed(operation: Callable[[], Reply]) -> tuple[int, float]:
    began = time.monotonic()
    status = operation().status
    return status, time.monotonic() - began


@TRIALS.add
def hanging_redis(testbed: Testbed) -> Verdict:
    """While Redis hangs (SIGSTOP), operations pay for it once, then take at most 3 s; none waits for a deletion"""
    _, gateway, server = _with_redis(testbed)
    for name in ("a", "b", "c", "d"):
        gateway.chat(name, name + _TEXT * 2)
        gateway.freeze(name, f"w-{name}")
    tiers = gateway.get("/admin/windows/w-a").json().get("kv_cache", {}).get("tiers", {})
    server.process.send_signal(signal.SIGSTOP)
    first = _timed(lambda: gateway.get("/admin/windows/w-a", timeout=60))
    operations: dict[str, Callable[[], Reply]] = {
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
    took = {name: _timed(operation) for name, operation in operations.items()}
    both = run_concurrently(
        lambda: _timed(lambda: gateway.delete("/admin/windows/w-d", timeout=60)),
        lambda: (
            time.sleep(0.1),
            _timed(lambda: gateway.post("/admin/windows/w-c/clone", {"target_window": "concurrent"})),
        )[1],
    )
    server.process.send_signal(signal.SIGCONT)
    recovered = wait_for(lambda: gateway.post("/admin/windows/w-a/verify").json().get("ok") is True, 45)
    checks = {
        f"{name} {status} in {seconds:.1f} s": seconds < _SOON_S and status < 500
        for name, (status, seconds) in took.items()
    }
    clone = both[1] or (0, 60.0)
    checks[f"a clone during a deletion in {clone[1]:.1f} s"] = clone[1] < _SOON_S
    checks["complete again once Redis continues"] = recovered
    return check_all(
        checks, f"first {first[1]:.1f} s, tiers {sorted(tiers)}, longest {max(s for _, s in took.values()):.1f} s"
    )


@TRIALS.add
def dead_redis(testbed: Testbed) -> Verdict:
    """With Redis killed every operation works from the disk, with a warning"""
    _, gateway, server = _with_redis(testbed)
    gateway.chat("a", _TEXT * 2)
    gateway.freeze("a", "w")
    server.process.kill()
    failures = [fault for fault in windows.find_faults(gateway, ["w"]) if "verify" not in fault]
    frozen = _timed(lambda: gateway.freeze("a", "v"))
    return verdict(
        not failures and frozen[0] == 201 and frozen[1] < 15, *failures, f"freeze {frozen[0]} in {frozen[1]:.1f} s"
    )


@TRIALS.add
def objects_truncated_during_read(testbed: Testbed) -> Verdict:
    """A KV object truncated while it is checked is reported corrupt, and crashes nothing (SIGBUS)"""
    engine, gateway = start_storing_stack(testbed)
    size = engine.object_size = 48 * 2**20
    gateway.chat("a", _TEXT * 2)
    gateway.freeze("a", "w")
    pins = list((testbed.folder / "kv-pins").rglob("*.data"))
    statuses: list[int] = []

    def truncate(after_s: float) -> None:
        time.sleep(after_s)
        for file in pins:
            os.truncate(file, 4096)

    for after_s in (0.02, 0.04, 0.06, 0.1, 0.15, 0.2):
        run_concurrently(
            lambda: statuses.append(gateway.post("/admin/windows/w/verify", timeout=60).status),
            partial(truncate, after_s),
        )
        if not gateway.alive:
            break
        for file in pins:
            os.truncate(file, size)
    code = gateway.process.poll()
    figures = f"exit code {code}" if code is not None else f"{len(pins)} objects of {size >> 20} MB"
    return verdict(gateway.alive and bool(pins), f"verify {statuses}", figures)


@TRIALS.add
def engine_restart(testbed: Testbed) -> Verdict:
    """An engine restarts during streams: each stream ends, and turns work within 10 s of its return"""
    engine = testbed.engine()
    gateway = testbed.gateway(engine.url, engine_check_s=0.5)
    restarts = []
    for _ in range(3):
        streams = [lambda n=n: gateway.chat(f"s{n}", "x", stream=True, timeout=10).status for n in range(8)]
        run_concurrently(*streams, engine.drop_connections, within=15)
        engine.stop()
        down = gateway.chat("down", "x", timeout=10).status
        engine.start()
        began = time.monotonic()
        back = wait_for(lambda: gateway.chat("back", "x", timeout=5).status == 200, 15)
        restarts.append((down, round(time.monotonic() - began, 1) if back else None))
    return verdict(all(down in (502, 503) and took is not None and took < 10 for down, took in restarts), restarts)


@TRIALS.add
def unowned_kv(testbed: Testbed) -> Verdict:
    """KV of a batch, with a session id and without, has an owner, and goes with its session"""
    engine, gateway = start_storing_stack(testbed, sweep_every_s=0.5)
    kv = testbed.folder / "kv"

    def batch(exchange: Exchange) -> None:
        for conversation in exchange.request.json["messages"]:
            engine.store_prompt({**exchange.request.json, "messages": conversation})
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

    owned = wait_for(lambda: not unknown(), 5)  # the owner may be recorded a moment later
    unowned = unknown()
    gateway.delete("/admin/sessions/s")
    gone = wait_for(lambda: len(_stored(kv) - before) <= stored // 2, 10)
    return verdict(owned and gone and stored > 0, f"{stored} objects, {unowned} unowned, the session's removed: {gone}")


def _stored(kv: Path) -> set[str]:
    return {file.name for file in kv.glob("*.data")}


def _tiers(value: object) -> list[dict[str, Any]]:
    """Find the tiers in an answer: the objects that count unknown KV."""
    if isinstance(value, list):
        return [tier for item in value for tier in _tiers(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if isinstance(value.get("unknown"), dict) else []
    return own + [tier for item in value.values() for tier in _tiers(item)]
