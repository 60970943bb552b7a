"""Mixed traffic: conversations with and without ids, tool loops, every operation, disconnects and invalid requests."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
_MAX_SESSIONS, _MAX_WINDOWS, _MAX_TURNS, _MAX_IDLE_SESSIONS = 60, 24, 8, 100
_FAILURES_KEPT = 40
_PREFIX = "soak-"
_TOOLS = [
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    }
]
_BAD_BODIES = (
    b"no json", b"[1, 2]", b"{}", b'{"model": 7}', b'{"model": "demo", "messages": "no list"}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', b'{"messages": [{"role": 7}]}', b"\xff\xfe",
)  # fmt: skip

Message = dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """A conversation with an id; one action uses it at a time."""

    name: str
    messages: list[Message] = field(default_factory=list)
    turns: int = 0


@dataclass(frozen=True, slots=True)
class Pace:
    """The intensity of the traffic. `words` of a question, `tokens` of a reply."""

    per_s: float
    concurrency: int
    words: int
    tokens: int


class Unexpected(Exception):
    """A response that the traffic does not allow for."""


class Traffic:
    """Sends requests at an even rate; records failures."""

    def __init__(self, url: str, model: str, pace: Pace, dialects: Collection[str], *, strict: bool) -> None:
        """`strict`: the engine refuses invalid requests."""
        self._url, self._model, self._pace = url, model, pace
        self._refusals = (400, 404, 405, 422) if strict else (200, 400, 404, 405, 422)
        self._random = random.Random(1)
        self._number = itertools.count()
        self._http = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=pace.concurrency))
        self._conversations: list[Conversation] = []
        self._idle_sessions: dict[str, None] = {}  # sessions that are no longer used, oldest first
        self._windows: list[str] = []
        self.actions: Counter[str] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.failures: list[str] = []
        self.failed = 0
        self._weights = {**_WEIGHTS, **{_DIALECTS[path]: 8 for path in dialects}}

    @property
    def requests(self) -> int:
        """The number of finished actions."""
        return self.actions.total()

    async def run(self, seconds: float) -> None:
        """Send requests for that many seconds, and return once every response has arrived."""
        slots = asyncio.Semaphore(self._pace.concurrency)
        end, due = time.monotonic() + seconds, time.monotonic()
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                await slots.acquire()
                action = self._random.choices(list(self._weights), list(self._weights.values()))[0]
                group.create_task(self._act(action, slots))
                due = max(due + 1 / self._pace.per_s, time.monotonic() - 1)
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _act(self, action: Callable[["Traffic"], Awaitable[None]], slots: asyncio.Semaphore) -> None:
        name = action.__name__
        try:
            await action(self)
        except (Unexpected, httpx.HTTPError, OSError, TimeoutError) as error:
            self.failed += 1
            if len(self.failures) < _FAILURES_KEPT:
                self.failures.append(f"{name}: {type(error).__name__}: {error}"[:400])
        finally:
            self.actions[name] += 1
            slots.release()

    async def request(
        self, method: str, path: str, expected: Sequence[int], *, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """Send a request. Raises Unexpected for a status other than the expected ones."""
        answer = await self._http.request(method, path, headers=headers, **more)
        self.answers[_route(method, path), answer.status_code] += 1
        session = answer.headers.get("x-session-id", "")
        if session and not session.startswith(_PREFIX):
            self._idle_sessions[session] = None
        if answer.status_code not in expected:
            raise Unexpected(f"{method} {path} was answered {answer.status_code}: {answer.text[:200]}")
        return answer

    # Turns.

    async def chat(self) -> None:
        """The next turn of a conversation by id, in one piece."""
        await self._turn(stream=False)

    async def stream(self) -> None:
        """The next turn of a conversation by id, streamed."""
        await self._turn(stream=True)

    async def anonymous(self) -> None:
        """A conversation of two turns without an id."""
        messages = [self._question()]
        for _ in range(2):
            reply = await self._complete(CHAT, self._body(messages, stream=False), None)
            messages += [reply, self._question()]

    async def tool_loop(self) -> None:
        """A turn whose history has two calls of a tool and their results, by an id."""
        async with _Checkout(self) as conversation:
            call = f"call_{next(self._number)}"
            calls = [{"id": call, "type": "function", "function": {"name": "now", "arguments": "{}"}}]
            conversation.messages += [
                self._question(),
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": call, "content": time.ctime()},
            ]
            body = {**self._body(conversation.messages, stream=True), "tools": _TOOLS}
            conversation.messages.append(await self._complete(CHAT, body, conversation.name))

    async def completion(self) -> None:
        """A completion of a text."""
        body = {"model": self._model, "prompt": self._question()["content"], "max_tokens": self._pace.tokens}
        await self.request("POST", COMPLETIONS, (200,), json=body)

    async def responses(self) -> None:
        """A Responses request, streamed or not."""
        body = {"model": self._model, "input": self._question()["content"], "max_output_tokens": self._pace.tokens}
        await self.request("POST", RESPONSES, (200,), json={**body, "stream": self._random.random() < 0.5})

    async def messages(self) -> None:
        """A Messages request, streamed or not."""
        body = {"model": self._model, "messages": [self._question()], "max_tokens": self._pace.tokens}
        await self.request("POST", MESSAGES, (200,), json={**body, "stream": self._random.random() < 0.5})

    async def _turn(self, *, stream: bool) -> None:
        async with _Checkout(self) as conversation:
            conversation.messages.append(self._question())
            # A session is named by a header or by the base URL.
            by_url = self._random.random() < 0.3
            path = f"/s/{conversation.name}{CHAT}" if by_url else CHAT
            body = self._body(conversation.messages, stream=stream)
            conversation.messages.append(await self._complete(path, body, None if by_url else conversation.name))

    async def _complete(self, path: str, body: dict[str, Any], session: str | None) -> Message:
        headers = {"x-session-id": session} if session else {}
        answer = await self.request("POST", path, (200,), json=body, headers=headers)
        text = _streamed_text(answer.text) if body["stream"] else answer.json()["choices"][0]["message"]["content"]
        return {"role": "assistant", "content": text or "..."}

    # Disconnects and invalid requests.

    async def leave_early(self) -> None:
        """Disconnect before the first byte."""
        await self._leave(reads=False)

    async def leave_midway(self) -> None:
        """Disconnect in the middle of the stream."""
        await self._leave(reads=True)

    async def bad_input(self) -> None:
        """Send an invalid body or session id."""
        headers = {"x-session-id": "no good/"} if self._random.random() < 0.2 else {}
        path = self._random.choice(
            (CHAT, CHAT, "/admin/windows", "/v1/nothing", "/w/no-such-window/v1/chat/completions")
        )
        content = self._random.choice(_BAD_BODIES)
        await self.request("POST", path, self._refusals, content=content, headers=headers)

    async def _leave(self, *, reads: bool) -> None:
        address = urlsplit(self._url)
        body = json.dumps(self._body([self._question()], stream=True) | {"max_tokens": 400}).encode()
        name = f"left-{next(self._number)}"
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-session-id: {name}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            if reads:
                status = await asyncio.wait_for(reader.readline(), 60)
                if b" 200 " not in status:
                    raise Unexpected(f"a stream was answered {status.decode()}")
                await asyncio.wait_for(reader.readuntil(b"data: "), 60)
        finally:
            writer.transport.abort()
        self._idle_sessions[name] = None

    # Window operations and lists.

    async def freeze(self) -> None:
        """Freeze a conversation, unless there are enough windows."""
        if len(self._windows) >= _MAX_WINDOWS:
            await self.delete_window()
            return
        async with _Checkout(self, old=True) as conversation:
            if not conversation.turns:
                return
            name = f"w-{next(self._number)}"
            body = {"session_id": conversation.name, "window_name": name, "tags": ["soak"]}
            await self.request("POST", "/admin/windows", (201,), json=body)
            self._windows.append(name)

    async def thaw(self) -> None:
        """Thaw a window, and continue in the new session."""
        if not self._windows:
            return
        name = self._random.choice(self._windows)
        warm = self._random.choice(("none", "cpu", "gpu"))
        answer = await self.request("POST", f"/admin/windows/{name}/thaw", (200, 404), json={"warm": warm})
        if answer.status_code == 200:  # otherwise it has just been deleted
            session = answer.json()["session_id"]
            await self._complete(CHAT, self._body([self._question()], stream=False), session)

    async def branch(self) -> None:
        """Start a conversation from a window by its base URL."""
        if self._windows:
            name = self._random.choice(self._windows)
            body = self._body([self._question()], stream=False)
            await self.request("POST", f"/w/{name}{CHAT}", (200, 404), json=body)

    async def clone(self) -> None:
        """Clone a window."""
        if self._windows and len(self._windows) < _MAX_WINDOWS:
            source, target = self._random.choice(self._windows), f"c-{next(self._number)}"
            body = {"target_window": target}
            answer = await self.request("POST", f"/admin/windows/{source}/clone", (201, 404), json=body)
            if answer.status_code == 201:
                self._windows.append(target)

    async def delete_window(self) -> None:
        """Delete a window."""
        if self._windows:
            name = self._windows.pop(self._random.randrange(len(self._windows)))
            await self.request("DELETE", f"/admin/windows/{name}", (200,))

    async def delete_session(self) -> None:
        """Delete sessions that are no longer used, to limit their number."""
        while len(self._idle_sessions) > _MAX_IDLE_SESSIONS:
            name = next(iter(self._idle_sessions))
            del self._idle_sessions[name]
            # A client may have disconnected before its session began, or its turn may still be in flight.
            await self.request("DELETE", f"/admin/sessions/{name}", (200, 404, 409))
        if len(self._conversations) > _MAX_SESSIONS // 2:
            await self.request("DELETE", f"/admin/sessions/{self._conversations.pop(0).name}", (200, 404))

    async def lists(self) -> None:
        """Read what an operator looks at."""
        path = self._random.choice(
            ("/admin/sessions?limit=20", "/admin/windows?sort_by=size", "/admin/windows?tags=soak", "/admin/health",
             "/v1/models", "/healthz", "/readyz", "/admin/sessions?state=frozen")
        )  # fmt: skip
        await self.request("GET", path, (200,))
        if self._windows:
            name = self._random.choice(self._windows)
            await self.request("GET", f"/admin/windows/{name}?include_blocks=true&include_lineage=true", (200, 404))

    # Shared helpers.

    def take(self, *, old: bool) -> Conversation:
        """Return a conversation to continue, or now and then a new one; never one that is in use or has become long."""
        if self._conversations and (old or len(self._conversations) >= _MAX_SESSIONS or self._random.random() < 0.8):
            return self._conversations.pop(self._random.randrange(len(self._conversations)))
        return Conversation(f"{_PREFIX}{next(self._number)}")

    def give_back(self, conversation: Conversation) -> None:
        """Return a conversation after a turn."""
        conversation.turns += 1
        if conversation.turns >= _MAX_TURNS:
            self._idle_sessions[conversation.name] = None
        else:
            self._conversations.append(conversation)

    def _question(self) -> Message:
        words = (f"{self._random.randrange(10**6)}" for _ in range(self._random.randint(3, self._pace.words)))
        return {"role": "user", "content": f"{next(self._number)}: {' '.join(words)}?"}

    def _body(self, messages: Sequence[Message], *, stream: bool) -> dict[str, Any]:
        return {"model": self._model, "messages": list(messages), "stream": stream, "max_tokens": self._pace.tokens}


class _Checkout:
    """A conversation that one action uses exclusively."""

    def __init__(self, traffic: Traffic, *, old: bool = False) -> None:
        self._traffic = traffic
        self._old = old

    async def __aenter__(self) -> Conversation:
        self._talk = self._traffic.take(old=self._old)
        return self._talk

    async def __aexit__(self, *failed: object) -> None:
        if failed[0] is None:
            self._traffic.give_back(self._talk)


_WEIGHTS: dict[Callable[[Traffic], Awaitable[None]], int] = {
    Traffic.chat: 16,
    Traffic.stream: 22,
    Traffic.anonymous: 8,
    Traffic.tool_loop: 8,
    Traffic.completion: 3,
    Traffic.leave_early: 5,
    Traffic.leave_midway: 5,
    Traffic.bad_input: 8,
    Traffic.freeze: 4,
    Traffic.thaw: 4,
    Traffic.branch: 3,
    Traffic.clone: 2,
    Traffic.delete_window: 4,
    Traffic.delete_session: 8,
    Traffic.lists: 6,
}
_DIALECTS = {RESPONSES: Traffic.responses, MESSAGES: Traffic.messages}


def _route(method: str, path: str) -> str:
    """Return the method and the path, with `*` for a name."""
    parts = path.partition("?")[0].split("/")
    name_at = {"s": 2, "w": 2, "admin": 3}.get(parts[1], 99)
    return f"{method} {'/'.join('*' if at == name_at else part for at, part in enumerate(parts))}"


def _streamed_text(text: str) -> str:
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if any("error" in event for event in events):
        raise Unexpected(f"an error in mid-stream: {text[-300:]}")
    if not text.rstrip().endswith("data: [DONE]"):
        raise Unexpected(f"a stream without an end: {text[-300:]}")
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
