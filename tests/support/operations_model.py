"""Random operations of several clients at once against a running gateway, and what must hold whenever all are done.

A round is a handful of operations for each client; what they do comes from one seed, in which order the gateway does it
does not. So nothing here expects an order. After each round everything is quiet, and then:

- every window that was acknowledged, and not deleted since, is there, and no other;
- it has the text that its session had, the same one each time that it is looked at;
- `verify` finds every byte, a thaw and an export with an import give the same text and the same tokens;
- what is pinned on disk is what the windows hold, nothing less and nothing more;
- each turn that was answered is recorded once, unless its session was deleted;
- a session that was taken back to a window has the window's text up to that turn;
- nothing was answered by a 5xx, or by an error that its operation cannot have.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support import operations_checks
from tests.support.fakes.engine import MODEL
from tests.support.operations_world import GONE, NO_SESSION, REPLY, Broken, World, said

CLIENTS = 4
PER_ROUND = 4  # operations of each client between two looks
SESSIONS = 4
WINDOWS = 6
_LONGEST = 7  # messages; then a client begins a new conversation
_TAKEN = {(409, "window_already_exists"), (409, "session_already_exists")}
_EMPTY = {(400, "invalid_request")}  # of a session without a finished turn
_NO_SUCH_TURN = {(400, "invalid_request")}  # of this window; or the session is of another lineage
_BUSY = {(409, "session_busy")}

Operation = Callable[["Client"], Coroutine[Any, Any, None]]


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
            "POST", "/v1/chat/completions", {NO_SESSION}, session, json=asked, headers=headers
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
        answer = await self.world.ask("POST", path, GONE, json={"model": MODEL, "messages": [message]})
        if answer is not None:
            session = answer.headers["x-session-id"]
            self.world.turns[session] += 1
            await self._keep_branch(session, message)

    async def _keep_branch(self, session: str, message: dict[str, Any]) -> None:
        """Freeze a branch and thaw its window: what was in front of the message is still in front of it."""
        name = f"{session[:100]}-w"
        frozen = await self.world.ask(
            "POST", "/admin/windows", GONE | _BUSY, json={"session_id": session, "window_name": name}
        )
        if frozen is None:
            return
        found = await self.world.must("GET", f"/admin/windows/{name}/messages")
        text = said(found.json()["messages"])
        if len(text) < 4 or text[-2:] != said([message, REPLY]):
            raise Broken(f"a branch has {text}, and not a window's text before {message}")
        await self.world.must("DELETE", f"/admin/windows/{name}")
        await self.world.ask("DELETE", f"/admin/sessions/{session}", GONE)

    # Windows.

    async def freeze(self) -> None:
        """Freeze a session."""
        session, name = self.world.name("s", SESSIONS), self.world.name("w", WINDOWS)
        asked = {"session_id": session, "window_name": name}
        await self._make(name, "POST", "/admin/windows", GONE | _TAKEN | _EMPTY | _BUSY, json=asked)

    async def clone(self) -> None:
        """Give a window a second name."""
        source, name = self.world.name("w", WINDOWS), self.world.name("w", WINDOWS)
        asked = {"target_window": name, "isolate": self.world.random.random() < 0.5, **self._turn_of_window()}
        await self._make(name, "POST", f"/admin/windows/{source}/clone", GONE | _TAKEN | _NO_SUCH_TURN, json=asked)

    async def _make(self, name: str, method: str, path: str, allowed: set[tuple[int, str]], **more: Any) -> bool:
        made = await self.world.ask(method, path, allowed, str(more.get("json", name)), **more)
        self.world.created[name] += made is not None
        return made is not None

    async def thaw(self) -> None:
        """Thaw a window into one of the sessions, and continue there if that worked."""
        window, session = self.world.name("w", WINDOWS), self.world.name("s", SESSIONS)
        warm = self.world.random.choice(["none", "cpu", "gpu"])
        asked = {"new_session_id": session, "warm": warm, **self._turn_of_window()}
        self.world.uncertain.add(session)  # its text is the window's, which may be another one by now
        thawed = await self.world.ask(
            "POST", f"/admin/windows/{window}/thaw", GONE | _TAKEN | _NO_SUCH_TURN, str(asked), json=asked
        )
        if thawed is not None:
            self.views.pop(session, None)

    def _turn_of_window(self) -> dict[str, int]:
        """An earlier turn now and then; the window may be too short for it."""
        return {"at_turn": self.world.random.randint(1, 3)} if self.world.random.random() < 0.4 else {}

    async def take_back(self) -> None:
        """Take a session back to a window, and perhaps keep what it has; it may be of another lineage."""
        window, session, kept = (self.world.name(*of) for of in (("w", WINDOWS), ("s", SESSIONS), ("w", WINDOWS)))
        asked: dict[str, Any] = {"into_session": session, **self._turn_of_window()}
        if self.world.random.random() < 0.3:
            asked["keep_as"] = kept

        def note_kept(error: dict[str, Any]) -> None:
            self.world.created[kept] += "kept_as" in error["details"]

        allowed = GONE | _TAKEN | _BUSY | _NO_SUCH_TURN
        path = f"/admin/windows/{window}/thaw"
        done = await self.world.ask("POST", path, allowed, str(asked), note_kept, json=asked)
        if done is None:
            return
        self.views.pop(session, None)
        self.world.created[kept] += "keep_as" in asked
        if "keep_as" in asked and done.json()["replaced"]["kept_in"] is None:
            raise Broken(f"{session} was kept as {kept}: {done.text}")

    async def fan_out(self) -> None:
        """Thaw a window into many sessions, and delete them again."""
        self.world.latest += 1
        window, prefix = self.world.name("w", WINDOWS), f"f{self.world.latest}"
        asked = {"count": 3, "prefix": prefix}
        if await self.world.ask("POST", f"/admin/windows/{window}/fanout", GONE | _TAKEN, json=asked):
            for number in range(1, 4):
                await self.world.ask("DELETE", f"/admin/sessions/{prefix}-{number}", GONE)

    async def question(self) -> None:
        """Ask a window a question."""
        await self.world.ask(
            "POST", f"/admin/windows/{self.world.name('w', WINDOWS)}/ask", GONE, json={"question": "and?"}
        )

    async def look(self) -> None:
        """Read a window's status and text, which is always complete."""
        window = self.world.name("w", WINDOWS)
        found = await self.world.ask("GET", f"/admin/windows/{window}/messages", GONE)
        if found is not None and not found.json()["messages"]:
            raise Broken(f"{window} has no text")
        await self.world.ask("GET", f"/admin/windows/{window}?include_blocks=true&include_lineage=true", GONE)

    async def verify(self) -> None:
        """Verify a window, whatever else happens."""
        window = self.world.name("w", WINDOWS)
        verdict = await self.world.ask("POST", f"/admin/windows/{window}/verify", GONE)
        if verdict is not None and not verdict.json()["ok"]:
            raise Broken(f"verify: {verdict.text}")

    async def move(self) -> None:
        """Load a window's KV into the cache's memory, or drop it from there."""
        operation = self.world.random.choice(["prefetch", "evict"])
        await self.world.ask("POST", f"/admin/windows/{self.world.name('w', WINDOWS)}/{operation}", GONE)

    async def describe(self) -> None:
        """Say something else of a window."""
        window = self.world.name("w", WINDOWS)
        await self.world.ask("PATCH", f"/admin/windows/{window}", GONE, json={"description": "d", "tags": ["a"]})

    async def copy_by_file(self) -> None:
        """Export a window and import it under another name."""
        source, name = self.world.name("w", WINDOWS), self.world.name("w", WINDOWS)
        try:
            exported = await self.world.ask("GET", f"/admin/windows/{source}/export", GONE)
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
        gone = await self.world.ask("DELETE", f"/admin/windows/{name}", GONE)
        self.world.deleted[name] += gone is not None

    async def delete_session(self) -> None:
        """Delete a session."""
        session = self.world.name("s", SESSIONS)
        self.world.uncertain.add(session)
        await self.world.ask("DELETE", f"/admin/sessions/{session}", GONE | _BUSY)

    async def lose(self) -> None:
        """LMCache evicts some of what it has, from memory or from disk."""
        evicted = self.world.cache.some(self.world.random, 0.3)
        self.world.log.append(f"evicted {evicted} objects")


WEIGHTS: Mapping[Operation, int] = {
    Client.turn: 25, Client.edit: 10, Client.regenerate: 5, Client.branch: 4, Client.freeze: 18, Client.clone: 8,
    Client.thaw: 8, Client.take_back: 10, Client.fan_out: 2, Client.question: 3, Client.look: 3, Client.verify: 3,
    Client.move: 3,
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
        await operations_checks.check(world, thoroughly=world.steps % 5 == 0 or world.steps >= steps)
    await operations_checks.clean_up(world)


async def _do(client: Client, plan: list[Operation]) -> None:
    for operation in plan:
        await operation(client)
