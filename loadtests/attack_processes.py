"""Processes that are killed, stopped or signalled at any moment, and their state after a restart."""

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
from loadtests.attack_engine import pinned, start_storing_stack
from loadtests.attack_harness import (
    Gateway,
    Testbed,
    Trials,
    Verdict,
    check_all,
    head,
    read_reply,
    run_concurrently,
    verdict,
    wait_for,
)
from loadtests.attack_http import EndlessReply

TRIALS = Trials()
_TEXT = "a conversation of some length, so that it fills a few chunks "
_KILLS = 6


@dataclass
class Ledger:
    """What a gateway has acknowledged. Each name is used once, so the expected state is never ambiguous."""

    made: dict[str, int] = field(default_factory=dict)  # windows, and the number of messages they must have
    deleted: set[str] = field(default_factory=set)
    deleting: set[str] = field(default_factory=set)  # windows whose deletion was requested and not answered
    answers: Counter[int] = field(default_factory=Counter)


def _client(gateway: Gateway, ledger: Ledger, number: int, finished: threading.Event, seed: str) -> None:
    rng = random.Random(seed)
    serial = 0
    while not finished.is_set():
        serial += 1
        session, name = f"s{number}-{serial % 5}", f"w-{seed}-{serial}"
        gateway.chat(session, _TEXT, timeout=10)
        action = rng.choice(("freeze", "freeze", "clone", "import", "delete", "forget"))
        mine = [name for name in ledger.made if name.startswith(f"w-{seed.rpartition('-')[0]}")]
        if action == "forget":
            gateway.delete(f"/admin/sessions/{session}", timeout=10)
            continue
        if action != "freeze" and not mine:
            continue
        if action == "delete":
            victim = rng.choice(mine)
            ledger.deleting.add(victim)
            status = gateway.delete(f"/admin/windows/{victim}", timeout=10).status
            if status == 200:
                ledger.made.pop(victim, None)
                ledger.deleted.add(victim)
        else:
            status = _make(gateway, action, session, name, rng.choice(mine) if mine else "")
            if status == 201:
                ledger.made[name] = 2
        ledger.answers[status] += 1


def _make(gateway: Gateway, action: str, session: str, name: str, source: str) -> int:
    if action == "freeze":
        return gateway.freeze(session, name, timeout=10).status
    if action == "clone":
        return gateway.post(f"/admin/windows/{source}/clone", {"target_window": name}, timeout=10).status
    file = gateway.get(f"/admin/windows/{source}/export", timeout=10)
    if file.status != 200:
        return file.status
    return gateway.post(f"/admin/windows/import?window_name={name}", file.body, timeout=10).status


def _kill_repeatedly(testbed: Testbed, workers: int) -> Verdict:
    engine, gateway = start_storing_stack(testbed, workers=workers)
    rng, ledger, failures, slowest = random.Random(testbed.seed), Ledger(), [], 0.0
    engine.random_delay = (random.Random(testbed.seed), 0.03)
    for number in range(_KILLS):
        finished = threading.Event()
        clients = [
            threading.Thread(target=_client, args=(gateway, ledger, n, finished, f"{number}-{n}"), daemon=True)
            for n in range(3)
        ]
        for client in clients:
            client.start()
        enough = ledger.answers.total() + 6
        wait_for(lambda enough=enough: ledger.answers.total() >= enough, 6)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.6))
        if workers > 1 and number % 2:
            with suppress(IndexError, ProcessLookupError):
                os.kill(gateway.workers()[0], signal.SIGKILL)
            time.sleep(rng.uniform(0.1, 0.5))
        gateway.kill()
        finished.set()
        for client in clients:
            client.join(15)
        began = time.monotonic()
        gateway.start()
        slowest = max(slowest, time.monotonic() - began)
        failures += _check_after_restart(gateway, ledger)
    engine.random_delay = None
    failures += windows.find_faults(gateway, list(ledger.made)[:25])
    owned: set[str] = set()
    for window in windows.list_windows(gateway):
        owned |= {
            b["hash"]
            for b in gateway.get(f"/admin/windows/{window['name']}?include_blocks=true").json().get("blocks") or []
        }
    if not wait_for(lambda: pinned(testbed) == owned, 8):
        failures.append(f"{len(pinned(testbed) - owned)} excess pins, {len(owned - pinned(testbed))} missing")
    gateway.stop()
    with closing(sqlite3.connect(gateway.data / "gateway.db")) as db:
        integrity = db.execute("PRAGMA integrity_check").fetchone()[0]
    return verdict(
        not failures and integrity == "ok", *(f"NOT {failure}" for failure in failures[:8]),
        f"{_KILLS} kills, {len(ledger.made)} windows, {len(ledger.deleted)} deleted",
        f"ready again after at most {slowest:.1f} s, store {integrity}",
    )  # fmt: skip


def _check_after_restart(gateway: Gateway, ledger: Ledger) -> list[str]:
    there = {window["name"] for window in windows.list_windows(gateway)}
    failures = [f"{name} was acknowledged and is gone" for name in ledger.made.keys() - there - ledger.deleting]
    failures += [f"{name} was deleted and is back" for name in ledger.deleted & there]
    for name in list(ledger.made)[-12:]:
        if name in there:
            messages = gateway.get(f"/admin/windows/{name}/messages").json().get("messages", [])
            verified = gateway.post(f"/admin/windows/{name}/verify").json().get("ok")
            if len(messages) != ledger.made[name] or not verified:
                failures.append(f"{name}: {len(messages)} messages, verify ok={verified}")
    for name in list(ledger.made):  # an interrupted deletion may have been carried out
        if name not in there:
            del ledger.made[name]
    return failures


@TRIALS.add
def kills(testbed: Testbed) -> Verdict:
    """kill -9 at random moments: what was acknowledged is there and complete, what was deleted stays deleted"""
    return _kill_repeatedly(testbed, 1)


@TRIALS.add
def kills_two_workers(testbed: Testbed) -> Verdict:
    """The same with two workers, and single workers killed as well"""
    return _kill_repeatedly(testbed, 2)


@TRIALS.add
def stopped_worker(testbed: Testbed) -> Verdict:
    """A stopped worker (SIGSTOP) is noticed: after 30 s every new connection is answered"""
    gateway = testbed.gateway(testbed.engine().url, workers=2)
    if not wait_for(lambda: len(_serving(gateway)) == 2, 20):
        return Verdict(False, f"workers {gateway.workers()}")
    victim = gateway.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    answered: list[int] = []

    def all_answer() -> bool:
        answered[:] = [
            reply.status if reply else 0
            for reply in run_concurrently(*[lambda: gateway.get("/healthz", timeout=2)] * 12, within=4)
        ]
        return answered.count(200) == 12

    began = time.monotonic()
    recovered = wait_for(all_answer, 40)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGCONT)
    return verdict(
        recovered,
        f"all of 12 answered after {time.monotonic() - began:.0f} s"
        if recovered
        else f"{answered.count(200)} of 12 answered after 40 s",
    )


def _serving(gateway: Gateway) -> set[int]:
    """Return the process ids of the workers that answer new connections."""
    answers = [gateway.get("/admin/health?component=store", timeout=3).json() for _ in range(12)]
    return {int(answer["pid"]) for answer in answers if "pid" in answer}


@TRIALS.add
def killed_worker(testbed: Testbed) -> Verdict:
    """A killed worker takes no other worker's streams with it, and is replaced"""
    engine = testbed.engine()
    endless = EndlessReply(engine)
    gateway = testbed.gateway(engine.url, workers=2)
    wait_for(lambda: len(_serving(gateway)) == 2, 20)
    body = b'{"model":"demo","stream":true,"messages":[{"role":"user","content":"x"}]}'
    socks = [gateway.connect() for _ in range(12)]
    for number, sock in enumerate(socks):
        sock.sendall(head("POST", "/v1/chat/completions", f"x-session-id: k{number}", length=len(body)) + body)
    time.sleep(1)
    os.kill(gateway.workers()[0], signal.SIGKILL)
    time.sleep(0.5)
    endless.finished.set()
    statuses = []
    for sock in socks:
        with suppress(OSError):
            statuses.append(read_reply(sock).status)
        sock.close()
    ended = statuses.count(200)
    restored = wait_for(lambda: len(gateway.workers()) == 2, 10)
    return check_all(
        {
            "the worker is replaced": restored,
            "some streams continued": ended > 0,
            "healthz": gateway.get("/healthz").status == 200,
        },
        f"{ended} of 12 streams continued",
    )


@TRIALS.add
def killed_parent(testbed: Testbed) -> Verdict:
    """When the parent is killed its workers end, and the port is free"""
    gateway = testbed.gateway(testbed.engine().url, workers=2)
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
def signals(testbed: Testbed) -> Verdict:
    """TERM, INT and HUP during a stream: it ends in time and keeps earlier turns; PIPE, WINCH, URG do nothing"""
    engine = testbed.engine()
    checks = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        gateway = testbed.gateway(engine.url)
        gateway.chat("kept", "hi")
        endless = EndlessReply(engine)
        streaming = threading.Thread(
            target=lambda g=gateway: g.chat("streaming", "x", stream=True, timeout=30), daemon=True
        )  # type: ignore[misc]
        streaming.start()
        time.sleep(0.5)
        began = time.monotonic()
        code = gateway.stop(number, within=25)
        endless.finished.set()
        engine.on_chat = engine.answer_chat
        name = signal.Signals(number).name
        checks[f"{name} ends it, not {code} after {time.monotonic() - began:.0f} s"] = code is not None
        if code is None:
            gateway.kill()
        gateway.start()
        checks[f"{name} loses no turn"] = gateway.get("/admin/sessions/kept").status == 200
        gateway.close()
    gateway = testbed.gateway(engine.url)
    for number in (signal.SIGPIPE, signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG):
        gateway.process.send_signal(number)
    time.sleep(0.3)
    checks["it still runs after PIPE, WINCH, CHLD and URG"] = gateway.alive and gateway.chat("x").status == 200
    return check_all(checks)


@TRIALS.add
def salts_of_interrupted_turns(testbed: Testbed) -> Verdict:
    """KV of a first turn interrupted by a kill has an owner, and is removed in the end"""
    engine, gateway = start_storing_stack(testbed, sweep_every_s=0.5, session_ttl_s=1, busy_wait_s=0.5)
    salts: list[str] = []
    ordinary = engine.answer_chat

    def interrupt(exchange: object) -> None:
        salts.append(exchange.request.json["cache_salt"])  # type: ignore[attr-defined]
        engine.store_prompt(exchange.request.json)  # type: ignore[attr-defined]
        time.sleep(2)

    engine.on_chat = interrupt
    run_concurrently(
        *(lambda n=n: gateway.chat(f"cut-{n}", _TEXT * 2, stream=True, timeout=1) for n in range(4)),
        lambda: (time.sleep(0.7), gateway.kill()),
        within=6,
    )  # type: ignore[misc]
    engine.on_chat = ordinary
    gateway.start()
    left = lambda: [f for f in (testbed.folder / "kv").glob("*.data") if any(salt in f.name for salt in salts)]  # noqa: E731
    before = len(left())
    gone = wait_for(lambda: not left(), 25)
    return verdict(gone and before > 0, f"{before} objects of {len(set(salts))} interrupted turns, {len(left())} left")
