"""Processes that are killed, stopped or signalled at any moment, and what is left when they are back."""

import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field

from loadtests import attack_windows as windows
from loadtests.attack_engine import harness, pinned
from loadtests.attack_http import Endless
from loadtests.attack_rig import (
    Gateway,
    Ground,
    Trials,
    Verdict,
    first_false,
    head,
    read_reply,
    together,
    verdict,
    wait_for,
)

TRIALS = Trials()
_TEXT = "a conversation of some length, so that it fills a few chunks "
_KILLS = 6


@dataclass
class Ledger:
    """What a gateway has acknowledged. A name is used once, so that what is due is never in doubt."""

    made: dict[str, int] = field(default_factory=dict)  # windows, and how many messages they must have
    deleted: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)  # windows whose deletion was asked for, and has no answer
    answers: Counter[int] = field(default_factory=Counter)


def _client(gateway: Gateway, ledger: Ledger, number: int, over: threading.Event, seed: str) -> None:
    chance = random.Random(seed)
    serial = 0
    while not over.is_set():
        serial += 1
        session, name = f"s{number}-{serial % 5}", f"w-{seed}-{serial}"
        gateway.chat(session, _TEXT, timeout=10)
        verb = chance.choice(("freeze", "freeze", "clone", "import", "delete", "forget"))
        mine = [each for each in ledger.made if each.startswith(f"w-{seed.rpartition('-')[0]}")]
        if verb == "forget":
            gateway.delete(f"/admin/sessions/{session}", timeout=10)
            continue
        if verb != "freeze" and not mine:
            continue
        if verb == "delete":
            victim = chance.choice(mine)
            ledger.cut.add(victim)
            status = gateway.delete(f"/admin/windows/{victim}", timeout=10).status
            if status == 200:
                ledger.made.pop(victim, None)
                ledger.deleted.add(victim)
        else:
            status = _make(gateway, verb, session, name, chance.choice(mine) if mine else "")
            if status == 201:
                ledger.made[name] = 2
        ledger.answers[status] += 1


def _make(gateway: Gateway, verb: str, session: str, name: str, source: str) -> int:
    if verb == "freeze":
        return gateway.freeze(session, name, timeout=10).status
    if verb == "clone":
        return gateway.post(f"/admin/windows/{source}/clone", {"target_window": name}, timeout=10).status
    file = gateway.get(f"/admin/windows/{source}/export", timeout=10)
    if file.status != 200:
        return file.status
    return gateway.post(f"/admin/windows/import?window_name={name}", file.body, timeout=10).status


def _killed(ground: Ground, workers: int) -> Verdict:
    engine, gateway = harness(ground, workers=workers)
    chance, ledger, wrong, slowest = random.Random(ground.seed), Ledger(), [], 0.0
    engine.late = (random.Random(ground.seed), 0.03)
    for number in range(_KILLS):
        over = threading.Event()
        clients = [
            threading.Thread(target=_client, args=(gateway, ledger, n, over, f"{number}-{n}"), daemon=True)
            for n in range(3)
        ]
        for client in clients:
            client.start()
        enough = ledger.answers.total() + 6
        wait_for(lambda enough=enough: ledger.answers.total() >= enough, 6)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.6))
        if workers > 1 and number % 2:
            with suppress(IndexError, ProcessLookupError):
                os.kill(gateway.workers()[0], signal.SIGKILL)
            time.sleep(chance.uniform(0.1, 0.5))
        gateway.kill()
        over.set()
        for client in clients:
            client.join(15)
        began = time.monotonic()
        gateway.start()
        slowest = max(slowest, time.monotonic() - began)
        wrong += _after(gateway, ledger)
    engine.late = None
    wrong += windows.faults(gateway, list(ledger.made)[:25])
    held: set[str] = set()
    for one in windows.listed(gateway):
        held |= {
            b["hash"]
            for b in gateway.get(f"/admin/windows/{one['name']}?include_blocks=true").json().get("blocks") or []
        }
    if not wait_for(lambda: pinned(ground) == held, 8):
        wrong.append(f"{len(pinned(ground) - held)} pins too many, {len(held - pinned(ground))} missing")
    gateway.stop()
    with closing(sqlite3.connect(gateway.data / "gateway.db")) as db:
        whole = db.execute("PRAGMA integrity_check").fetchone()[0]
    return verdict(
        not wrong and whole == "ok", *(f"NOT {each}" for each in wrong[:8]),
        f"{_KILLS} kills, {len(ledger.made)} windows, {len(ledger.deleted)} deleted",
        f"ready again after at most {slowest:.1f} s, store {whole}",
    )  # fmt: skip


def _after(gateway: Gateway, ledger: Ledger) -> list[str]:
    there = {one["name"] for one in windows.listed(gateway)}
    wrong = [f"{name} was acknowledged and is gone" for name in ledger.made.keys() - there - ledger.cut]
    wrong += [f"{name} was deleted and is back" for name in ledger.deleted & there]
    for name in list(ledger.made)[-12:]:
        if name in there:
            messages = gateway.get(f"/admin/windows/{name}/messages").json().get("messages", [])
            verified = gateway.post(f"/admin/windows/{name}/verify").json().get("ok")
            if len(messages) != ledger.made[name] or not verified:
                wrong.append(f"{name}: {len(messages)} messages, verify ok={verified}")
    for name in list(ledger.made):  # a deletion that was cut may have been done
        if name not in there:
            del ledger.made[name]
    return wrong


@TRIALS.add
def kills(ground: Ground) -> Verdict:
    """kill -9 at random moments: what was acknowledged is there and whole, what was deleted stays away"""
    return _killed(ground, 1)


@TRIALS.add
def kills_of_workers(ground: Ground) -> Verdict:
    """The same with two workers, single ones killed besides"""
    return _killed(ground, 2)


@TRIALS.add
def worker_that_is_stopped(ground: Ground) -> Verdict:
    """A worker that stands still (SIGSTOP) is noticed: after 30 s every new connection is answered"""
    gateway = ground.gateway(ground.engine().url, workers=2)
    if not wait_for(lambda: len(_serving(gateway)) == 2, 20):
        return Verdict(False, f"workers {gateway.api.workers()}")
    victim = gateway.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    answered: list[int] = []

    def well() -> bool:
        answered[:] = [
            reply.status if reply else 0
            for reply in together(*[lambda: gateway.get("/healthz", timeout=2)] * 12, within=4)
        ]
        return answered.count(200) == 12

    began = time.monotonic()
    good = wait_for(well, 40)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGCONT)
    return verdict(
        good,
        f"all of 12 answered after {time.monotonic() - began:.0f} s"
        if good
        else f"{answered.count(200)} of 12 answered after 40 s",
    )


def _serving(gateway: Gateway) -> set[int]:
    """The workers that answer new connections."""
    answers = [gateway.get("/admin/health?component=store", timeout=3).json() for _ in range(12)]
    return {int(answer["pid"]) for answer in answers if "pid" in answer}


@TRIALS.add
def worker_that_is_killed(ground: Ground) -> Verdict:
    """A worker that is killed takes no stream of another one along, and comes back"""
    engine = ground.engine()
    endless = Endless(engine)
    gateway = ground.gateway(engine.url, workers=2)
    wait_for(lambda: len(_serving(gateway)) == 2, 20)
    body = b'{"model":"demo","stream":true,"messages":[{"role":"user","content":"x"}]}'
    socks = [gateway.wire() for _ in range(12)]
    for number, sock in enumerate(socks):
        sock.sendall(head("POST", "/v1/chat/completions", f"x-session-id: k{number}", length=len(body)) + body)
    time.sleep(1)
    os.kill(gateway.workers()[0], signal.SIGKILL)
    time.sleep(0.5)
    endless.over.set()
    statuses = []
    for sock in socks:
        with suppress(OSError):
            statuses.append(read_reply(sock).status)
        sock.close()
    ended = statuses.count(200)
    back = wait_for(lambda: len(gateway.workers()) == 2, 10)
    return first_false(
        {
            "a worker comes back": back,
            "some streams went on": ended > 0,
            "healthz": gateway.get("/healthz").status == 200,
        },
        f"{ended} of 12 streams went on",
    )


@TRIALS.add
def parent_that_is_killed(ground: Ground) -> Verdict:
    """When the parent is killed its workers end, and the port is free"""
    gateway = ground.gateway(ground.engine().url, workers=2)
    wait_for(lambda: len(gateway.workers()) == 2, 10)
    workers = gateway.workers()
    os.kill(gateway.process.pid, signal.SIGKILL)
    gateway.process.wait()
    gone = wait_for(lambda: gateway.get("/healthz", timeout=1).status == 0, 15)
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return verdict(gone, f"workers gone: {gone}")


@TRIALS.add
def signals(ground: Ground) -> Verdict:
    """TERM, INT and HUP within a stream: it ends in time and keeps the turns before; PIPE, WINCH, URG harm nobody"""
    engine = ground.engine()
    checks = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        gateway = ground.gateway(engine.url)
        gateway.chat("kept", "hi")
        endless = Endless(engine)
        streaming = threading.Thread(
            target=lambda g=gateway: g.chat("streaming", "x", stream=True, timeout=30), daemon=True
        )  # type: ignore[misc]
        streaming.start()
        time.sleep(0.5)
        began = time.monotonic()
        code = gateway.stop(number, within=25)
        endless.over.set()
        engine.on_chat = engine.answer_chat
        name = signal.Signals(number).name
        checks[f"{name} ends it, not {code} after {time.monotonic() - began:.0f} s"] = code is not None
        if code is None:
            gateway.kill()
        gateway.start()
        checks[f"{name} loses no turn"] = gateway.get("/admin/sessions/kept").status == 200
        gateway.close()
    gateway = ground.gateway(engine.url)
    for number in (signal.SIGPIPE, signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG):
        gateway.process.send_signal(number)
    time.sleep(0.3)
    checks["it lives on after PIPE, WINCH, CHLD and URG"] = gateway.alive and gateway.chat("x").status == 200
    return first_false(checks)


@TRIALS.add
def salts_of_cut_turns(ground: Ground) -> Verdict:
    """KV of a first turn that a kill has cut belongs to somebody, and goes at last"""
    engine, gateway = harness(ground, sweep_every_s=0.5, session_ttl_s=1, busy_wait_s=0.5)
    salts: list[str] = []
    ordinary = engine.answer_chat

    def cut(exchange: object) -> None:
        salts.append(exchange.request.json["cache_salt"])  # type: ignore[attr-defined]
        engine.keep(exchange.request.json)  # type: ignore[attr-defined]
        time.sleep(2)

    engine.on_chat = cut
    together(
        *(lambda n=n: gateway.chat(f"cut-{n}", _TEXT * 2, stream=True, timeout=1) for n in range(4)),
        lambda: (time.sleep(0.7), gateway.kill()),
        within=6,
    )  # type: ignore[misc]
    engine.on_chat = ordinary
    gateway.start()
    left = lambda: [f for f in (ground.folder / "kv").glob("*.data") if any(salt in f.name for salt in salts)]  # noqa: E731
    before = len(left())
    gone = wait_for(lambda: not left(), 25)
    return verdict(gone and before > 0, f"{before} objects of {len(set(salts))} cut turns, {len(left())} of them left")
