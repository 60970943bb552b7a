"""A conversation as its client holds it, and the requests that it makes, each with what is true of it kept aside."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from loadtests.identity_clients import CLIENTS, Client
from loadtests.scripted_upstream import MODEL, Kind, Message, kind_of, reply, seed_of

# What a request truly is: the first of a conversation, one that goes on with its conversation, or the first of a
# conversation that goes on from an older point of another.
Truth = Literal["new", "same", "fork"]
# The system message at a moment: some clients write it anew each time, some have none.
System = Callable[[float], Message | None]

TOOLS = ("read", "bash", "edit", "task")
"""Names of an agent's tools."""


@dataclass(eq=False, slots=True)
class Request:
    """One request, and the truth about it: `truth`, `conversation`, and for a fork `of`, the conversation it left.

    `trace` is the kind of the conversation and `step` what happens here, both for the report. It is sent when all of
    `after` are over and `pause_s` has passed; `at` is the order in which those that could be sent are.
    """

    number: int
    conversation: str
    trace: str
    step: str
    truth: Truth
    messages: list[Message] = field(repr=False)
    seed: int
    stream: bool
    tools: tuple[str, ...]
    client: str
    at: float
    of: str = ""
    after: "list[Request]" = field(default_factory=list, repr=False)
    pause_s: float = 0.0

    @property
    def kind(self) -> Kind:
        """What the engine will do."""
        return kind_of(self.seed)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent: nothing in it names the conversation; the seed is this one request's chance."""
        body: dict[str, Any] = {"model": MODEL, "seed": self.seed, "stream": self.stream, "messages": self.messages}
        return {**body, "tools": [_tool(name) for name in self.tools]} if self.tools else body


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


class World:
    """All requests of a replay, and the chance that made them."""

    def __init__(self, seed: int, span: float, pause_s: float) -> None:
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.pause_s = pause_s  # before a client tries again; seconds, where people and SDKs wait for many
        self._span = span
        self._talks = 0
        self._luck = 0

    def moment(self) -> float:
        """When a conversation begins."""
        return self.rng.uniform(0, self._span)

    def name(self, trace: str) -> str:
        """Name a conversation."""
        self._talks += 1
        return f"{trace} {self._talks}"

    def luck(self) -> int:
        """What no other request is dealt."""
        self._luck += 1
        return self._luck


class Talk:
    """One conversation of a client. `history` is all but the system message, as the client keeps it."""

    def __init__(
        self,
        world: World,
        trace: str,
        system: System | None,
        *,
        client: Client | None = None,
        tools: tuple[str, ...] = (),
        at: float,
    ) -> None:
        self.world = world
        self.trace = trace
        self.name = world.name(trace)
        self.client = client or world.rng.choice(CLIENTS)
        self.history: list[Message] = []
        self.last: Request | None = None
        self.waits_for: list[Request] = []
        self.at = at
        self._system = system
        self._tools = tools
        self._streams = world.rng.random() < 0.7
        self._left = ""  # the conversation that this one forked from

    def say(self, text: str) -> "Talk":
        """The user's message."""
        self.history.append({"role": "user", "content": text})
        return self

    def ask(
        self, kind: Kind = Kind.TEXT, step: str = "", *, luck: int | None = None, truth: Truth | None = None
    ) -> Request:
        """Send what there is; the reply is not taken into the history."""
        world = self.world
        self.at += world.rng.expovariate(1) if self.last else 0
        opens: Truth = "fork" if self._left else "new"
        request = Request(
            number=len(world.requests),
            conversation=self.name,
            trace=self.trace,
            step=step or ("next turn" if self.last else "first turn"),
            truth=truth or ("same" if self.last else opens),
            messages=self._sent(),
            seed=seed_of(kind, world.luck() if luck is None else luck),
            stream=self._streams or kind is Kind.CUT,
            tools=self._tools,
            client=self.client.name,
            at=self.at,
            of="" if self.last else self._left,
            after=[*([self.last] if self.last else []), *self.waits_for],
        )
        self.last, self.waits_for = request, []
        world.requests.append(request)
        return request

    def _sent(self) -> list[Message]:
        system = self._system(self.at) if self._system else None
        return self.client.dress([*([system] if system else []), *self.history])

    def turn(self, kind: Kind = Kind.TEXT, step: str = "", *, luck: int | None = None) -> Request:
        """Send what there is and take the reply into the history."""
        request = self.ask(kind, step, luck=luck)
        self.take(request)
        return request

    def take(self, request: Request) -> None:
        """Keep a reply."""
        self.history.append(self.client.back(reply(request.seed)))

    def again(self, step: str, kind: Kind = Kind.TEXT) -> Request:
        """Send the last request once more, after a while."""
        request = self.ask(kind, step)
        request.pause_s = self.world.pause_s
        return request

    def results(self) -> None:
        """What the tools said that the last reply called."""
        rng = self.world.rng
        for call in self.history[-1].get("tool_calls") or ():
            self.history.append({"role": "tool", "tool_call_id": call["id"], "content": output(rng)})

    def fork(
        self, keep: int, *, trace: str = "", system: System | None = None, tools: tuple[str, ...] | None = None
    ) -> "Talk":
        """Another conversation that shares the first `keep` messages with this; of a sub-agent, with its own prompt."""
        other = Talk(
            self.world,
            trace or self.trace,
            system or self._system,
            client=self.client,
            tools=self._tools if tools is None else tools,
            at=self.at,
        )
        other.history, other._left = self.history[:keep], self.name
        other.waits_for = [self.last] if self.last else []
        return other


def output(rng: random.Random) -> str:
    """What a tool prints."""
    if rng.random() < 0.15:  # nothing, or the same as so often
        return rng.choice(("", "ok", "Error: file not found"))
    return "\n".join(f"{rng.randint(1, 999):>4}  {phrase(rng)}" for _ in range(rng.randint(1, 40)))


def phrase(rng: random.Random) -> str:
    """Some words."""
    return " ".join(rng.choices(_WORDS, k=rng.randint(4, 14)))


def waits(talks: Iterable[Talk]) -> list[Request]:
    """The last requests of some conversations."""
    return [talk.last for talk in talks if talk.last]


_PROSE = (
    "please find why this test fails only on the second run and fix what is wrong without touching its file then show "
    "me a diff of the change in two lines import os return value if not known else raise Größe 数据 index query commit"
)
_WORDS = _PROSE.split()
