"""Habits of agents and chat applications that send no id, in the shape of their requests, with words of our own.

Seen in recordings (2026-11-30): Qwen Code 0.24.4, aider 0.86.2, smolagents 1.26.0, llama-index-core 0.14.25,
agno 3.1.10, LangGraph 1.2.24, pi 0.73.1, Vercel's AI SDK 7.0.173. What an empty reply does to pi, tool loops, and the
others are written from what is known of them.

Each rewrites its history in its own way, or sends requests beside its conversation. Which is which:

- a request that hands the whole conversation to a sub-agent, with another system prompt and other tools, is a side
  conversation of it: another conversation of the same lineage, like a fork;
- a request that quotes a conversation in its own single question (titles, tags, suggestions) is a conversation of its
  own: nothing but the quoted text connects them.
"""

import json
import random
from collections.abc import Callable, Sequence

from loadtests.identity_clients import CLIENTS
from loadtests.identity_talk import TOOLS, System, Talk, World, output, phrase, waits
from loadtests.scripted_upstream import Kind, Message

_CODING = (
    "You are an interactive CLI agent for software engineering.\n\n" + "- Follow the conventions of the code.\n" * 60
)
_TRIMS = next(client for client in CLIENTS if client.name == "trims text")
_TOOL_KINDS = (Kind.TOOL, Kind.TOOL, Kind.TOOLS, Kind.THINKING_TOOL)


def fixed(text: str) -> System:
    """A system message that is always the same."""
    message: Message = {"role": "system", "content": text}
    return lambda _: message


def _dressed(talk: Talk, question: str, dressed: str | list[Message], kind: Kind = Kind.TEXT) -> None:
    """A turn whose question is sent dressed up, and kept as it is."""
    talk.history.append({"role": "user", "content": dressed})
    talk.turn(kind)
    talk.history[-2] = {"role": "user", "content": question}


def _tools(talk: Talk, least: int, most: int) -> None:
    for _ in range(talk.world.rng.randint(least, most)):
        talk.turn(talk.world.rng.choice(_TOOL_KINDS))
        talk.results()


def _beside(talk: Talk, trace: str, system: System, tools: tuple[str, ...], question: str) -> Talk:
    """A sub-agent that gets the whole conversation to work on."""
    other = talk.fork(len(talk.history), trace=trace, system=system, tools=tools)
    other.say(question).turn()
    return other


def _asked_apart(talk: Talk, trace: str, prompt: str, last: int) -> None:
    """A request of its own that quotes the last messages."""
    quoted = "\n".join(f"{m['role'].upper()}: {m.get('content') or ''}" for m in talk.history[-last:])
    other = Talk(talk.world, trace, None, client=talk.client, at=talk.at)
    other.waits_for = waits([talk])
    other.say(f"{prompt}\n<chat_history>\n{quoted}\n</chat_history>").turn()


# --- agents


def _parts(*texts: str) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


def qwen_code(world: World) -> None:
    """Qwen Code: the same pages before the first question of every conversation, a reminder before the last one alone;
    after each task a sub-agent extracts memories, from the conversation as it was sent last."""
    rng = world.rng
    talk = Talk(world, "Qwen Code", fixed(_CODING), tools=TOOLS, at=world.moment())
    memory = fixed("You are the memory extraction agent.\n" + "- Keep facts, not chatter.\n" * 20)
    pages = (
        "<system-reminder>\n" + "".join(f"- tool {n} does this and that\n" for n in range(30)) + "</system-reminder>",
    )
    for number in range(rng.randint(2, 4)):
        question = phrase(rng)
        before = () if number else pages
        reminder = f"<system-reminder>\nToday is Monday, step {number}. {phrase(rng)}\n</system-reminder>"
        asked, kept = _parts(*before, reminder, question), _parts(*before, question)
        talk.history.append({"role": "user", "content": asked})
        _tools(talk, 0, 2)
        talk.turn()
        _beside(talk, "Qwen Code, memory", memory, ("read", "save_memory"), "Extract what is worth keeping.")
        talk.history[next(i for i, m in enumerate(talk.history) if m.get("content") is asked)] = {
            "role": "user",
            "content": kept,
        }


def aider(world: World) -> None:
    """aider: made-up exchanges show a changing map of the repository and the files; the files stand behind all that
    was done, once they were edited. A reminder ends the last question."""
    rng = world.rng
    talk = Talk(world, "aider", fixed("Act as an expert software developer.\n" * 12), at=world.moment())
    shown: list[Message] = []
    done: list[Message] = []
    current: list[Message] = []
    files = _shown(rng, "These files are in the chat now", "I take these for the contents of the files.")
    for _ in range(rng.randint(2, 5)):
        if not shown or rng.random() < 0.4:
            shown = _shown(rng, "Here are summaries of some files", "I will not edit those without asking first.")
        talk.history = [*shown, *done, *files, *current]
        question = phrase(rng)
        _dressed(talk, question, f"{question}\n\nEvery change has to be a block of this format.")
        current += talk.history[-2:]
        if rng.random() < 0.5:
            edited: list[Message] = [
                {"role": "user", "content": "I made these changes."},
                {"role": "assistant", "content": "Ok."},
            ]
            done, current = [*done, *current, *edited], []
            files = _shown(rng, "These files are in the chat now", "I take these for the contents of the files.")


def _shown(rng: random.Random, what: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": f"{what}:\n{output(rng)}"}, {"role": "assistant", "content": reply}]


def langgraph(world: World) -> None:
    """LangGraph with trim_messages: the system message and the last messages alone, from a question on."""
    rng = world.rng
    talk = Talk(world, "LangGraph, trimmed", fixed("You are a helpful agent."), tools=TOOLS, at=world.moment())
    for _ in range(rng.randint(4, 9)):
        talk.say(phrase(rng))
        starts = [i for i, message in enumerate(talk.history) if message["role"] == "user"]
        talk.history = talk.history[starts[max(0, len(starts) - 3)] :]
        _tools(talk, 0, 2)
        talk.turn()


def smolagents(world: World) -> None:
    """smolagents: a tool call is kept as text that it writes itself, its result as a user's message; of a call that
    could not be run an empty reply is kept."""
    rng = world.rng
    talk = Talk(
        world, "smolagents", fixed("You are an expert assistant who solves tasks with tools."), at=world.moment()
    )
    talk.say(f"New task:\n{phrase(rng)}")
    for _ in range(rng.randint(3, 8)):
        failed = rng.random() < 0.2
        talk.turn(Kind.TOOL if failed else Kind.TEXT)
        thought = talk.history[-1].get("content") or ""
        calls = [{"id": "call_1", "type": "function", "function": {"name": "python", "arguments": phrase(rng)}}]
        said = "" if failed else f"{thought.strip()}\nCalling tools:\n{json.dumps(calls)}"
        talk.history[-1] = {"role": "assistant", "content": _parts(said)}
        talk.say("Error: an argument is missing. Try again." if failed else f"Observation:\n{output(rng)}")
    talk.turn()


def pi(world: World) -> None:
    """pi: an empty reply is left out of the history."""
    rng = world.rng
    talk = Talk(world, "pi", fixed("You are pi, a coding agent."), tools=TOOLS, at=world.moment())
    talk.say(phrase(rng)).turn()
    for _ in range(rng.randint(3, 7)):
        talk.say(phrase(rng))
        if rng.random() < 0.3:
            talk.turn(Kind.EMPTY)
            del talk.history[-1]
        else:
            talk.turn()


def llama_index(world: World) -> None:
    """LlamaIndex's context chat: passages for the last question in the system prompt, replies without the blanks around
    them."""
    rng = world.rng
    passages = {"": ""}

    def system(_: float) -> Message:
        return {
            "role": "system",
            "content": f"Use these passages:\n---\n{passages['']}\n---\nYou are a helpful assistant.",
        }

    talk = Talk(world, "LlamaIndex", system, client=_TRIMS, at=world.moment())
    for _ in range(rng.randint(3, 6)):
        passages[""] = output(rng)
        talk.say(phrase(rng)).turn()


def agno(world: World) -> None:
    """agno: the system prompt tells the time, to the microsecond; the last runs alone are sent."""
    rng = world.rng
    helpful = "You are a helpful assistant.\n" * 20

    def system(at: float) -> Message:
        return {"role": "system", "content": f"{helpful}- The time is 2026-11-30 08:{int(at) % 60:02}:{at % 60:09.6f}."}

    talk = Talk(world, "agno", system, at=world.moment())
    for _ in range(rng.randint(3, 7)):
        talk.say(phrase(rng))
        talk.history = talk.history[-5:]
        talk.turn()


def vercel(world: World) -> None:
    """Vercel's AI SDK: several steps for one question."""
    rng = world.rng
    talk = Talk(
        world, "Vercel AI SDK", fixed("You are a helpful assistant."), tools=("weather", "search"), at=world.moment()
    )
    for _ in range(rng.randint(2, 5)):
        talk.say(phrase(rng))
        _tools(talk, 0, 3)
        talk.turn()


def open_webui(world: World) -> None:
    """Open WebUI: a chat, and requests for a title, tags and follow-ups, each a single question."""
    rng = world.rng
    talk = Talk(world, "Open WebUI", None, at=world.moment())
    for number in range(rng.randint(2, 6)):
        talk.say(phrase(rng)).turn()
        tasks = ("Suggest 3-5 follow-up questions", "Generate a concise title", "Generate 1-3 broad tags")
        for task in tasks if number == 0 else tasks[:1]:
            prompt = f"### Task:\n{task} for the chat.\n" + "- Use the chat's primary language.\n" * 6
            _asked_apart(talk, "Open WebUI, tasks", prompt, 6)


def cline(world: World) -> None:
    """Cline and Roo: tools in the text, the state of the editor behind each question; some remove it again."""
    rng = world.rng
    removes = rng.random() < 0.5
    talk = Talk(world, "Cline", fixed("You are Cline, a highly skilled software engineer.\n" * 30), at=world.moment())
    for number in range(rng.randint(4, 10)):
        said = f"<task>\n{phrase(rng)}\n</task>" if not number else f"[read_file] Result:\n{output(rng)}"
        state = (
            f"<environment_details>\n# Open tabs\n{phrase(rng)}\n# Current time\n12:{number:02}\n</environment_details>"
        )
        parts = [{"type": "text", "text": text} for text in (said, state)]
        if removes:
            _dressed(talk, said, parts)
        else:
            talk.history.append({"role": "user", "content": parts})
            talk.turn()


def goose(world: World) -> None:
    """goose: what time it is goes with the last message alone, be it a question or a tool's result."""
    rng = world.rng
    talk = Talk(
        world, "goose", fixed("You are a general-purpose AI agent called goose."), tools=TOOLS, at=world.moment()
    )
    for number in range(rng.randint(2, 4)):
        talk.say(phrase(rng))
        for step in range(rng.randint(1, 4)):
            note = f"<info-msg>\nIt is currently 2026-11-20 1{number}:0{step}\n</info-msg>"
            talk.history.append({"role": "user", "content": note})
            talk.turn(rng.choice(_TOOL_KINDS))
            del talk.history[-2]
            talk.results()
        talk.turn()


def continue_dev(world: World) -> None:
    """Continue: code before the question, which stays there; a title at the end of the first turn."""
    rng = world.rng
    talk = Talk(
        world, "Continue", fixed("<important_rules>\nYou are in chat mode.\n</important_rules>"), at=world.moment()
    )
    for number in range(rng.randint(2, 6)):
        talk.say(f"```python main.py\n{output(rng)}\n```\n{phrase(rng)}").turn()
        if not number:
            _asked_apart(talk, "Continue, title", "Given the following, reply with a title of 3 to 4 words.", 1)


def claude_code(world: World) -> None:
    """Claude Code behind a proxy that drops its headers: reminders in the questions, a topic request for each."""
    rng = world.rng
    talk = Talk(world, "Claude Code, no headers", fixed("You are Claude Code.\n" * 40), tools=TOOLS, at=world.moment())
    topic = fixed("Analyze if this message indicates a new conversation topic. Answer in JSON.")
    for number in range(rng.randint(2, 4)):
        question = phrase(rng)
        apart = Talk(world, "Claude Code, topic", topic, client=talk.client, at=talk.at)
        apart.waits_for = waits([talk])
        apart.say(question).turn()
        reminder = f"<system-reminder>\nYour todo list is empty ({number}).\n</system-reminder>"
        parts = [{"type": "text", "text": text} for text in (reminder, question)]
        talk.history.append({"role": "user", "content": parts})
        _tools(talk, 1, 4)
        talk.turn()


def zed(world: World) -> None:
    """Zed: the whole thread is sent for a title, without the system prompt and without tools."""
    rng = world.rng
    talk = Talk(
        world, "Zed", fixed("You are a highly skilled software engineer.\n" * 20), tools=TOOLS, at=world.moment()
    )
    for number in range(rng.randint(2, 5)):
        talk.say(phrase(rng))
        _tools(talk, 0, 2)
        talk.turn()
        if not number:
            _beside(talk, "Zed, title", _nothing, (), "Generate a concise 3-7 word title for this conversation.")


def _nothing(_: float) -> Message | None:
    return None


AGENTS: Sequence[Callable[[World], None]] = (
    qwen_code, aider, langgraph, smolagents, pi, llama_index, agno, vercel, open_webui, cline, goose, continue_dev,
    claude_code, zed,
)  # fmt: skip
