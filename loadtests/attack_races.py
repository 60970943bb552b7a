"""Races: whatever happens to a session or a window while the engine is slow, what was acknowledged is whole."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from loadtests import attack_windows as windows
from loadtests.attack_engine import StoringEngine, harness, pinned
from loadtests.attack_rig import Gateway, Ground, Reply, Trials, Verdict, first_false, together, verdict, wait_for

TRIALS = Trials()
_RENDER, _COMPUTE, _CHAT = "/tokenize", "/v1/completions", "/v1/chat/completions"
_TEXT = "a conversation of some length, so that it fills a few chunks "
_STORM_S = 12.0

Deed = Callable[[Gateway, str], Reply]


def _talk(gateway: Gateway, session: str) -> None:
    gateway.chat(session, _TEXT * 2)
    gateway.chat(session, _TEXT * 2, "Hello there!", "and more")


_SECOND: dict[str, Deed] = {
    "session deleted": lambda g, s: g.delete(f"/admin/sessions/{s}"),
    "last turn edited": lambda g, s: g.chat(s, _TEXT * 2, "Hello there!", "something else"),
    "first turn edited": lambda g, s: g.chat(s, "quite another beginning"),
    "regenerated": lambda g, s: g.chat(s, _TEXT * 2, "Hello there!", "and more"),
    "gone on": lambda g, s: g.chat(s, _TEXT * 2, "Hello there!", "and more", "Hello there!", "and on"),
    "frozen under the same name": lambda g, s: g.freeze(s, f"w-{s}"),
    "frozen again, deleted": lambda g, s: (g.freeze(s, f"v-{s}", 3), g.delete(f"/admin/windows/v-{s}"))[1],
}


def _thaw(gateway: Gateway, session: str, how: dict[str, str]) -> Reply:
    return gateway.post(f"/admin/windows/w-{session}/thaw", {"new_session_id": f"t-{session}", **how})


def _branch(gateway: Gateway, window: str, text: str) -> Reply:
    body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
    return gateway.post(f"/w/{window}{_CHAT}", body)


def _bring(gateway: Gateway, session: str) -> Reply:
    file = gateway.get(f"/admin/windows/w-{session}/export?as_text=true").body
    return gateway.post(f"/admin/windows/import?as_text=true&window_name=i-{session}", file)


_BEFORE_A_WINDOW: dict[str, tuple[str, Deed]] = {
    "thaw": (_COMPUTE, lambda g, s: _thaw(g, s, {"warm": "gpu"})),
    "thaw and go on": (_CHAT, lambda g, s: _thaw(g, s, {"continuation_prompt": "x"})),
    "ask": (_CHAT, lambda g, s: g.post(f"/admin/windows/w-{s}/ask", {"question": "what?"})),
    "branch": (_CHAT, lambda g, s: _branch(g, f"w-{s}", "x")),
    "import as text": (_RENDER, _bring),
}
_TO_A_WINDOW: dict[str, Deed] = {
    "deleted": lambda g, s: g.delete(f"/admin/windows/w-{s}"),
    "deleted, name taken": lambda g, s: (g.delete(f"/admin/windows/w-{s}"), g.freeze("other", f"w-{s}", 3))[1],
    "session deleted": lambda g, s: (g.delete(f"/admin/sessions/{s}"), g.delete(f"/admin/sessions/t-{s}"))[1],
    "expired": lambda g, s: (g.ask("PATCH", f"/admin/windows/w-{s}", {"ttl_seconds": 1}), time.sleep(1.2))[0],
}


def _race(engine: StoringEngine, gateway: Gateway, session: str, path: str, first: Deed, second: Deed) -> list[Reply]:
    """Do `second` while the engine keeps `first` waiting at a path."""

    def act() -> Reply:
        came.wait(3)
        reply = second(gateway, session)
        gateway.get(f"/admin/sessions/{session}")  # which waits until every turn so far is recorded
        return reply

    with engine.holding(path) as came:
        began: list[Reply] = []
        going = threading.Thread(target=lambda: began.append(first(gateway, session)), daemon=True)
        going.start()
        (other,) = together(act, within=2.5)
    going.join(20)
    return [began[0] if began else Reply(0), other or Reply(0)]


def _raced(ground: Ground, workers: int) -> Verdict:
    engine, gateway = harness(ground, workers=workers)
    gateway.chat("other", _TEXT * 3)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for number, (name, second) in enumerate(_SECOND.items()):
        for path in (_RENDER, _COMPUTE):
            session = f"s{number}-{path[1]}"
            _talk(gateway, session)
            for file in (ground.folder / "kv").iterdir():
                file.unlink()  # so that there is something to compute
            first, other = _race(engine, gateway, session, path, lambda g, s: g.freeze(s, f"w-{s}"), second)
            seen[f"{first.status}"] += 1
            wrong += [f"freeze, {name}: {r.status} {r.body[:80]!r}" for r in (first, other) if r.status >= 500]
            if first.status == 201:
                wrong += [f"freeze, {name}: {fault}" for fault in windows.faults(gateway, [f"w-{session}"])]
    wrong += _left(ground, gateway)
    return verdict(not wrong, *(f"NOT {each}" for each in wrong), f"answers {dict(seen)}")


@TRIALS.add
def freeze_races(ground: Ground) -> Verdict:
    """A freeze beside a deletion, an edit, a regenerated turn: a window that was acknowledged has its text"""
    return _raced(ground, 1)


@TRIALS.add
def freeze_races_of_workers(ground: Ground) -> Verdict:
    """The same with two workers"""
    return _raced(ground, 2)


@TRIALS.add
def window_races(ground: Ground) -> Verdict:
    """Thaw, ask, branch, verify, import beside the end of their window: no 500, and nothing half"""
    engine, gateway = harness(ground)
    gateway.chat("other", _TEXT * 3)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for a, (name, (path, first)) in enumerate(_BEFORE_A_WINDOW.items()):
        for b, (what, second) in enumerate(_TO_A_WINDOW.items()):
            session = f"s{a}-{b}"
            _talk(gateway, session)
            if gateway.freeze(session, f"w-{session}").status != 201:
                wrong.append(f"{session} was not frozen")
                continue
            replies = _race(engine, gateway, session, path, first, second)
            seen[f"{replies[0].status}"] += 1
            wrong += [f"{name}, {what}: {r.status} {r.body[:80]!r}" for r in replies if r.status == 500]
            wrong += [f"{name}, {what}: no answer" for _ in [0] if not replies[0].status]
            wrong += _session_is_whole(gateway, f"{name}, {what}", f"t-{session}")
    wrong += _left(ground, gateway)
    return verdict(not wrong, *(f"NOT {each}" for each in wrong), f"answers {dict(seen)}")


def _session_is_whole(gateway: Gateway, what: str, session: str) -> list[str]:
    """A session that was thawed can go on and be frozen, with a text."""
    if gateway.get(f"/admin/sessions/{session}").status != 200:
        return []
    on = gateway.chat(session, "and on")
    if on.status not in (200, 404):
        return [f"{what}: its session does not go on: {on.status} {on.body[:80]!r}"]
    frozen = gateway.freeze(session, f"x-{session}")
    return windows.faults(gateway, [f"x-{session}"]) if frozen.status == 201 else []


def _left(ground: Ground, gateway: Gateway) -> list[str]:
    """Every window is whole, and nothing is pinned that no window holds."""
    names = [one["name"] for one in windows.listed(gateway)]
    wrong = windows.faults(
        gateway, [name for name in names if gateway.get(f"/admin/windows/{name}").json().get("state") != "expired"]
    )
    held = set()
    for name in names:
        blocks = gateway.get(f"/admin/windows/{name}?include_blocks=true").json().get("blocks") or []
        held |= {block["hash"] for block in blocks}
    if not wait_for(lambda: pinned(ground) <= held, 6):
        wrong.append(f"{len(pinned(ground) - held)} chunks are pinned for no window")
    if not held <= pinned(ground):
        wrong.append(f"{len(held - pinned(ground))} chunks of windows are not pinned")
    wrong += [
        line[:200]
        for line in gateway.log.splitlines()
        if line.startswith(("TypeError", "IndexError", "KeyError", "sqlite3."))
    ]
    return wrong


@TRIALS.add
def freeze_beside_sweeps(ground: Ground) -> Verdict:
    """A freeze beside a sweep that forgets its session (sessions_kept, session_ttl_s): its window has its text"""
    wrong, seen = [], []
    for settings in ({"sessions_kept": 1, "sweep_every_s": 0.2}, {"session_ttl_s": 0.5, "sweep_every_s": 0.2}):
        folder = ground.folder / f"sweep-{len(seen)}"
        folder.mkdir()
        with Ground(folder, ground.source, ground.seed) as own:
            engine, gateway = harness(own, **settings)
            _talk(gateway, "victim")
            gateway.chat("newer", "x")
            replies = _race(
                engine, gateway, "victim", _RENDER, lambda g, s: g.freeze(s, "w"),
                lambda g, _: (time.sleep(1.5), g.chat("newest", "x"))[1],
            )  # fmt: skip
            seen.append(replies[0].status)
            if replies[0].status == 201:
                wrong += windows.faults(gateway, ["w"])
            elif replies[0].status not in (404, 409):
                wrong.append(f"{settings}: {replies[0].status} {replies[0].body[:100]!r}")
    return verdict(not wrong, *(f"NOT {each}" for each in wrong), f"answers {seen}")


@TRIALS.add
def automatic_freezes(ground: Ground) -> Verdict:
    """Automatic freezing beside edits and deletions makes no window without text"""
    engine, gateway = harness(
        ground, auto_freeze=True, auto_freeze_tokens=1, auto_freeze_cooldown_s=0.01, auto_freeze_every_s=0.1,
        auto_freeze_idle_minutes=0.001, auto_freeze_keep=50,
    )  # fmt: skip
    chance = random.Random(ground.seed)
    engine.late = (chance, 0.08)

    def one(number: int) -> None:
        for turn in range(12):
            gateway.chat(f"a{number}", _TEXT, "Hello there!", f"question {turn % 3}")
            time.sleep(chance.uniform(0, 0.4))  # sometimes long enough to count as idle
            if turn % 4 == 3:
                gateway.delete(f"/admin/sessions/a{number}")

    together(*(lambda n=number: one(n) for number in range(4)), within=40)  # type: ignore[misc]
    engine.late = None
    time.sleep(1)
    names = [each["name"] for each in windows.listed(gateway)]
    wrong = windows.faults(gateway, names[:60])
    return verdict(not wrong and bool(names), *(f"NOT {each}" for each in wrong[:8]), f"{len(names)} windows")


def _storm(ground: Ground, workers: int) -> Verdict:
    engine, gateway = harness(ground, workers=workers)
    engine.late = (random.Random(ground.seed), 0.05)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + _STORM_S

    def client(number: int) -> None:
        chance = random.Random(f"{ground.seed}-{number}")
        while time.monotonic() < end:
            session, window = f"s{chance.randrange(4)}", f"w{chance.randrange(8)}"
            verb, reply = _deed(gateway, chance, session, window)
            seen[f"{verb} {reply.status}"] += 1
            if reply.status >= 500 or reply.status == 0:
                wrong.append(f"{verb} {reply.status} {reply.body[:100]!r}")

    together(*(lambda n=number: client(n) for number in range(4)), within=_STORM_S + 40)  # type: ignore[misc]
    engine.late = None
    wrong += _left(ground, gateway)
    made = sum(number for deed, number in seen.items() if deed.endswith("201"))
    return verdict(
        not wrong, *(f"NOT {each}" for each in wrong[:10]), f"{seen.total()} operations, {made} windows made"
    )


def _deed(gateway: Gateway, chance: random.Random, session: str, window: str) -> tuple[str, Reply]:
    other, at = f"w{chance.randrange(8)}", f"/admin/windows/{window}"
    deeds: dict[str, Callable[[], Reply]] = {
        "turn": lambda: gateway.chat(session, _TEXT * 2, "Hello there!", "and more"),
        "edit": lambda: gateway.chat(session, _TEXT * 2, "Hello there!", f"edited {chance.randrange(9)}"),
        "freeze": lambda: gateway.freeze(session, window),
        "thaw": lambda: gateway.post(f"{at}/thaw", {"warm": chance.choice(("none", "gpu"))}),
        "clone": lambda: gateway.post(f"{at}/clone", {"target_window": other}),
        "isolate": lambda: gateway.post(f"{at}/clone", {"target_window": other, "isolate": True}),
        "delete": lambda: gateway.delete(at),
        "forget": lambda: gateway.delete(f"/admin/sessions/{session}"),
        "ask": lambda: gateway.post(f"{at}/ask", {"question": "what?"}),
        "fanout": lambda: gateway.post(f"{at}/fanout", {"count": 2}),
        "branch": lambda: _branch(gateway, window, f"x {chance.random()}"),
    }
    verb = chance.choice([*deeds, "turn", "freeze"])
    return verb, deeds[verb]()


@TRIALS.add
def storm(ground: Ground) -> Verdict:
    """Four clients do everything at random before an engine that is late: no 5xx, every window whole, no stray pins"""
    return _storm(ground, 1)


@TRIALS.add
def storm_of_workers(ground: Ground) -> Verdict:
    """The same with two workers"""
    return _storm(ground, 2)


@TRIALS.add
def one_name_for_many(ground: Ground) -> Verdict:
    """Of eight who want one name at once, with two workers, exactly one gets it"""
    _, gateway = harness(ground, workers=2)
    _talk(gateway, "s")
    gateway.freeze("s", "source")
    file = gateway.get("/admin/windows/source/export").body
    deeds: dict[str, Callable[[int], Reply]] = {
        "freeze": lambda n: gateway.freeze("s", f"freeze-{n}"),
        "clone": lambda n: gateway.post("/admin/windows/source/clone", {"target_window": f"clone-{n}"}),
        "import": lambda n: gateway.post(f"/admin/windows/import?window_name=import-{n}", file),
        "thaw": lambda n: gateway.post("/admin/windows/source/thaw", {"new_session_id": f"thaw-{n}"}),
        "fanout": lambda n: gateway.post("/admin/windows/source/fanout", {"count": 2, "prefix": f"fan-{n}"}),
    }
    checks = {}
    for name, deed in deeds.items():
        for number in range(3):
            replies = together(*[lambda d=deed, n=number: d(n)] * 8)
            statuses = Counter(reply.status if reply else 0 for reply in replies)
            won = statuses[200] + statuses[201]
            checks[f"{name}: one winner, not {dict(statuses)}"] = won == 1 and statuses[409] == 7
    return first_false(checks)
