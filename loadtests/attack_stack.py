"""What needs the real vLLM and LMCache: freezes beside edits; clients and gateways that vanish in mid-load."""

import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway.stack import local
from loadtests import attack_windows as windows
from loadtests import machine
from loadtests.attack_rig import Gateway, Ground, Trials, Verdict, head, together, verdict, wait_for

TRIALS = Trials(needs_stack=True)
_FREEZES, _DISCONNECTS, _KILLS = 300, 50, 20
_PROMPT_WORDS = 1500
_AT_ONCE = struct.pack("ii", 1, 0)
_PATIENT_S = 300.0


@contextmanager
def _stack(ground: Ground, **settings: object) -> Iterator[tuple[Gateway, local.Parts]]:
    """vLLM, LMCache, and a gateway of ours before them."""
    folder = Path(ground.folder) / "stack"
    with local.running(local.LocalStack(data_dir=folder, max_model_len=8192)) as (plan, parts):
        given: dict[str, Any] = {
            "cache_url": plan.cache_url, "kv_dir": plan.kv_dir, "model_fingerprint": plan.model.fingerprint, **settings,
        }  # fmt: skip
        gateway = ground.idle(plan.engine_url, **given)
        gateway.start(within=_PATIENT_S)
        yield gateway, parts


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(("window", "cache", "token", "river", "stone", "seven", "lamp", "north"), k=count))


@TRIALS.add
def stack_freezes_beside_edits(ground: Ground) -> Verdict:
    """300 freezes beside edits, regenerations and deletions at random moments: no window without its text"""
    chance = random.Random(ground.seed)
    answers, wrong = Counter[int](), list[str]()
    with _stack(ground) as (gateway, _):
        for number in range(_FREEZES):
            status, fault = _freeze_beside(gateway, chance, number)
            answers[status] += 1
            wrong += [fault] if fault else []
        made = [one["name"] for one in windows.listed(gateway)]
        wrong += windows.faults(gateway, chance.sample(made, min(20, len(made))))
    return verdict(not wrong, *(f"NOT {each}" for each in wrong[:8]), f"freezes {dict(answers)}")


def _freeze_beside(gateway: Gateway, chance: random.Random, number: int) -> tuple[int, str]:
    """Freeze a session of two turns while something happens to it; the status, and what is wrong."""
    session, window = f"s{number}", f"w{number}"
    question = f"{number} " + _words(chance, 40)
    first = gateway.chat(session, question, max_tokens=4, timeout=60)
    reply = first.json().get("choices", [{}])[0].get("message", {}).get("content") or "x"
    gateway.chat(session, question, reply, "and more", max_tokens=4, timeout=60)
    delay, kind = chance.uniform(0, 0.12), chance.choice(("edit", "regenerate", "delete"))

    def disturb() -> int:
        time.sleep(delay)
        if kind == "delete":
            return gateway.delete(f"/admin/sessions/{session}").status
        last = "and more" if kind == "regenerate" else "something else"
        return gateway.chat(session, question, reply, last, max_tokens=4, timeout=60).status

    frozen = together(lambda: gateway.freeze(session, window), disturb)[0]
    status = frozen.status if frozen else 0
    if status == 201:
        messages = gateway.get(f"/admin/windows/{window}/messages").json().get("messages", [])
        what = f"{window} ({kind} after {delay * 1000:.0f} ms): {len(messages)} messages"
        return status, what if len(messages) < 2 else ""
    return status, "" if 0 < status < 500 else f"{window}: freeze {status}"


def _thawed(gateway: Gateway, source: str, name: str) -> bytes:
    """A session whose KV lies in the cache and not with the engine, and its next turn as bytes."""
    gateway.post(f"/admin/windows/{source}/clone", {"target_window": name, "isolate": True}, timeout=60)
    gateway.post(f"/admin/windows/{name}/thaw", {"new_session_id": name}, timeout=60)
    body = {"model": "demo", "messages": [{"role": "user", "content": "and on"}], "stream": True, "max_tokens": 30}
    raw = json.dumps(body).encode()
    return head("POST", "/v1/chat/completions", f"x-session-id: {name}", length=len(raw)) + raw


def _prepared(gateway: Gateway, chance: random.Random) -> None:
    gateway.chat("source", _words(chance, _PROMPT_WORDS), max_tokens=4, timeout=_PATIENT_S)
    gateway.freeze("source", "source", timeout=_PATIENT_S)


def _family(parts: local.Parts) -> list[machine.Process]:
    return [*machine.tree(parts.engine.pid), *machine.tree(parts.cache.pid)]


def _same(parts: local.Parts, family: list[machine.Process]) -> bool:
    return len(machine.still_there(family)) == len(family) and parts.engine.pid > 0


@TRIALS.add
def stack_disconnects_in_loads(ground: Ground) -> Verdict:
    """50 clients leave while their KV is being loaded: the engine's processes are the same afterwards"""
    chance = random.Random(ground.seed)
    with _stack(ground) as (gateway, parts):
        _prepared(gateway, chance)
        family, done = _family(parts), 0
        for number in range(_DISCONNECTS):
            request = _thawed(gateway, "source", f"d{number}")
            with gateway.wire() as sock:
                sock.sendall(request)
                time.sleep(chance.uniform(0.005, 0.3))
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            done += 1
            if not _same(parts, family):
                break
            gateway.delete(f"/admin/windows/d{number}")
        return _lives(gateway, parts, family, f"{done} disconnects")


@TRIALS.add
def stack_kills_in_loads(ground: Ground) -> Verdict:
    """The gateway is killed 20 times while KV is being loaded: the engine's processes are the same afterwards"""
    chance = random.Random(ground.seed)
    with _stack(ground) as (gateway, parts):
        _prepared(gateway, chance)
        family, done = _family(parts), 0
        for number in range(_KILLS):
            requests = [_thawed(gateway, "source", f"k{number}-{n}") for n in range(2)]
            socks = [gateway.wire() for _ in requests]
            for sock, request in zip(socks, requests, strict=True):
                sock.sendall(request)
            time.sleep(chance.uniform(0.005, 0.3))
            gateway.kill()
            for sock in socks:
                sock.close()
            done += 1
            if not _same(parts, family):
                break
            gateway.start(within=_PATIENT_S)
        return _lives(gateway, parts, family, f"{done} kills")


def _lives(gateway: Gateway, parts: local.Parts, family: list[machine.Process], figures: str) -> Verdict:
    time.sleep(3)
    same = _same(parts, family)
    if not gateway.alive:
        gateway.start("/healthz", within=60)
    works = wait_for(lambda: gateway.chat("after", "x", max_tokens=2, timeout=60).status == 200, 90)
    return verdict(same and works, figures, f"the same {len(family)} processes: {same}", f"a turn afterwards: {works}")
