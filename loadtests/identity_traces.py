"""Traces of agents and people as a gateway would have recorded them, with the true conversation of each request.

`generate(seed, turns)` is deterministic. Many conversations overlap, and no request names its own. The rules for what
counts as a conversation, and as a fork:

- a request that continues the full history belongs to the same conversation, and so does a retry, whether the client
  gave up, got an error or did not like the reply;
- continuing from an earlier point (an edited message, an older question asked again) is a fork: another conversation
  of the same lineage;
- a sub-agent is a separate conversation, even if others begin with the very same words;
- a first request that is repeated after it was answered is a new conversation, as an unrelated client would send the
  same. So is an edited first message: it shares only the system prompt;
- a history that the client replaced by a summary, or from which it removed old tool results, is the same conversation,
  although no prefix can show that;
- `loadtests.identity_agents` describes the agents' own rules.
"""

import random
from collections.abc import Callable, Sequence

from loadtests.identity_agents import AGENTS, fixed
from loadtests.identity_client_styles import CLIENTS
from loadtests.identity_conversation import (
    TOOLS,
    Conversation,
    Request,
    SystemPrompt,
    TraceBuilder,
    last_requests,
    output,
    phrase,
)
from loadtests.scripted_upstream import Kind, Message

_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer briefly and name your sources.\n\nToday is 2026-11-20.",
    "You are the support desk of a railway. Be polite.",
)
_AGENT = (
    "You are a coding agent in a terminal. Use the tools; do not guess.\n\n" + "- Keep the style of the file.\n" * 40
)
_SUBAGENT = "You are a sub-agent. Do the one task that you are given and report.\n\n" + "- Be brief.\n" * 20
_TOOL_KINDS = (Kind.TOOL, Kind.TOOL, Kind.TOOL, Kind.TOOLS, Kind.THINKING_TOOL)
_TEXT_KINDS = (Kind.TEXT, Kind.TEXT, Kind.THINKING)
_OVERLAP = 48  # approximate number of concurrent conversations


def generate(seed: int, turns: int, pause_s: float = 0.25) -> list[Request]:
    """Return at least `turns` requests in the order of sending, each kind with its share."""
    builder = TraceBuilder(seed, span=turns / _OVERLAP, pause_s=pause_s)
    made = dict.fromkeys(SHARES, 0)
    while (before := len(builder.requests)) < turns:
        scenario = max(SHARES, key=lambda candidate: SHARES[candidate] * (before + 1) - made[candidate])
        scenario(builder)
        made[scenario] += len(builder.requests) - before
    return sorted(builder.requests, key=lambda request: (request.at, request.number))


def _chat(builder: TraceBuilder) -> None:
    """A person and an assistant."""
    conversation = Conversation(builder, "chat", fixed(builder.rng.choice(_PROMPTS)), at=builder.random_start())
    _exchanges(conversation, builder.rng.randint(2, 10))


def _exchanges(conversation: Conversation, count: int) -> None:
    for _ in range(count):
        conversation.add_user(phrase(conversation.builder.rng)).turn(conversation.builder.rng.choice(_TEXT_KINDS))


def _same_opening(builder: TraceBuilder) -> None:
    """Many unrelated clients that begin with the same words."""
    rng, at = builder.rng, builder.random_start()
    opening = rng.choice(("hi", "Hello!", "test", "What can you do?"))
    for _ in range(rng.randint(4, 12)):
        _unrelated_client(builder, "unrelated clients", opening, at + rng.uniform(0, 3), None)


def _same_first_reply(builder: TraceBuilder) -> None:
    """Some clients that begin with the same words and get the same reply: only what they say next differs."""
    at, sample, opening = builder.random_start(), builder.next_sample(), phrase(builder.rng)
    for _ in range(builder.rng.randint(2, 3)):
        _unrelated_client(
            builder, "unrelated clients, same first reply", opening, at + builder.rng.uniform(0, 3), sample
        )


def _unrelated_client(builder: TraceBuilder, trace: str, opening: str, at: float, sample: int | None) -> None:
    conversation = Conversation(builder, trace, fixed(_PROMPTS[0]), client=CLIENTS[0], at=at)
    conversation.add_user(opening).turn(sample=sample)
    _exchanges(conversation, builder.rng.randint(0, 4))


def _loop(conversation: Conversation, calls: int) -> None:
    """A task: tool calls until it is done."""
    for _ in range(calls):
        conversation.turn(conversation.builder.rng.choice(_TOOL_KINDS))
        conversation.add_tool_results()
        _hiccup(conversation)
    conversation.turn()


def _hiccup(conversation: Conversation) -> None:
    """Occasionally, a request fails or the client gives up, and it is sent again."""
    if conversation.builder.rng.random() < 0.02:
        kind = conversation.builder.rng.choice((Kind.FAILS, Kind.CUT, Kind.STALLS))
        conversation.send(kind)
        conversation.add_reply(conversation.resend(_RETRIES[kind], Kind.TOOL))
        conversation.add_tool_results()


_RETRIES = {
    Kind.FAILS: "again after an error",
    Kind.CUT: "again after half a reply",
    Kind.STALLS: "again after a time-out",
}


def _agent(builder: TraceBuilder, trace: str = "agent", system: SystemPrompt | None = None) -> Conversation:
    """A coding agent: tasks that are tool loops."""
    conversation = Conversation(builder, trace, system or fixed(_AGENT), tools=TOOLS, at=builder.random_start())
    for _ in range(builder.rng.randint(1, 3)):
        _loop(conversation.add_user(phrase(builder.rng)), builder.rng.randint(8, 14))
    return conversation


def _parent(builder: TraceBuilder) -> None:
    """An agent that starts sub-agents in parallel, often with the same words."""
    rng = builder.rng
    conversation = Conversation(builder, "agent with sub-agents", fixed(_AGENT), tools=TOOLS, at=builder.random_start())
    _loop(conversation.add_user(phrase(rng)), rng.randint(2, 6))
    for _ in range(rng.randint(1, 3)):
        conversation.add_user(phrase(rng)).turn(Kind.TOOLS)
        children = _children(conversation, same=rng.random() < 0.4)
        conversation.add_tool_results()
        if rng.random() < 0.7:  # otherwise they continue in the background
            conversation.depends_on = last_requests(children)
            conversation.at = max(child.at for child in children)
        _loop(conversation, rng.randint(2, 6))


def _children(parent: Conversation, *, same: bool) -> list[Conversation]:
    rng, task = parent.builder.rng, phrase(parent.builder.rng)
    trace = "sub-agents, same first message" if same else "sub-agents"
    children = []
    for _ in parent.history[-1]["tool_calls"]:
        child = Conversation(parent.builder, trace, fixed(_SUBAGENT), client=parent.client, tools=TOOLS, at=parent.at)
        child.depends_on = last_requests([parent])
        _loop(child.add_user(task if same else phrase(rng)), rng.randint(1, 8))
        children.append(child)
    return children


def _retries(builder: TraceBuilder) -> None:
    """A client of an unreliable engine, and a user who often regenerates replies."""
    rng = builder.rng
    conversation = Conversation(builder, "retries", fixed(_PROMPTS[1]), at=builder.random_start())
    for number in range(rng.randint(3, 8)):
        conversation.add_user(phrase(rng))
        choice = rng.random()
        if choice < 0.4:
            kind = rng.choice((Kind.FAILS, Kind.CUT) if number == 0 else (Kind.FAILS, Kind.CUT, Kind.STALLS))
            conversation.send(kind)
            if rng.random() < 0.3:
                conversation.resend(_RETRIES[kind], kind)
            conversation.add_reply(conversation.resend(_RETRIES[kind]))
        elif choice < 0.6 and number:
            conversation.send()
            conversation.add_reply(conversation.resend("again after a reply, the second kept"))
        elif choice < 0.7 and number:
            _overtaken(conversation)
        else:
            conversation.turn()


def _overtaken(conversation: Conversation) -> None:
    """The same request again while the first is still open; later requests do not wait for the first either."""
    before = last_requests([conversation])
    conversation.send(Kind.STALLS)
    second = conversation.send(step="again while the first is open")
    second.after = before
    conversation.add_reply(second)


def _edits(builder: TraceBuilder) -> None:
    """A user who goes back: a message is edited or an old question asked again; the old branch may continue as well."""
    rng = builder.rng
    conversation = Conversation(builder, "edits", fixed(rng.choice(_PROMPTS)), at=builder.random_start())
    _exchanges(conversation, rng.randint(2, 6))
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([i for i, message in enumerate(conversation.history) if message["role"] == "user"][1:])
        again = rng.random() < 0.4 and at < len(conversation.history) - 2
        branch = conversation.fork(at + again)
        if not again:
            branch.add_user(phrase(rng))
        branch.turn(step="an older question again" if again else "an edited message")
        _exchanges(branch, rng.randint(1, 3))
        if rng.random() < 0.4:
            _exchanges(conversation, rng.randint(1, 2))
        conversation = rng.choice((conversation, branch))


def _agent_edits(builder: TraceBuilder) -> None:
    """The user of an agent goes back to an earlier task."""
    conversation = _agent(builder, "agent, edits")
    questions = [i for i, message in enumerate(conversation.history) if message["role"] == "user"]
    if len(questions) > 1:
        branch = conversation.fork(questions[-1]).add_user(phrase(builder.rng))
        branch.turn(Kind.TOOL, "an edited message")
        branch.add_tool_results()
        _loop(branch, builder.rng.randint(3, 8))


def _compaction(builder: TraceBuilder) -> None:
    """An agent whose context is full: the history becomes a summary, or old tool results are cleared."""
    rng = builder.rng
    conversation = _agent(builder, "compaction")
    if rng.random() < 0.7:
        conversation.add_user("Summarise all that was done and what is open.").turn()
        summary = conversation.history[-1]["content"]
        conversation.history = []
        conversation.add_user(
            f"This session continues an earlier one that ran out of context. Summary:\n{summary}\nGo on."
        )
        conversation.turn(Kind.TOOL, "after a summary")
    else:
        conversation.history = _pruned(conversation.history)
        conversation.add_user(phrase(rng)).turn(Kind.TOOL, "after old tool results were cleared")
    conversation.add_tool_results()
    _loop(conversation, rng.randint(8, 20))


def _pruned(history: Sequence[Message]) -> list[Message]:
    old = len(history) // 2
    cleared = [{**m, "content": "[Old tool result cleared]"} if m["role"] == "tool" else m for m in history[:old]]
    return [*cleared, *history[old:]]


def _interrupted(builder: TraceBuilder) -> None:
    """A user who stops replies: half of one is kept, or dropped, or the question is changed."""
    rng = builder.rng
    conversation = Conversation(builder, "interrupted", fixed(_PROMPTS[2]), at=builder.random_start())
    for number in range(rng.randint(3, 7)):
        conversation.add_user(phrase(rng))
        if number == 0 or rng.random() < 0.6:
            conversation.turn()
            continue
        step, kept = rng.choice((("half a reply kept", 2), ("half a reply dropped", 1), ("stopped, asked again", 0)))
        conversation.add_reply(conversation.send(Kind.CUT))
        conversation.history = conversation.history[: len(conversation.history) - 2 + kept]
        conversation.add_user(phrase(rng)).turn(step=step).pause_s = builder.pause_s


def _first_again(builder: TraceBuilder) -> None:
    """The first question is asked again, or changed, after it was answered."""
    rng = builder.rng
    system, question = fixed(rng.choice(_PROMPTS)), phrase(rng)
    conversation = Conversation(builder, "first again", system, at=builder.random_start())
    conversation.add_user(question).turn()
    again = rng.random() < 0.5
    other = Conversation(builder, "first again", system, client=conversation.client, at=conversation.at)
    other.depends_on = last_requests([conversation])
    other.add_user(question if again else phrase(rng))
    other.turn(step="the first question again" if again else "the first message edited")
    _exchanges(other, rng.randint(1, 4))


def _billed(builder: TraceBuilder) -> None:
    """An agent that puts a billing line, different each time, in front of its system prompt."""
    as_parts = builder.rng.random() < 0.5

    def system(at: float) -> Message:
        rng = random.Random(at)
        line = f"x-anthropic-billing-header: cc_version=2.1.37.{rng.getrandbits(12):03x}; cc_entrypoint=cli; cch={rng.getrandbits(20):05x};"  # noqa: E501
        if not as_parts:
            return {"role": "system", "content": f"{line}\n{_AGENT}"}
        return {"role": "system", "content": [{"type": "text", "text": line}, {"type": "text", "text": _AGENT}]}

    _agent(builder, "billing line", system)


def _clocked(builder: TraceBuilder) -> None:
    """A system prompt that contains the time."""

    def system(at: float) -> Message:
        return {
            "role": "system",
            "content": f"{_PROMPTS[2]}\nCurrent time: 2026-11-20 {9 + int(at) // 60:02}:{int(at) % 60:02}",
        }

    conversation = Conversation(builder, "clock", system, at=builder.random_start())
    _exchanges(conversation, builder.rng.randint(3, 8))


def _retrieval(builder: TraceBuilder) -> None:
    """A client that puts retrieved passages into the last question only, and the bare question into the history."""
    rng = builder.rng
    conversation = Conversation(builder, "retrieval", fixed(_PROMPTS[1]), at=builder.random_start())
    for _ in range(rng.randint(3, 6)):
        question = phrase(rng)
        conversation.add_user(f"Use these passages:\n{output(rng)}\n\nQuestion: {question}").turn()
        conversation.history[-2] = {"role": "user", "content": question}


SHARES: dict[Callable[[TraceBuilder], object], float] = {
    **dict.fromkeys(AGENTS, 0.03),
    _chat: 0.08,
    _same_opening: 0.05,
    _same_first_reply: 0.005,
    _agent: 0.105,
    _parent: 0.10,
    _retries: 0.04,
    _edits: 0.05,
    _agent_edits: 0.03,
    _compaction: 0.04,
    _interrupted: 0.03,
    _first_again: 0.015,
    _billed: 0.04,
    _clocked: 0.015,
    _retrieval: 0.01,
}
