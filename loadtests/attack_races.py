"""Races: whatever happens to a session or a window while the engine is slow, what was acknowledged is complete."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from loadtests import attack_windows as windows
from loadtests.attack_engine import StoringEngine, pinned, start_storing_stack
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

TRIALS = Trials()
_RENDER, _COMPUTE, _CHAT = "/tokenize", "/v1/completions", "/v1/chat/completions"
_TEXT = "a conversation of some length, so that it fills a few chunks "
_STORM_S = 12.0

Operation = Callable[[Gateway, str], Reply]


def _talk(gateway: Gateway, session: str) -> None:
    gateway.chat(session, _TEXT * 2)
    gateway.chat(session, _TEXT * 2, "Hello there!", "and more")


_SESSION_CHANGES: dict[str, Operation] = {
    "session deleted": lambda g, s: g.delete(f"/admin/sessions/{s}"),
    "last turn edited": lambda g, s: g.chat(s, _TEXT * 2, "Hello there!", "something else"),
    "first turn edited": lambda g, s: g.chat(s, "quite another beginning"),
    "regenerated": lambda g, s: g.chat(s, _TEXT * 2, "Hello there!", "and more"),
    "continued": lambda g, s: g.chat(s, _TEXT * 2, "Hello there!", "and more", "Hello there!", "and on"),
    "frozen under the same name": lambda g, s: g.freeze(s, f"w-{s}"),
    "frozen again, deleted": lambda g, s: (g.freeze(s, f"v-{s}", 3), g.delete(f"/admin/windows/v-{s}"))[1],
}


def _thaw(gateway: Gateway, session: str, how: dict[str, str | bool]) -> Reply:
    return gateway.post(f"/admin/windows/w-{session}/thaw", {"new_session_id": f"t-{session}", **how})


def _branch(gateway: Gateway, window: str, text: str) -> Reply:
    body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
    return gateway.post(f"/w/{window}{_CHAT}", body)


def _reimport(gateway: Gateway, session: str) -> Reply:
    file = gateway.get(f"/admin/windows/w-{session}/export?as_text=true").body
    return gateway.post(f"/admin/windows/import?as_text=true&window_name=i-{session}", file)


_USES_OF_A_WINDOW: dict[str, tuple[str, Operation]] = {
    "thaw": (_COMPUTE, lambda g, s: _thaw(g, s, {"warm": "gpu"})),
    "thaw as text": (_COMPUTE, lambda g, s: _thaw(g, s, {"warm": "gpu", "as_text": True})),
    "thaw as text, rendered": (_RENDER, lambda g, s: _thaw(g, s, {"warm": "none", "as_text": True})),
    "thaw and continue": (_CHAT, lambda g, s: _thaw(g, s, {"continuation_prompt": "x"})),
    "ask": (_CHAT, lambda g, s: g.post(f"/admin/windows/w-{s}/ask", {"question": "what?"})),
    "branch": (_CHAT, lambda g, s: _branch(g, f"w-{s}", "x")),
    "import as text": (_RENDER, _reimport),
}
_WINDOW_CHANGES: dict[str, Operation] = {
    "deleted": lambda g, s: g.delete(f"/admin/windows/w-{s}"),
    "deleted, name taken": lambda g, s: (g.delete(f"/admin/windows/w-{s}"), g.freeze("other", f"w-{s}", 3))[1],
    "session deleted": lambda g, s: (g.delete(f"/admin/sessions/{s}"), g.delete(f"/admin/sessions/t-{s}"))[1],
    "expired": lambda g, s: (g.request("PATCH", f"/admin/windows/w-{s}", {"ttl_seconds": 1}), time.sleep(1.2))[0],
}


def _race(
    engine: StoringEngine, gateway: Gateway, session: str, path: str, first: Operation, second: Operation
) -> list[Reply]:
    """Call `second` while the engine holds back the request for `path` that `first` makes."""

    def run_second() -> Reply:
        arrived.wait(3)
        reply = second(gateway, session)
        gateway.get(f"/admin/sessions/{session}")  # waits until every turn so far is recorded
        return reply

    with engine.hold_requests(path) as arrived:
        first_replies: list[Reply] = []
        thread = threading.Thread(target=lambda: first_replies.append(first(gateway, session)), daemon=True)
        thread.start()
        (other,) = run_concurrently(run_second, within=2.5)
    thread.join(20)
    return [first_replies[0] if first_replies else Reply(0), other or Reply(0)]


def _freeze_races(testbed: Testbed, workers: int) -> Verdict:
    engine, gateway = start_storing_stack(testbed, workers=workers)
    gateway.chat("other", _TEXT * 3)
    answers: Counter[str] = Counter()
    failures: list[str] = []
    for number, (name, second) in enumerate(_SESSION_CHANGES.items()):
        for path in (_RENDER, _COMPUTE):
            session = f"s{number}-{path[1]}"
            _talk(gateway, session)
            for file in (testbed.folder / "kv").iterdir():
                file.unlink()  # forces the freeze to compute
            first, other = _race(engine, gateway, session, path, lambda g, s: g.freeze(s, f"w-{s}"), second)
            answers[f"{first.status}"] += 1
            failures += [f"freeze, {name}: {r.status} {r.body[:80]!r}" for r in (first, other) if r.status >= 500]
            if first.status == 201:
                failures += [f"freeze, {name}: {fault}" for fault in windows.find_faults(gateway, [f"w-{session}"])]
    failures += _inconsistencies(testbed, gateway)
    return verdict(not failures, *(f"NOT {failure}" for failure in failures), f"answers {dict(answers)}")


@TRIALS.add
def freeze_races(testbed: Testbed) -> Verdict:
    """A freeze concurrent with a deletion, an edit or a regenerated turn: an acknowledged window has its text"""
    return _freeze_races(testbed, 1)


@TRIALS.add
def freeze_races_two_workers(testbed: Testbed) -> Verdict:
    """The same with two workers"""
    return _freeze_races(testbed, 2)


@TRIALS.add
def window_races(testbed: Testbed) -> Verdict:
    """Thaw, ask, branch and import while their window is removed: no 500, nothing half-done"""
    engine, gateway = start_storing_stack(testbed)
    gateway.chat("other", _TEXT * 3)
    answers: Counter[str] = Counter()
    failures: list[str] = []
    for a, (name, (path, first)) in enumerate(_USES_OF_A_WINDOW.items()):
        for b, (what, second) in enumerate(_WINDOW_CHANGES.items()):
            session = f"s{a}-{b}"
            _talk(gateway, session)
            if gateway.freeze(session, f"w-{session}").status != 201:
                failures.append(f"{session} was not frozen")
                continue
            replies = _race(engine, gateway, session, path, first, second)
            answers[f"{replies[0].status}"] += 1
            failures += [f"{name}, {what}: {r.status} {r.body[:80]!r}" for r in replies if r.status == 500]
            failures += [f"{name}, {what}: no answer" for _ in [0] if not replies[0].status]
            failures += _session_faults(gateway, f"{name}, {what}", f"t-{session}")
    failures += _inconsistencies(testbed, gateway)
    return verdict(not failures, *(f"NOT {failure}" for failure in failures), f"answers {dict(answers)}")


def _session_faults(gateway: Gateway, what: str, session: str) -> list[str]:
    """Check that a thawed session can be continued and frozen, and that the window has its text."""
    if gateway.get(f"/admin/sessions/{session}").status != 200:
        return []
    turn = gateway.chat(session, "and on")
    if turn.status not in (200, 404):
        return [f"{what}: its session cannot be continued: {turn.status} {turn.body[:80]!r}"]
    frozen = gateway.freeze(session, f"x-{session}")
    return windows.find_faults(gateway, [f"x-{session}"]) if frozen.status == 201 else []


def _inconsistencies(testbed: Testbed, gateway: Gateway) -> list[str]:
    """Check that every window is complete, and that exactly the chunks of windows are pinned."""
    names = [window["name"] for window in windows.list_windows(gateway)]
    failures = windows.find_faults(
        gateway, [name for name in names if gateway.get(f"/admin/windows/{name}").json().get("state") != "expired"]
    )
    owned = set()
    for name in names:
        blocks = gateway.get(f"/admin/windows/{name}?include_blocks=true").json().get("blocks") or []
        owned |= {block["hash"] for block in blocks}
    if not wait_for(lambda: pinned(testbed) <= owned, 6):
        failures.append(f"{len(pinned(testbed) - owned)} pinned chunks belong to no window")
    if not owned <= pinned(testbed):
        failures.append(f"{len(owned - pinned(testbed))} chunks of windows are not pinned")
    failures += [
        line[:200]
        for line in gateway.log.splitlines()
        if line.startswith(("TypeError", "IndexError", "KeyError", "sqlite3."))
    ]
    return failures


@TRIALS.add
def freeze_during_sweeps(testbed: Testbed) -> Verdict:
    """A freeze while a sweep removes its session (sessions_kept, session_ttl_s): its window has its text"""
    failures, answers = [], []
    for settings in ({"sessions_kept": 1, "sweep_every_s": 0.2}, {"session_ttl_s": 0.5, "sweep_every_s": 0.2}):
        folder = testbed.folder / f"sweep-{len(answers)}"
        folder.mkdir()
        with Testbed(folder, testbed.source, testbed.seed) as own:
            engine, gateway = start_storing_stack(own, **settings)
            _talk(gateway, "victim")
            gateway.chat("newer", "x")
            replies = _race(
                engine, gateway, "victim", _RENDER, lambda g, s: g.freeze(s, "w"),
                lambda g, _: (time.sleep(1.5), g.chat("newest", "x"))[1],
            )  # fmt: skip
            answers.append(replies[0].status)
            if replies[0].status == 201:
                failures += windows.find_faults(gateway, ["w"])
            elif replies[0].status not in (404, 409):
                failures.append(f"{settings}: {replies[0].status} {replies[0].body[:100]!r}")
    return verdict(not failures, *(f"NOT {failure}" for failure in failures), f"answers {answers}")


@TRIALS.add
def automatic_freezes(testbed: Testbed) -> Verdict:
    """Automatic freezing during edits and deletions creates no window without text"""
    engine, gateway = start_storing_stack(
        testbed, auto_freeze=True, auto_freeze_tokens=1, auto_freeze_cooldown_s=0.01, auto_freeze_every_s=0.1,
        auto_freeze_idle_minutes=0.001, auto_freeze_keep=50,
    )  # fmt: skip
    rng = random.Random(testbed.seed)
    engine.random_delay = (rng, 0.08)

    def run_client(number: int) -> None:
        for turn in range(12):
            gateway.chat(f"a{number}", _TEXT, "Hello there!", f"question {turn % 3}")
            time.sleep(rng.uniform(0, 0.4))  # sometimes long enough to count as idle
            if turn % 4 == 3:
                gateway.delete(f"/admin/sessions/a{number}")

    run_concurrently(*(lambda n=number: run_client(n) for number in range(4)), within=40)  # type: ignore[misc]
    engine.random_delay = None
    time.sleep(1)
    names = [window["name"] for window in windows.list_windows(gateway)]
    failures = windows.find_faults(gateway, names[:60])
    return verdict(
        not failures and bool(names), *(f"NOT {failure}" for failure in failures[:8]), f"{len(names)} windows"
    )


def _storm(testbed: Testbed, workers: int) -> Verdict:
    engine, gateway = start_storing_stack(testbed, workers=workers)
    engine.random_delay = (random.Random(testbed.seed), 0.05)
    answers: Counter[str] = Counter()
    failures: list[str] = []
    end = time.monotonic() + _STORM_S

    def client(number: int) -> None:
        rng = random.Random(f"{testbed.seed}-{number}")
        while time.monotonic() < end:
            session, window = f"s{rng.randrange(4)}", f"w{rng.randrange(8)}"
            name, reply = _random_operation(gateway, rng, session, window)
            answers[f"{name} {reply.status}"] += 1
            if reply.status >= 500 or reply.status == 0:
                failures.append(f"{name} {reply.status} {reply.body[:100]!r}")

    run_concurrently(*(lambda n=number: client(n) for number in range(4)), within=_STORM_S + 40)  # type: ignore[misc]
    engine.random_delay = None
    failures += _inconsistencies(testbed, gateway)
    made = sum(number for operation, number in answers.items() if operation.endswith("201"))
    return verdict(
        not failures,
        *(f"NOT {failure}" for failure in failures[:10]),
        f"{answers.total()} operations, {made} windows made",
    )


def _random_operation(gateway: Gateway, rng: random.Random, session: str, window: str) -> tuple[str, Reply]:
    other, at = f"w{rng.randrange(8)}", f"/admin/windows/{window}"
    operations: dict[str, Callable[[], Reply]] = {
        "turn": lambda: gateway.chat(session, _TEXT * 2, "Hello there!", "and more"),
        "edit": lambda: gateway.chat(session, _TEXT * 2, "Hello there!", f"edited {rng.randrange(9)}"),
        "freeze": lambda: gateway.freeze(session, window),
        "thaw": lambda: gateway.post(f"{at}/thaw", {"warm": rng.choice(("none", "gpu"))}),
        "text": lambda: gateway.post(f"{at}/thaw", {"warm": rng.choice(("none", "gpu")), "as_text": True}),
        "clone": lambda: gateway.post(f"{at}/clone", {"target_window": other}),
        "isolate": lambda: gateway.post(f"{at}/clone", {"target_window": other, "isolate": True}),
        "delete": lambda: gateway.delete(at),
        "forget": lambda: gateway.delete(f"/admin/sessions/{session}"),
        "ask": lambda: gateway.post(f"{at}/ask", {"question": "what?"}),
        "fanout": lambda: gateway.post(f"{at}/fanout", {"count": 2}),
        "branch": lambda: _branch(gateway, window, f"x {rng.random()}"),
    }
    name = rng.choice([*operations, "turn", "freeze"])
    return name, operations[name]()


@TRIALS.add
def storm(testbed: Testbed) -> Verdict:
    """Four clients mix every operation with a slow engine: no 5xx, every window complete, no stray pins"""
    return _storm(testbed, 1)


@TRIALS.add
def storm_two_workers(testbed: Testbed) -> Verdict:
    """The same with two workers"""
    return _storm(testbed, 2)


@TRIALS.add
def contended_names(testbed: Testbed) -> Verdict:
    """Of eight concurrent requests for one name, with two workers, exactly one gets it"""
    _, gateway = start_storing_stack(testbed, workers=2)
    _talk(gateway, "s")
    gateway.freeze("s", "source")
    file = gateway.get("/admin/windows/source/export").body
    operations: dict[str, Callable[[int], Reply]] = {
        "freeze": lambda n: gateway.freeze("s", f"freeze-{n}"),
        "clone": lambda n: gateway.post("/admin/windows/source/clone", {"target_window": f"clone-{n}"}),
        "import": lambda n: gateway.post(f"/admin/windows/import?window_name=import-{n}", file),
        "thaw": lambda n: gateway.post("/admin/windows/source/thaw", {"new_session_id": f"thaw-{n}"}),
        "text": lambda n: gateway.post(
            "/admin/windows/source/thaw", {"new_session_id": f"text-{n}", "as_text": True, "warm": "gpu"}
        ),
        "fanout": lambda n: gateway.post("/admin/windows/source/fanout", {"count": 2, "prefix": f"fan-{n}"}),
    }
    checks = {}
    for name, operation in operations.items():
        for number in range(3):
            replies = run_concurrently(*[lambda d=operation, n=number: d(n)] * 8)
            statuses = Counter(reply.status if reply else 0 for reply in replies)
            won = statuses[200] + statuses[201]
            checks[f"{name}: one winner, not {dict(statuses)}"] = won == 1 and statuses[409] == 7
    return check_all(checks)
