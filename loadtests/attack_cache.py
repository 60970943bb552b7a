"""An LMCache whose answers are slow, huge or garbage."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtests.attack_harness import Testbed, Trials, Verdict, check_all, measure
from tests.support.fakes.lmcache import CHUNK, FakeLMCache

TRIALS = Trials()
_TEXT = "a conversation of some length, so that it fills a few chunks "
_LONGEST_PAUSE_MS = 100.0
_BOUND = 4 * 2**20  # of what is read of the metrics
_SLOW_S = 6.0


class _LyingCache(FakeLMCache):
    """Answers for its metrics, or for anything else, what the trial tells it to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metrics: str | None = None
        self.everything: str | None = None
        self.delay_s = 0.0

    def answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, Any] | str]:
        """See FakeLMCache."""
        return super().answer(method, path, body) if self.everything is None else (200, self.everything)

    def _metrics(self) -> str:
        time.sleep(self.delay_s)
        return super()._metrics() if self.metrics is None else self.metrics


def _lies(salt: str) -> dict[str, str]:
    """Metrics of up to the bound: those of one salt and of a great many, and what are none."""
    process = "process_start_time_seconds 1.7e+09\n"
    line = f'lmcache_mp_l1_evicted_chunks_total{{cache_salt="{salt}"}}'
    label = f'cache_salt="{salt}" '
    return {
        "nothing": "",
        "many lines": process + f"{line} 1.0\n" * ((_BOUND - 100) // (len(line) + 5)),
        "one line": process + label * ((_BOUND - 100) // len(label)),
        "other salts": process + 'lmcache_mp_l1_write_chunks_total{cache_salt="x"} 1\n' * 70_000,
        "line breaks": process + "\n" * (_BOUND - 100),
        "past the bound": "x" * (8 * 2**20),
        "no numbers": f"{process}{line} Inf\n{line} NaN\n{line}\n",
        "not ASCII": "\u2028\x00\ufffd" * 1000,
    }


def _window(testbed: Testbed, cache: _LyingCache) -> tuple[Any, str]:
    engine = testbed.engine()
    cache.behind(engine)
    gateway = testbed.gateway(engine.url, cache_url=cache.url, kv_dir=cache.folder, chunk_size=CHUNK)
    gateway.chat("s", _TEXT * 4)
    gateway.freeze("s", "w")
    salt = gateway.post("/admin/windows/w/thaw").json().get("cache_salt", "")
    return gateway, salt


@TRIALS.add
def cache_metrics_that_lie(testbed: Testbed) -> Verdict:
    """LMCache's metrics, slow, huge or garbage, hold up nobody and tell nothing false"""
    with _started(testbed) as cache:
        gateway, salt = _window(testbed, cache)
        checks = {"the window has KV": gateway.get("/admin/windows/w").json().get("kv") == "complete"}
        pauses = []
        for name, lie in _lies(salt).items():
            cache.metrics, cache.delay_s = None, 0.0
            gateway.post("/admin/windows/w/prefetch")
            known = gateway.get("/admin/windows/w").json()["kv_cache"]["tiers"]
            checks[f"{name}: it is known to be in memory before"] = "cpu" in known
            cache.metrics = lie
            impact = measure(gateway, lambda: gateway.get("/admin/windows/w").status, len(lie))
            pauses.append(impact.pause_ms)
            checks[f"{name}: 200, not {impact.answer}"] = impact.answer == "200"
            checks[f"{name}: {impact.pause_ms:.0f} ms"] = impact.pause_ms <= _LONGEST_PAUSE_MS
            tiers = gateway.get("/admin/windows/w").json()["kv_cache"]["tiers"]
            checks[f"{name}: nothing is said of memory"] = "cpu" not in tiers
        cache.metrics, cache.delay_s = None, _SLOW_S
        began = time.monotonic()
        checks["slow: 200"] = gateway.get("/admin/windows/w").status == 200
        checks[f"slow: {time.monotonic() - began:.1f} s"] = time.monotonic() - began < _SLOW_S
        checks["no traceback"] = "Traceback" not in gateway.log
        return check_all(checks, f"the longest pause was {max(pauses):.0f} ms")


@TRIALS.add
def not_lmcache(testbed: Testbed) -> Verdict:
    """Something else than LMCache at cache_url is said to be that, everywhere, and windows keep their text"""
    with _started(testbed) as cache:
        gateway, _ = _window(testbed, cache)
        checks = {}
        for name, answer in {"HTML": "<html>", "a list": "[]", "null": "null", "an object": '{"a": 1}'}.items():
            cache.everything = answer
            health = gateway.get("/admin/health?component=cache").json()["components"]["cache"]
            checks[f"{name}: unhealthy, not {health}"] = health["status"] == "unhealthy"
            checks[f"{name}: the cache is shown"] = gateway.get("/admin/cache").status == 200
            checks[f"{name}: a freeze"] = gateway.freeze("s", f"w-{len(checks)}").status == 201
            for verb in ("thaw", "prefetch", "evict"):
                status = gateway.post(f"/admin/windows/w/{verb}").status
                checks[f"{name}: {verb} {status}"] = status in (200, 503)
            doctor = gateway.post("/admin/doctor").json()["checks"]
            checks[f"{name}: the doctor sees it"] = any(
                c["name"] == "cache" and c["status"] == "failed" for c in doctor
            )
        checks["no traceback"] = "Traceback" not in gateway.log
        return check_all(checks)


@contextmanager
def _started(testbed: Testbed) -> Iterator[_LyingCache]:
    cache = _LyingCache(testbed.folder / "kv")
    cache.start()
    try:
        yield cache
    finally:
        cache.stop()
