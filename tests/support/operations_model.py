"""Random operations of several clients at once against a running gateway, and what must hold whenever all are done.

A round is a handful of operations for each client; what they do comes from one seed, in which order the gateway does it
does not. So nothing here expects an order. After each round everything is quiet, and then:

- every window that was acknowledged, and not deleted since, is there, and no other;
- it has the text that its session had, the same one each time that it is looked at;
- `verify` finds every byte, a thaw and an export with an import give the same text and the same tokens;
- what is pinned on disk is what the windows hold, nothing less and nothing more;
- each turn that was answered is recorded once, unless its session was deleted;
- nothing was answered by a 5xx, or by an error that its operation cannot have.
"""

import asyncio
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.fakes.engine import MODEL
from tests.support.fakes.lmcache import FakeLMCache

REPLY = {"role": "assistant", "content": "Hello there!"}
CLIENTS = 4
PER_ROUND = 4  # operations of each client between two looks
SESSIONS = 4
WINDOWS = 6
_LONGEST = 7  # messages; then a client begins a new conversation
_QUIET_S = 20.0
_NO_SESSION = (404, "session_not_found")  # a thawed one that was just deleted: its turn has nothing to continue
_GONE = {_NO_SESSION, (404, "window_not_found")}
_TAKEN = {(409, "window_already_exists"), (409, "session_already_exists")}
_EMPTY = {(400, "invalid_request")}  # of a session without a finished turn
_BUSY = {(409, "session_busy")}

Said = tuple[tuple[str, str], ...]
Operation = Callable[["Client"], Coroutine[Any, Any, None]]


class Broken(AssertionError):
    """Something did not hold."""


def said(messages: list[dict[str, Any]]) -> Said:
    """A conversation as it is compared."""
    return tuple((m["role"], m["content"]) for m in messages)


@dataclass
class World:
    """What the clients know together."""

    http: httpx.AsyncClient
    data_dir: Path
    kv: Path
    cache: FakeLMCache
    random: random.Random
    forgets: bool  # whether the gateway forgets sessions by itself
    steps: int = 0
    sent: dict[str, set[Said]] = field(default_factory=dict)  # what was asked and answered, by the last question
    windows: dict[str, Said | None] = field(default_factory=dict)  # that exist; None: not read yet
    created: Counter[str] = field(default_factory=Counter)  # in this round
    deleted: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)  # that each session should have
    uncertain: set[str] = field(default_factory=set)  # sessions whose turns cannot be counted in this round
    log: list[str] = field(default_factory=list)
    latest: int = 0

    def note(self, whole: list[dict[str, Any]]) -> None:
        """A turn is about to be sent, with this reply to come."""
        self.sent.setdefault(whole[-2]["content"], set()).add(said(whole))

    def explained(self, text: Said) -> bool:
        """Whether a window may have this text: a turn's, appended to a window's where it continues one."""
        if len(text) < 2:
            return False
        turns = (turn for turn in self.sent.get(text[-2][1], ()) if text[-len(turn) :] == turn)
        return any(len(turn) == len(text) or self.explained(text[: -len(turn)]) for turn in turns)

    def name(self, kind: str, count: int) -> str:
        """One of so many names."""
        return f"{kind}{self.random.randrange(count)}"

    async def ask(
        self, method: str, path: str, allowed: set[tuple[int, str]], note: str = "", **more: Any
    ) -> httpx.Response | None:
        """Ask the gateway; None where it answered with one of the `allowed` errors."""
        answer = await self.http.request(method, path, **more)
        code = "" if answer.status_code < 400 else str(answer.json()["error"].get("code"))
        self.log.append(f"{method} {path} {note} -> {answer.status_code} {code}")
        if not code:
            return answer
        if (answer.status_code, code) not in allowed:
            raise Broken(f"{self.log[-1]}: {answer.text:.600}")
        return None

    async def must(self, method: str, path: str, note: str = "", **more: Any) -> httpx.Response:
        """Ask the gateway for what it cannot refuse."""
        answer = await self.ask(method, path, set(), note, **more)
        assert answer is not None
        return answer


@dataclass
class Client:
    """One of those who use the gateway, each with its own view of every conversation."""

    world: World
    views: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    # Turns.

    async def turn(self) -> None:
        """Go on with a conversation."""
        session = self.world.name("s", SESSIONS)
        view = self.views.get(session, [])
        await self._send(session, [*view, self._user()] if len(view) < _LONGEST else [self._user()])

    async def edit(self) -> None:
        """Ask the last question of a conversation otherwise."""
        session = self.world.name("s", SESSIONS)
        await self._send(session, [*self.views.get(session, [])[:-2], self._user()])

    async def regenerate(self) -> None:
        """Ask the last question of a conversation again."""
        session = self.world.name("s", SESSIONS)
        if view := self.views.get(session):
            await self._send(session, view[:-1])

    async def _send(self, session: str, messages: list[dict[str, Any]]) -> None:
        whole = [*messages, REPLY]
        self.world.note(whole)
        asked = {"model": MODEL, "messages": messages, "stream": self.world.random.random() < 0.3}
        headers = {"x-session-id": session}
        answer = await self.world.ask(
            "POST", "/v1/chat/completions", {_NO_SESSION}, session, json=asked, headers=headers
        )
        if answer is not None:
            self.world.turns[session] += 1
            self.views[session] = whole
        elif session not in self.world.uncertain and not self.world.forgets:
            raise Broken(f"a turn failed for lack of session {session}, which is never deleted")

    def _user(self) -> dict[str, Any]:
        self.world.latest += 1
        return {"role": "user", "content": f"message {self.world.latest}, and some more words that fill a chunk"}

    async def branch(self) -> None:
        """Begin a branch of a window by its base URL."""
        window = self.world.name("w", WINDOWS)
        message = self._user()
        self.world.note([message, REPLY])
        path = f"/w/{window}/v1/chat/completions"
        answer = await self.world.ask("POST", path, _GONE, json={"model": MODEL, "messages": [message]})
        if answer is not None:
            session = answer.headers["x-session-id"]
            self.world.turns[session] += 1
            await self._keep_branch(session, message)

    async def _keep_branch(self, session: str, message: dict[str, Any]) -> None:
        """Freeze a branch and thaw its window: what was in front of the message is still in front of it."""
        name = f"{session[:100]}-w"
        frozen = await self.world.ask(
            "POST", "/admin/windows", _GONE | _BUSY, json={"session_id": session, "window_name": name}
        )
        if frozen is None:
            return
        found = await self.world.must("GET", f"/admin/windows/{name}/messages")
        text = said(found.json()["messages"])
        if len(text) < 4 or text[-2:] != said([message, REPLY]):
            raise Broken(f"a branch has {text}, and not a window's text before {message}")
        await self.world.must("DELETE", f"/admin/windows/{name}")
        await self.world.ask("DELETE", f"/admin/sessions/{session}", _GONE)

    # Windows.

    async def freeze(self) -> None:
        """Freeze a session."""
        session, name = self.world.name("s", SESSIONS), self.world.name("w", WINDOWS)
        asked = {"session_id": session, "window_name": name}
        await self._make(name, "POST", "/admin/windows", _GONE | _TAKEN | _EMPTY | _BUSY, json=asked)

    async def clone(self) -> None:
        """Give a window a second name."""
        source, name = self.world.name("w", WINDOWS), self.world.name("w", WINDOWS)
        asked = {"target_window": name, "isolate": self.world.random.random() < 0.5}
        await self._make(name, "POST", f"/admin/windows/{source}/clone", _GONE | _TAKEN, json=asked)

    async def _make(self, name: str, method: str, path: str, allowed: set[tuple[int, str]], **more: Any) -> bool:
        made = await self.world.ask(method, path, allowed, str(more.get("json", name)), **more)
        self.world.created[name] += made is not None
        return made is not None

    async def thaw(self) -> None:
        """Thaw a window into one of the sessions, and continue there if that worked."""
        window, session = self.world.name("w", WINDOWS), self.world.name("s", SESSIONS)
        asked = {"new_session_id": session, "warm": self.world.random.choice(["none", "cpu", "gpu"])}
        self.world.uncertain.add(session)  # its text is the window's, which may be another one by now
        thawed = await self.world.ask("POST", f"/admin/windows/{window}/thaw", _GONE | _TAKEN, str(asked), json=asked)
        if thawed is not None:
            self.views.pop(session, None)

    async def fan_out(self) -> None:
        """Thaw a window into many sessions, and delete them again."""
        self.world.latest += 1
        window, prefix = self.world.name("w", WINDOWS), f"f{self.world.latest}"
        asked = {"count": 3, "prefix": prefix}
        if await self.world.ask("POST", f"/admin/windows/{window}/fanout", _GONE | _TAKEN, json=asked):
            for number in range(1, 4):
                await self.world.ask("DELETE", f"/admin/sessions/{prefix}-{number}", _GONE)

    async def question(self) -> None:
        """Ask a window a question."""
        await self.world.ask(
            "POST", f"/admin/windows/{self.world.name('w', WINDOWS)}/ask", _GONE, json={"question": "and?"}
        )

    async def look(self) -> None:
        """Read a window's status and text, which is always complete."""
        window = self.world.name("w", WINDOWS)
        found = await self.world.ask("GET", f"/admin/windows/{window}/messages", _GONE)
        if found is not None and not found.json()["messages"]:
            raise Broken(f"{window} has no text")
        await self.world.ask("GET", f"/admin/windows/{window}?include_blocks=true&include_lineage=true", _GONE)

    async def verify(self) -> None:
        """Verify a window, whatever else happens."""
        window = self.world.name("w", WINDOWS)
        verdict = await self.world.ask("POST", f"/admin/windows/{window}/verify", _GONE)
        if verdict is not None and not verdict.json()["ok"]:
            raise Broken(f"verify: {verdict.text}")

    async def move(self) -> None:
        """Load a window's KV into the cache's memory, or drop it from there."""
        operation = self.world.random.choice(["prefetch", "evict"])
        await self.world.ask("POST", f"/admin/windows/{self.world.name('w', WINDOWS)}/{operation}", _GONE)

    async def describe(self) -> None:
        """Say something else of a window."""
        window = self.world.name("w", WINDOWS)
        await self.world.ask("PATCH", f"/admin/windows/{window}", _GONE, json={"description": "d", "tags": ["a"]})

    async def copy_by_file(self) -> None:
        """Export a window and import it under another name."""
        source, name = self.world.name("w", WINDOWS), self.world.name("w", WINDOWS)
        try:
            exported = await self.world.ask("GET", f"/admin/windows/{source}/export", _GONE)
        except httpx.RemoteProtocolError:
            self.world.log.append(f"the export of {source} was cut")
            self.cut(source)
            return
        if exported is not None:
            path = f"/admin/windows/import?window_name={name}"
            headers = {"content-type": "application/x-tar"}
            await self._make(name, "POST", path, _TAKEN, content=exported.content, headers=headers)

    def cut(self, window: str) -> None:
        """An export ends early only if the window is deleted meanwhile."""
        self.world.uncertain.add(f"cut {window}")

    async def delete_window(self) -> None:
        """Delete a window."""
        name = self.world.name("w", WINDOWS)
        gone = await self.world.ask("DELETE", f"/admin/windows/{name}", _GONE)
        self.world.deleted[name] += gone is not None

    async def delete_session(self) -> None:
        """Delete a session."""
        session = self.world.name("s", SESSIONS)
        self.world.uncertain.add(session)
        await self.world.ask("DELETE", f"/admin/sessions/{session}", _GONE | _BUSY)

    async def lose(self) -> None:
        """LMCache evicts some of what it has, from memory or from disk."""
        evicted = self.world.cache.some(self.world.random, 0.3)
        self.world.log.append(f"evicted {evicted} objects")


WEIGHTS: Mapping[Operation, int] = {
    Client.turn: 25, Client.edit: 10, Client.regenerate: 5, Client.branch: 4, Client.freeze: 18, Client.clone: 8,
    Client.thaw: 8, Client.fan_out: 2, Client.question: 3, Client.look: 3, Client.verify: 3, Client.move: 3,
    Client.describe: 2, Client.copy_by_file: 4, Client.delete_window: 9, Client.delete_session: 6, Client.lose: 3,
}  # fmt: skip


async def run(world: World, steps: int) -> None:
    """Do so many operations, and look after each round."""
    clients = [Client(world) for _ in range(CLIENTS)]
    operations, weights = list(WEIGHTS), list(WEIGHTS.values())
    while world.steps < steps:
        plans = [world.random.choices(operations, weights, k=PER_ROUND) for _ in clients]
        await asyncio.gather(*(_do(client, plan) for client, plan in zip(clients, plans, strict=True)))
        world.steps += CLIENTS * PER_ROUND
        await _check(world, thoroughly=world.steps % 5 == 0 or world.steps >= steps)
    await _clean_up(world)


async def _do(client: Client, plan: list[Operation]) -> None:
    for operation in plan:
        await operation(client)


async def _check(world: World, *, thoroughly: bool) -> None:
    """Check everything while no request is in flight."""
    there = await _windows_there(world)
    for name in there:
        text = await _text_of(world, name)
        before = world.windows.get(name) if not world.deleted[name] else None
        if before is not None and before != text:
            raise Broken(f"window {name} had {before}, and has {text}")
        if not world.explained(text):
            raise Broken(f"window {name} has a text that no session had: {text}")
        world.windows[name] = text
        verdict = await world.must("POST", f"/admin/windows/{name}/verify")
        if not verdict.json()["ok"]:
            raise Broken(f"verify of {name}: {verdict.text}")
    if thoroughly and there:
        await _same_everywhere(world, world.random.choice(sorted(there)))
    await _nothing_else_is_pinned(world)
    await _turns_are_recorded_once(world)
    for cut in [one for one in world.uncertain if one.startswith("cut ") and not world.deleted[one[4:]]]:
        raise Broken(f"an export of a window that was not deleted was {cut}")
    world.uncertain.clear()
    world.created.clear()
    world.deleted.clear()


async def _windows_there(world: World) -> set[str]:
    """The windows that there are: those that there were, with what was made and without what was deleted.

    A window is made only where none of its name is there, and deleted only where one is, so in whatever order that
    was, the numbers tell what is left.
    """
    listed = await world.must("GET", "/admin/windows?limit=100")
    there = {one["name"] for one in listed.json()["windows"]}
    for name in {*there, *world.windows, *world.created}:
        expected = (name in world.windows) + world.created[name] - world.deleted[name]
        if expected != (name in there):
            made = f"was there {name in world.windows}, made {world.created[name]}, deleted {world.deleted[name]}"
            raise Broken(f"window {name}: {made}, there now: {name in there}")
    for name in set(world.windows) - there:
        del world.windows[name]
    return there


async def _text_of(world: World, name: str) -> Said:
    found = await world.must("GET", f"/admin/windows/{name}/messages")
    return said(found.json()["messages"])


async def _same_everywhere(world: World, name: str) -> None:
    """A thaw, and an export with an import, give what the window has."""
    status = await world.must("GET", f"/admin/windows/{name}")
    thawed = await world.must("POST", f"/admin/windows/{name}/thaw", json={"new_session_id": "t", "warm": "cpu"})
    frozen = await world.must("POST", "/admin/windows", json={"session_id": "t", "window_name": "of-t"})
    exported = await world.must("GET", f"/admin/windows/{name}/export")
    imported = await world.must("POST", "/admin/windows/import?window_name=of-file", content=exported.content)
    tokens = {one.json()["token_count"] for one in (status, thawed, frozen, imported)}
    receipt = thawed.json()["receipt"]
    texts = {await _text_of(world, one) for one in (name, "of-t", "of-file")}
    verdict = await world.must("POST", "/admin/windows/of-file/verify")
    chunks = status.json()["kv_cache"]["block_count"]
    if len(tokens) != 1 or len(texts) != 1 or not verdict.json()["ok"] or receipt["chunks_found"] != chunks:
        raise Broken(f"{name}: {tokens} tokens, texts {texts}, of {chunks} chunks {receipt}, import {verdict.text}")
    for window in ("of-t", "of-file"):
        await world.must("DELETE", f"/admin/windows/{window}")
    await world.ask("DELETE", "/admin/sessions/t", _GONE if world.forgets else set())


async def _nothing_else_is_pinned(world: World) -> None:
    (folder,) = (world.kv.parent / "kv-pins").iterdir()
    pinned = {path.name for path in folder.iterdir()}
    with closing(sqlite3.connect(world.data_dir / "gateway.db")) as db:
        held = {_file_name(key) for (key,) in db.execute("SELECT key FROM objects")}
        in_use = """SELECT o.key FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest
            JOIN objects o ON o.number = m.object"""
        of_windows = {_file_name(key) for (key,) in db.execute(in_use)}
    if pinned != held or held != of_windows:
        raise Broken(f"pinned {len(pinned)}, known {len(held)}, of windows {len(of_windows)}: {pinned ^ of_windows}")


def _file_name(key: str) -> str:
    model, rank, group, digest, salt = key.rsplit("@", 4)
    return f"{model.replace('/', '-SEP-')}@0x{rank}@{group}@{digest}@{salt}.data"


async def _turns_are_recorded_once(world: World) -> None:
    for session in sorted(world.turns):
        found = await world.ask("GET", f"/admin/sessions/{session}", _GONE)
        count = found.json()["turn_count"] if found is not None else 0
        certain = session not in world.uncertain and not world.forgets
        if certain and session.startswith("s") and "-" not in session and count != world.turns[session]:
            raise Broken(f"session {session} has {count} turns, and had {world.turns[session]}")
        world.turns[session] = count
        if not count:
            del world.turns[session]


async def _clean_up(world: World) -> None:
    """Delete everything: nothing is left, in the tier or pinned."""
    for name in sorted(world.windows):
        await world.must("DELETE", f"/admin/windows/{name}")
    listed = await world.must("GET", "/admin/sessions?limit=100")
    for session in listed.json()["sessions"]:
        await world.ask("DELETE", f"/admin/sessions/{session['id']}", _GONE)
    end = time.monotonic() + _QUIET_S
    while left := [path.name for path in world.kv.iterdir()]:
        if time.monotonic() > end:
            raise Broken(f"{len(left)} objects are left of nothing: {left[:3]}")
        await asyncio.sleep(0.1)  # the next sweep
    (folder,) = (world.kv.parent / "kv-pins").iterdir()
    if list(folder.iterdir()):
        raise Broken("there are pins of nothing")
