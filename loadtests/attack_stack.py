"""Trials with the real vLLM and LMCache: freezes during edits; clients and gateways that die during KV loads."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway.stack import commands, local
from loadtests import attack_windows as windows
from loadtests import machine
from loadtests.attack_harness import Gateway, Testbed, Trials, Verdict, head, run_concurrently, verdict, wait_for
from tests.support import local_stack
from tests.support.raw_http import reset_on_close

TRIALS = Trials(needs_stack=True)
_FREEZES, _DISCONNECTS, _KILLS = 300, 50, 20
_PROMPT_WORDS = 1500
_SLOW_START_S = 300.0


@contextmanager
def _stack(testbed: Testbed, **settings: object) -> Iterator[tuple[Gateway, commands.Processes]]:
    """Start vLLM, LMCache, and a gateway in front of them."""
    folder = Path(testbed.folder) / "stack"
    with local_stack.running(local.LocalStack(data_dir=folder, demo="random", max_model_len=8192)) as (plan, parts):
        options: dict[str, Any] = {
            "cache_url": plan.cache_url, "kv_dir": plan.kv_dir, "model_fingerprint": plan.model.fingerprint, **settings,
        }  # fmt: skip
        gateway = testbed.unstarted_gateway(plan.engine_url, **options)
        gateway.start(within=_SLOW_START_S)
        yield gateway, parts


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(("window", "cache", "token", "river", "stone", "seven", "lamp", "north"), k=count))


@TRIALS.add
def stack_freezes_during_edits(testbed: Testbed) -> Verdict:
    """300 freezes during edits, regenerations and deletions at random moments: no window lacks its text"""
    rng = random.Random(testbed.seed)
    answers, failures = Counter[int](), list[str]()
    with _stack(testbed) as (gateway, _):
        for number in range(_FREEZES):
            status, fault = _freeze_during_change(gateway, rng, number)
            answers[status] += 1
            failures += [fault] if fault else []
        made = [window["name"] for window in windows.list_windows(gateway)]
        failures += windows.find_faults(gateway, rng.sample(made, min(20, len(made))))
    return verdict(not failures, *(f"NOT {failure}" for failure in failures[:8]), f"freezes {dict(answers)}")


def _freeze_during_change(gateway: Gateway, rng: random.Random, number: int) -> tuple[int, str]:
    """Freeze a session of two turns while something happens to it; return the status, and a fault or ""."""
    session, window = f"s{number}", f"w{number}"
    question = f"{number} " + _words(rng, 40)
    first = gateway.chat(session, question, max_tokens=4, timeout=60)
    reply = first.json().get("choices", [{}])[0].get("message", {}).get("content") or "x"
    gateway.chat(session, question, reply, "and more", max_tokens=4, timeout=60)
    delay, kind = rng.uniform(0, 0.12), rng.choice(("edit", "regenerate", "delete"))

    def disturb() -> int:
        time.sleep(delay)
        if kind == "delete":
            return gateway.delete(f"/admin/sessions/{session}").status
        last = "and more" if kind == "regenerate" else "something else"
        return gateway.chat(session, question, reply, last, max_tokens=4, timeout=60).status

    frozen = run_concurrently(lambda: gateway.freeze(session, window), disturb)[0]
    status = frozen.status if frozen else 0
    if status == 201:
        messages = gateway.get(f"/admin/windows/{window}/messages").json().get("messages", [])
        what = f"{window} ({kind} after {delay * 1000:.0f} ms): {len(messages)} messages"
        return status, what if len(messages) < 2 else ""
    return status, "" if 0 < status < 500 else f"{window}: freeze {status}"


def _request_of_thawed_session(gateway: Gateway, source: str, name: str) -> bytes:
    """Create a session whose KV is in the cache and not in the engine; return its next request as bytes."""
    gateway.post(f"/admin/windows/{source}/clone", {"target_window": name, "isolate": True}, timeout=60)
    gateway.post(f"/admin/windows/{name}/thaw", {"new_session_id": name}, timeout=60)
    body = {"model": "demo", "messages": [{"role": "user", "content": "and on"}], "stream": True, "max_tokens": 30}
    raw = json.dumps(body).encode()
    return head("POST", "/v1/chat/completions", f"x-session-id: {name}", length=len(raw)) + raw


def _freeze_source(gateway: Gateway, rng: random.Random) -> None:
    gateway.chat("source", _words(rng, _PROMPT_WORDS), max_tokens=4, timeout=_SLOW_START_S)
    gateway.freeze("source", "source", timeout=_SLOW_START_S)


def _stack_processes(parts: commands.Processes) -> list[machine.Process]:
    return [*machine.tree(parts.engine.pid), *machine.tree(parts.cache.pid)]


def _all_running(parts: commands.Processes, processes: list[machine.Process]) -> bool:
    return len(machine.still_running(processes)) == len(processes) and parts.engine.pid > 0


@TRIALS.add
def stack_disconnects_during_loads(testbed: Testbed) -> Verdict:
    """50 clients disconnect while their KV is being loaded: the engine's processes are the same afterwards"""
    rng = random.Random(testbed.seed)
    with _stack(testbed) as (gateway, parts):
        _freeze_source(gateway, rng)
        processes, count = _stack_processes(parts), 0
        for number in range(_DISCONNECTS):
            request = _request_of_thawed_session(gateway, "source", f"d{number}")
            with gateway.connect() as sock:
                sock.sendall(request)
                time.sleep(rng.uniform(0.005, 0.3))
                if number % 2:
                    reset_on_close(sock)
            count += 1
            if not _all_running(parts, processes):
                break
            gateway.delete(f"/admin/windows/d{number}")
        return _verdict_after(gateway, parts, processes, f"{count} disconnects")


@TRIALS.add
def stack_kills_during_loads(testbed: Testbed) -> Verdict:
    """The gateway is killed 20 times while KV is being loaded: the engine's processes are the same afterwards"""
    rng = random.Random(testbed.seed)
    with _stack(testbed) as (gateway, parts):
        _freeze_source(gateway, rng)
        processes, count = _stack_processes(parts), 0
        for number in range(_KILLS):
            requests = [_request_of_thawed_session(gateway, "source", f"k{number}-{n}") for n in range(2)]
            socks = [gateway.connect() for _ in requests]
            for sock, request in zip(socks, requests, strict=True):
                sock.sendall(request)
            time.sleep(rng.uniform(0.005, 0.3))
            gateway.kill()
            for sock in socks:
                sock.close()
            count += 1
            if not _all_running(parts, processes):
                break
            gateway.start(within=_SLOW_START_S)
        return _verdict_after(gateway, parts, processes, f"{count} kills")


def _verdict_after(
    gateway: Gateway, parts: commands.Processes, processes: list[machine.Process], figures: str
) -> Verdict:
    time.sleep(3)
    unchanged = _all_running(parts, processes)
    if not gateway.alive:
        gateway.start("/healthz", within=60)
    works = wait_for(lambda: gateway.chat("after", "x", max_tokens=2, timeout=60).status == 200, 90)
    return verdict(
        unchanged and works, figures, f"the same {len(processes)} processes: {unchanged}", f"a turn afterwards: {works}"
    )
