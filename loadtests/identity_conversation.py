"""A conversation as its client keeps it, and its requests, each labelled with its true conversation."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from loadtests.identity_client_styles import CLIENTS, Client
from loadtests.scripted_upstream import MODEL, Kind, Message, kind_of, reply, seed_of

# What a request truly is: the first of a new conversation, a continuation of its conversation, or the first of a
# conversation that continues from an earlier point of another.
Relation = Literal["new", "same", "fork"]
# Returns the system message at a time: some clients rewrite it for each request, some have none.
SystemPrompt = Callable[[float], Message | None]

TOOLS = ("read", "bash", "edit", "task")
"""Names of an agent's tools."""


@dataclass(eq=False, slots=True)
class Request:
    """One request, labelled with its true `relation` and `conversation`; a fork also with `forked_from`.

    `trace` is the kind of the conversation and `step` what happens here, both for the report. It is sent once all of
    `after` have finished and `pause_s` has passed; requests that are ready are sent in the order of `at`.
    """

    number: int
    conversation: str
    trace: str
    step: str
    relation: Relation
    messages: list[Message] = field(repr=False)
    seed: int
    stream: bool
    tools: tuple[str, ...]
    client: str
    at: float
    forked_from: str = ""
    after: "list[Request]" = field(default_factory=list, repr=False)
    pause_s: float = 0.0

    @property
    def kind(self) -> Kind:
        """What the engine does with it."""
        return kind_of(self.seed)

    @property
    def body(self) -> dict[str, Any]:
        """The body to send, which never names the conversation; the seed selects the reply to this request alone."""
        body: dict[str, Any] = {"model": MODEL, "seed": self.seed, "stream": self.stream, "messages": self.messages}
        return {**body, "tools": [_tool(name) for name in self.tools]} if self.tools else body


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


class TraceBuilder:
    """Collects all requests of a replay, and holds the random numbers that generate them."""

    def __init__(self, seed: int, span: float, pause_s: float) -> None:
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.pause_s = pause_s  # before a client retries; shorter than people and SDKs wait
        self._span = span
        self._conversations = 0
        self._samples = 0

    def random_start(self) -> float:
        """Return a random start time for a conversation."""
        return self.rng.uniform(0, self._span)

    def new_name(self, trace: str) -> str:
        """Return a new name for a conversation."""
        self._conversations += 1
        return f"{trace} {self._conversations}"

    def next_sample(self) -> int:
        """Return a sample number that no other request has, so that its reply is its own."""
        self._samples += 1
        return self._samples


class Conversation:
    """One conversation of a client. `history` is all but the system message, as the client keeps it."""

    def __init__(
        self,
        builder: TraceBuilder,
        trace: str,
        system: SystemPrompt | None,
        *,
        client: Client | None = None,
        tools: tuple[str, ...] = (),
        at: float,
    ) -> None:
        self.builder = builder
        self.trace = trace
        self.name = builder.new_name(trace)
        self.client = client or builder.rng.choice(CLIENTS)
        self.history: list[Message] = []
        self.last: Request | None = None
        self.depends_on: list[Request] = []
        self.at = at
        self._system = system
        self._tools = tools
        self._streams = builder.rng.random() < 0.7
        self._forked_from = ""  # the conversation that this one forked from

    def add_user(self, text: str) -> "Conversation":
        """Append a message of the user."""
        self.history.append({"role": "user", "content": text})
        return self

    def send(
        self, kind: Kind = Kind.TEXT, step: str = "", *, sample: int | None = None, relation: Relation | None = None
    ) -> Request:
        """Send the history; the reply is not added to it."""
        builder = self.builder
        self.at += builder.rng.expovariate(1) if self.last else 0
        first: Relation = "fork" if self._forked_from else "new"
        request = Request(
            number=len(builder.requests),
            conversation=self.name,
            trace=self.trace,
            step=step or ("next turn" if self.last else "first turn"),
            relation=relation or ("same" if self.last else first),
            messages=self._messages(),
            seed=seed_of(kind, builder.next_sample() if sample is None else sample),
            stream=self._streams or kind is Kind.CUT,
            tools=self._tools,
            client=self.client.name,
            at=self.at,
            forked_from="" if self.last else self._forked_from,
            after=[*([self.last] if self.last else []), *self.depends_on],
        )
        self.last, self.depends_on = request, []
        builder.requests.append(request)
        return request

    def _messages(self) -> list[Message]:
        system = self._system(self.at) if self._system else None
        return self.client.prepare([*([system] if system else []), *self.history])

    def turn(self, kind: Kind = Kind.TEXT, step: str = "", *, sample: int | None = None) -> Request:
        """Send the history, and add the reply to it."""
        request = self.send(kind, step, sample=sample)
        self.add_reply(request)
        return request

    def add_reply(self, request: Request) -> None:
        """Add the reply to a request to the history, as the client stores it."""
        self.history.append(self.client.store(reply(request.seed)))

    def resend(self, step: str, kind: Kind = Kind.TEXT) -> Request:
        """Send the history once more, after a pause."""
        request = self.send(kind, step)
        request.pause_s = self.builder.pause_s
        return request

    def add_tool_results(self) -> None:
        """Append a result for each tool call of the last reply."""
        rng = self.builder.rng
        for call in self.history[-1].get("tool_calls") or ():
            self.history.append({"role": "tool", "tool_call_id": call["id"], "content": output(rng)})

    def fork(
        self, keep: int, *, trace: str = "", system: SystemPrompt | None = None, tools: tuple[str, ...] | None = None
    ) -> "Conversation":
        """Start another conversation with the first `keep` messages; a sub-agent has its own prompt and tools."""
        other = Conversation(
            self.builder,
            trace or self.trace,
            system or self._system,
            client=self.client,
            tools=self._tools if tools is None else tools,
            at=self.at,
        )
        other.history, other._forked_from = self.history[:keep], self.name
        other.depends_on = [self.last] if self.last else []
        return other


def output(rng: random.Random) -> str:
    """Return a random output of a tool."""
    if rng.random() < 0.15:  # empty or very common outputs
        return rng.choice(("", "ok", "Error: file not found"))
    return "\n".join(f"{rng.randint(1, 999):>4}  {phrase(rng)}" for _ in range(rng.randint(1, 40)))


def phrase(rng: random.Random) -> str:
    """Return a random phrase."""
    return " ".join(rng.choices(_WORDS, k=rng.randint(4, 14)))


def last_requests(conversations: Iterable[Conversation]) -> list[Request]:
    """Return the last request of each conversation."""
    return [conversation.last for conversation in conversations if conversation.last]


_PROSE = (
    "please find why this test fails only on the second run and fix what is wrong without touching its file then show "
    "me a diff of the change in two lines import os return value if not known else raise Größe 数据 index query commit"
)
_WORDS = _PROSE.split()
