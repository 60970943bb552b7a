"""Traces of agents and people as a gateway would have recorded them, with the true conversation of each request.

`generate(seed, turns)` is the same for the same arguments. Many conversations go on at the same time; no request
names its own. What is a conversation, and what a fork of one:

- whatever goes on from all that was said is the same conversation, a retry too, whether the client gave up, got an
  error or did not like the reply;
- going on from an older point (an edited message, an older question asked again) is a fork: another conversation of
  the same lineage;
- a sub-agent is a conversation of its own, though others may begin with the very same words;
- a first request that comes again after it was answered is another conversation: a stranger asks like that too. So is
  an edited first message: all it shares is the system prompt;
- a history that the client replaced by a summary, or took old tool results out of, is the same conversation. No
  prefix can tell;
- what the agents of `loadtests.identity_agents` do is told there.
"""

import random
from collections.abc import Callable, Sequence

from loadtests.identity_agents import AGENTS, fixed
from loadtests.identity_clients import CLIENTS
from loadtests.identity_talk import TOOLS, Request, System, Talk, World, output, phrase, waits
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
_OVERLAP = 48  # conversations that go on at the same time, about


def generate(seed: int, turns: int, pause_s: float = 0.25) -> list[Request]:
    """Return at least so many requests in the order in which they are sent, every kind with its share of them."""
    world = World(seed, span=turns / _OVERLAP, pause_s=pause_s)
    made = dict.fromkeys(SHARES, 0)
    while (before := len(world.requests)) < turns:
        scenario = max(SHARES, key=lambda one: SHARES[one] * (before + 1) - made[one])
        scenario(world)
        made[scenario] += len(world.requests) - before
    return sorted(world.requests, key=lambda request: (request.at, request.number))


def _chat(world: World) -> None:
    """A person and an assistant."""
    talk = Talk(world, "chat", fixed(world.rng.choice(_PROMPTS)), at=world.moment())
    _exchanges(talk, world.rng.randint(2, 10))


def _exchanges(talk: Talk, count: int) -> None:
    for _ in range(count):
        talk.say(phrase(talk.world.rng)).turn(talk.world.rng.choice(_TEXT_KINDS))


def _strangers(world: World) -> None:
    """Many who begin with the same words."""
    rng, at = world.rng, world.moment()
    opening = rng.choice(("hi", "Hello!", "test", "What can you do?"))
    for _ in range(rng.randint(4, 12)):
        _stranger(world, "strangers", opening, at + rng.uniform(0, 3), None)


def _twins(world: World) -> None:
    """Some who begin with the same words and get the same reply: what they say next is all that differs."""
    at, luck, opening = world.moment(), world.luck(), phrase(world.rng)
    for _ in range(world.rng.randint(2, 3)):
        _stranger(world, "strangers, same first reply", opening, at + world.rng.uniform(0, 3), luck)


def _stranger(world: World, trace: str, opening: str, at: float, luck: int | None) -> None:
    talk = Talk(world, trace, fixed(_PROMPTS[0]), client=CLIENTS[0], at=at)
    talk.say(opening).turn(luck=luck)
    _exchanges(talk, world.rng.randint(0, 4))


def _loop(talk: Talk, calls: int) -> None:
    """A task: tools until it is done."""
    for _ in range(calls):
        talk.turn(talk.world.rng.choice(_TOOL_KINDS))
        talk.results()
        _hiccup(talk)
    talk.turn()


def _hiccup(talk: Talk) -> None:
    """Now and then a request fails, or the client gives it up, and sends it again."""
    if talk.world.rng.random() < 0.02:
        kind = talk.world.rng.choice((Kind.FAILS, Kind.CUT, Kind.STALLS))
        talk.ask(kind)
        talk.take(talk.again(_RETRIES[kind], Kind.TOOL))
        talk.results()


_RETRIES = {
    Kind.FAILS: "again after an error",
    Kind.CUT: "again after half a reply",
    Kind.STALLS: "again after a time-out",
}


def _agent(world: World, trace: str = "agent", system: System | None = None) -> Talk:
    """A coding agent: tasks of tool loops."""
    talk = Talk(world, trace, system or fixed(_AGENT), tools=TOOLS, at=world.moment())
    for _ in range(world.rng.randint(1, 3)):
        _loop(talk.say(phrase(world.rng)), world.rng.randint(8, 14))
    return talk


def _parent(world: World) -> None:
    """An agent that starts sub-agents: side by side, and often with the same words."""
    rng = world.rng
    talk = Talk(world, "agent with sub-agents", fixed(_AGENT), tools=TOOLS, at=world.moment())
    _loop(talk.say(phrase(rng)), rng.randint(2, 6))
    for _ in range(rng.randint(1, 3)):
        talk.say(phrase(rng)).turn(Kind.TOOLS)
        children = _children(talk, same=rng.random() < 0.4)
        talk.results()
        if rng.random() < 0.7:  # else they go on in the background
            talk.waits_for = waits(children)
            talk.at = max(child.at for child in children)
        _loop(talk, rng.randint(2, 6))


def _children(parent: Talk, *, same: bool) -> list[Talk]:
    rng, task = parent.world.rng, phrase(parent.world.rng)
    trace = "sub-agents, same first message" if same else "sub-agents"
    children = []
    for _ in parent.history[-1]["tool_calls"]:
        child = Talk(parent.world, trace, fixed(_SUBAGENT), client=parent.client, tools=TOOLS, at=parent.at)
        child.waits_for = waits([parent])
        _loop(child.say(task if same else phrase(rng)), rng.randint(1, 8))
        children.append(child)
    return children


def _retries(world: World) -> None:
    """A client before a bad engine, and a person who is hard to please."""
    rng = world.rng
    talk = Talk(world, "retries", fixed(_PROMPTS[1]), at=world.moment())
    for number in range(rng.randint(3, 8)):
        talk.say(phrase(rng))
        what = rng.random()
        if what < 0.4:
            kind = rng.choice((Kind.FAILS, Kind.CUT) if number == 0 else (Kind.FAILS, Kind.CUT, Kind.STALLS))
            talk.ask(kind)
            if rng.random() < 0.3:
                talk.again(_RETRIES[kind], kind)
            talk.take(talk.again(_RETRIES[kind]))
        elif what < 0.6 and number:
            talk.ask()
            talk.take(talk.again("again after a reply, the second kept"))
        elif what < 0.7 and number:
            _overtaken(talk)
        else:
            talk.turn()


def _overtaken(talk: Talk) -> None:
    """The same request again while the first is still open; what comes next does not wait for it either."""
    before = waits([talk])
    talk.ask(Kind.STALLS)
    second = talk.ask(step="again while the first is open")
    second.after = before
    talk.take(second)


def _edits(world: World) -> None:
    """A person who goes back: a message is edited, an old question asked again; the old branch may go on as well."""
    rng = world.rng
    talk = Talk(world, "edits", fixed(rng.choice(_PROMPTS)), at=world.moment())
    _exchanges(talk, rng.randint(2, 6))
    for _ in range(rng.randint(1, 3)):
        asked = rng.choice([i for i, message in enumerate(talk.history) if message["role"] == "user"][1:])
        again = rng.random() < 0.4 and asked < len(talk.history) - 2
        branch = talk.fork(asked + again)
        if not again:
            branch.say(phrase(rng))
        branch.turn(step="an older question again" if again else "an edited message")
        _exchanges(branch, rng.randint(1, 3))
        if rng.random() < 0.4:
            _exchanges(talk, rng.randint(1, 2))
        talk = rng.choice((talk, branch))


def _agent_edits(world: World) -> None:
    """An agent's user goes back to an earlier task."""
    talk = _agent(world, "agent, edits")
    asked = [i for i, message in enumerate(talk.history) if message["role"] == "user"]
    if len(asked) > 1:
        branch = talk.fork(asked[-1]).say(phrase(world.rng))
        branch.turn(Kind.TOOL, "an edited message")
        branch.results()
        _loop(branch, world.rng.randint(3, 8))


def _compaction(world: World) -> None:
    """An agent whose context is full: the history becomes a summary, or old tool results go."""
    rng = world.rng
    talk = _agent(world, "compaction")
    if rng.random() < 0.7:
        talk.say("Summarise all that was done and what is open.").turn()
        summary = talk.history[-1]["content"]
        talk.history = []
        talk.say(f"This session continues an earlier one that ran out of context. Summary:\n{summary}\nGo on.")
        talk.turn(Kind.TOOL, "after a summary")
    else:
        talk.history = _pruned(talk.history)
        talk.say(phrase(rng)).turn(Kind.TOOL, "after old tool results were cleared")
    talk.results()
    _loop(talk, rng.randint(8, 20))


def _pruned(history: Sequence[Message]) -> list[Message]:
    old = len(history) // 2
    cleared = [{**m, "content": "[Old tool result cleared]"} if m["role"] == "tool" else m for m in history[:old]]
    return [*cleared, *history[old:]]


def _interrupted(world: World) -> None:
    """A person who stops replies: half of one is kept, or dropped, or the question is put differently."""
    rng = world.rng
    talk = Talk(world, "interrupted", fixed(_PROMPTS[2]), at=world.moment())
    for number in range(rng.randint(3, 7)):
        talk.say(phrase(rng))
        if number == 0 or rng.random() < 0.6:
            talk.turn()
            continue
        step, keeps = rng.choice((("half a reply kept", 2), ("half a reply dropped", 1), ("stopped, asked anew", 0)))
        talk.take(talk.ask(Kind.CUT))
        talk.history = talk.history[: len(talk.history) - 2 + keeps]
        talk.say(phrase(rng)).turn(step=step).pause_s = world.pause_s


def _first_again(world: World) -> None:
    """The first question is asked again, or put differently, after it was answered."""
    rng = world.rng
    system, question = fixed(rng.choice(_PROMPTS)), phrase(rng)
    talk = Talk(world, "first again", system, at=world.moment())
    talk.say(question).turn()
    again = rng.random() < 0.5
    other = Talk(world, "first again", system, client=talk.client, at=talk.at)
    other.waits_for = waits([talk])
    other.say(question if again else phrase(rng))
    other.turn(step="the first question again" if again else "the first message edited")
    _exchanges(other, rng.randint(1, 4))


def _billed(world: World) -> None:
    """An agent that puts a line for the bill, never the same, in front of its system prompt."""
    as_parts = world.rng.random() < 0.5

    def system(at: float) -> Message:
        rng = random.Random(at)
        line = f"x-anthropic-billing-header: cc_version=2.1.37.{rng.getrandbits(12):03x}; cc_entrypoint=cli; cch={rng.getrandbits(20):05x};"  # noqa: E501
        if not as_parts:
            return {"role": "system", "content": f"{line}\n{_AGENT}"}
        return {"role": "system", "content": [{"type": "text", "text": line}, {"type": "text", "text": _AGENT}]}

    _agent(world, "billing line", system)


def _clocked(world: World) -> None:
    """A system prompt that tells the time."""

    def system(at: float) -> Message:
        return {
            "role": "system",
            "content": f"{_PROMPTS[2]}\nCurrent time: 2026-11-20 {9 + int(at) // 60:02}:{int(at) % 60:02}",
        }

    talk = Talk(world, "clock", system, at=world.moment())
    _exchanges(talk, world.rng.randint(3, 8))


def _retrieval(world: World) -> None:
    """A client that puts found passages into the last question only, and the bare question into the history."""
    rng = world.rng
    talk = Talk(world, "retrieval", fixed(_PROMPTS[1]), at=world.moment())
    for _ in range(rng.randint(3, 6)):
        question = phrase(rng)
        talk.say(f"Use these passages:\n{output(rng)}\n\nQuestion: {question}").turn()
        talk.history[-2] = {"role": "user", "content": question}


SHARES: dict[Callable[[World], object], float] = {
    **dict.fromkeys(AGENTS, 0.03),
    _chat: 0.08,
    _strangers: 0.05,
    _twins: 0.005,
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
