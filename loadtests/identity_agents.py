"""Agents and chat applications that send no id: the structure of their requests, with invented text.

Taken from recordings (2026-11-30): Qwen Code 0.24.4, aider 0.86.2, smolagents 1.26.0, llama-index-core 0.14.25,
agno 3.1.10, LangGraph 1.2.24, pi 0.73.1, Vercel's AI SDK 7.0.173. How pi handles an empty reply, the tool loops, and
the other agents are written from their documented behaviour.

Each rewrites its history in its own way, or sends requests in addition to its conversation:

- a request that hands the whole conversation to a sub-agent, with another system prompt and other tools, is a side
  conversation: another conversation of the same lineage, like a fork;
- a request that quotes a conversation in a single question (titles, tags, suggestions) is a separate conversation:
  nothing but the quoted text connects them.
"""

import json
import random
from collections.abc import Callable, Sequence

from loadtests.identity_client_styles import CLIENTS
from loadtests.identity_conversation import (
    TOOLS,
    Conversation,
    SystemPrompt,
    TraceBuilder,
    last_requests,
    output,
    phrase,
)
from loadtests.scripted_upstream import Kind, Message

_CODING = (
    "You are an interactive CLI agent for software engineering.\n\n" + "- Follow the conventions of the code.\n" * 60
)
_TRIMS = next(client for client in CLIENTS if client.name == "trims text")
_TOOL_KINDS = (Kind.TOOL, Kind.TOOL, Kind.TOOLS, Kind.THINKING_TOOL)


def fixed(text: str) -> SystemPrompt:
    """Return a system prompt that is always the same."""
    message: Message = {"role": "system", "content": text}
    return lambda _: message


def _decorated_turn(
    conversation: Conversation, question: str, decorated: str | list[Message], kind: Kind = Kind.TEXT
) -> None:
    """A turn whose question is sent with additions, and kept without them."""
    conversation.history.append({"role": "user", "content": decorated})
    conversation.turn(kind)
    conversation.history[-2] = {"role": "user", "content": question}


def _tools(conversation: Conversation, fewest: int, most: int) -> None:
    for _ in range(conversation.builder.rng.randint(fewest, most)):
        conversation.turn(conversation.builder.rng.choice(_TOOL_KINDS))
        conversation.add_tool_results()


def _side_conversation(
    conversation: Conversation, trace: str, system: SystemPrompt, tools: tuple[str, ...], question: str
) -> Conversation:
    """A sub-agent that is given the whole conversation."""
    other = conversation.fork(len(conversation.history), trace=trace, system=system, tools=tools)
    other.add_user(question).turn()
    return other


def _quoting_request(conversation: Conversation, trace: str, prompt: str, last: int) -> None:
    """A separate conversation that quotes the last messages."""
    quoted = "\n".join(f"{m['role'].upper()}: {m.get('content') or ''}" for m in conversation.history[-last:])
    other = Conversation(conversation.builder, trace, None, client=conversation.client, at=conversation.at)
    other.depends_on = last_requests([conversation])
    other.add_user(f"{prompt}\n<chat_history>\n{quoted}\n</chat_history>").turn()


# --- agents


def _parts(*texts: str) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


def qwen_code(builder: TraceBuilder) -> None:
    """Qwen Code: the same pages in front of every first question, a reminder in front of the last question only;
    after each task a sub-agent extracts memories from the conversation as it was last sent."""
    rng = builder.rng
    conversation = Conversation(builder, "Qwen Code", fixed(_CODING), tools=TOOLS, at=builder.random_start())
    memory = fixed("You are the memory extraction agent.\n" + "- Keep facts, not chatter.\n" * 20)
    pages = (
        "<system-reminder>\n" + "".join(f"- tool {n} does this and that\n" for n in range(30)) + "</system-reminder>",
    )
    for number in range(rng.randint(2, 4)):
        question = phrase(rng)
        before = () if number else pages
        reminder = f"<system-reminder>\nToday is Monday, step {number}. {phrase(rng)}\n</system-reminder>"
        sent, kept = _parts(*before, reminder, question), _parts(*before, question)
        conversation.history.append({"role": "user", "content": sent})
        _tools(conversation, 0, 2)
        conversation.turn()
        _side_conversation(
            conversation, "Qwen Code, memory", memory, ("read", "save_memory"), "Extract what is worth keeping."
        )
        conversation.history[next(i for i, m in enumerate(conversation.history) if m.get("content") is sent)] = {
            "role": "user",
            "content": kept,
        }


def aider(builder: TraceBuilder) -> None:
    """aider: invented exchanges show a changing map of the repository and the files; once edited, the files come after
    everything that was done. A reminder ends the last question."""
    rng = builder.rng
    conversation = Conversation(
        builder, "aider", fixed("Act as an expert software developer.\n" * 12), at=builder.random_start()
    )
    shown: list[Message] = []
    done: list[Message] = []
    current: list[Message] = []
    files = _exchange(rng, "These files are in the chat now", "I take these for the contents of the files.")
    for _ in range(rng.randint(2, 5)):
        if not shown or rng.random() < 0.4:
            shown = _exchange(rng, "Here are summaries of some files", "I will not edit those without asking first.")
        conversation.history = [*shown, *done, *files, *current]
        question = phrase(rng)
        _decorated_turn(conversation, question, f"{question}\n\nEvery change has to be a block of this format.")
        current += conversation.history[-2:]
        if rng.random() < 0.5:
            edited: list[Message] = [
                {"role": "user", "content": "I made these changes."},
                {"role": "assistant", "content": "Ok."},
            ]
            done, current = [*done, *current, *edited], []
            files = _exchange(rng, "These files are in the chat now", "I take these for the contents of the files.")


def _exchange(rng: random.Random, what: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": f"{what}:\n{output(rng)}"}, {"role": "assistant", "content": reply}]


def langgraph(builder: TraceBuilder) -> None:
    """LangGraph with trim_messages: only the system message and the last messages, starting at a question."""
    rng = builder.rng
    conversation = Conversation(
        builder, "LangGraph, trimmed", fixed("You are a helpful agent."), tools=TOOLS, at=builder.random_start()
    )
    for _ in range(rng.randint(4, 9)):
        conversation.add_user(phrase(rng))
        starts = [i for i, message in enumerate(conversation.history) if message["role"] == "user"]
        conversation.history = conversation.history[starts[max(0, len(starts) - 3)] :]
        _tools(conversation, 0, 2)
        conversation.turn()


def smolagents(builder: TraceBuilder) -> None:
    """smolagents: a tool call is kept as text that it writes itself, its result as a user message; a call that could
    not be run is kept as an empty reply."""
    rng = builder.rng
    conversation = Conversation(
        builder,
        "smolagents",
        fixed("You are an expert assistant who solves tasks with tools."),
        at=builder.random_start(),
    )
    conversation.add_user(f"New task:\n{phrase(rng)}")
    for _ in range(rng.randint(3, 8)):
        failed = rng.random() < 0.2
        conversation.turn(Kind.TOOL if failed else Kind.TEXT)
        thought = conversation.history[-1].get("content") or ""
        calls = [{"id": "call_1", "type": "function", "function": {"name": "python", "arguments": phrase(rng)}}]
        text = "" if failed else f"{thought.strip()}\nCalling tools:\n{json.dumps(calls)}"
        conversation.history[-1] = {"role": "assistant", "content": _parts(text)}
        conversation.add_user("Error: an argument is missing. Try again." if failed else f"Observation:\n{output(rng)}")
    conversation.turn()


def pi(builder: TraceBuilder) -> None:
    """pi: an empty reply is left out of the history."""
    rng = builder.rng
    conversation = Conversation(
        builder, "pi", fixed("You are pi, a coding agent."), tools=TOOLS, at=builder.random_start()
    )
    conversation.add_user(phrase(rng)).turn()
    for _ in range(rng.randint(3, 7)):
        conversation.add_user(phrase(rng))
        if rng.random() < 0.3:
            conversation.turn(Kind.EMPTY)
            del conversation.history[-1]
        else:
            conversation.turn()


def llama_index(builder: TraceBuilder) -> None:
    """LlamaIndex's context chat: passages for the last question in the system prompt, replies stripped."""
    rng = builder.rng
    passages = {"": ""}

    def system(_: float) -> Message:
        return {
            "role": "system",
            "content": f"Use these passages:\n---\n{passages['']}\n---\nYou are a helpful assistant.",
        }

    conversation = Conversation(builder, "LlamaIndex", system, client=_TRIMS, at=builder.random_start())
    for _ in range(rng.randint(3, 6)):
        passages[""] = output(rng)
        conversation.add_user(phrase(rng)).turn()


def agno(builder: TraceBuilder) -> None:
    """agno: the system prompt contains the time, to the microsecond; only the last runs are sent."""
    rng = builder.rng
    helpful = "You are a helpful assistant.\n" * 20

    def system(at: float) -> Message:
        return {"role": "system", "content": f"{helpful}- The time is 2026-11-30 08:{int(at) % 60:02}:{at % 60:09.6f}."}

    conversation = Conversation(builder, "agno", system, at=builder.random_start())
    for _ in range(rng.randint(3, 7)):
        conversation.add_user(phrase(rng))
        conversation.history = conversation.history[-5:]
        conversation.turn()


def vercel(builder: TraceBuilder) -> None:
    """Vercel's AI SDK: several steps per question."""
    rng = builder.rng
    conversation = Conversation(
        builder,
        "Vercel AI SDK",
        fixed("You are a helpful assistant."),
        tools=("weather", "search"),
        at=builder.random_start(),
    )
    for _ in range(rng.randint(2, 5)):
        conversation.add_user(phrase(rng))
        _tools(conversation, 0, 3)
        conversation.turn()


def open_webui(builder: TraceBuilder) -> None:
    """Open WebUI: a chat, and requests for a title, tags and follow-ups, each a single question."""
    rng = builder.rng
    conversation = Conversation(builder, "Open WebUI", None, at=builder.random_start())
    for number in range(rng.randint(2, 6)):
        conversation.add_user(phrase(rng)).turn()
        tasks = ("Suggest 3-5 follow-up questions", "Generate a concise title", "Generate 1-3 broad tags")
        for task in tasks if number == 0 else tasks[:1]:
            prompt = f"### Task:\n{task} for the chat.\n" + "- Use the chat's primary language.\n" * 6
            _quoting_request(conversation, "Open WebUI, tasks", prompt, 6)


def cline(builder: TraceBuilder) -> None:
    """Cline and Roo: tools in the text, the state of the editor after each question; some remove it again."""
    rng = builder.rng
    removes = rng.random() < 0.5
    conversation = Conversation(
        builder, "Cline", fixed("You are Cline, a highly skilled software engineer.\n" * 30), at=builder.random_start()
    )
    for number in range(rng.randint(4, 10)):
        question = f"<task>\n{phrase(rng)}\n</task>" if not number else f"[read_file] Result:\n{output(rng)}"
        state = (
            f"<environment_details>\n# Open tabs\n{phrase(rng)}\n# Current time\n12:{number:02}\n</environment_details>"
        )
        parts = [{"type": "text", "text": text} for text in (question, state)]
        if removes:
            _decorated_turn(conversation, question, parts)
        else:
            conversation.history.append({"role": "user", "content": parts})
            conversation.turn()


def goose(builder: TraceBuilder) -> None:
    """goose: the current time is attached to the last message only, be it a question or a tool result."""
    rng = builder.rng
    conversation = Conversation(
        builder,
        "goose",
        fixed("You are a general-purpose AI agent called goose."),
        tools=TOOLS,
        at=builder.random_start(),
    )
    for number in range(rng.randint(2, 4)):
        conversation.add_user(phrase(rng))
        for step in range(rng.randint(1, 4)):
            note = f"<info-msg>\nIt is currently 2026-11-20 1{number}:0{step}\n</info-msg>"
            conversation.history.append({"role": "user", "content": note})
            conversation.turn(rng.choice(_TOOL_KINDS))
            del conversation.history[-2]
            conversation.add_tool_results()
        conversation.turn()


def continue_dev(builder: TraceBuilder) -> None:
    """Continue: code in front of the question, where it stays; a title after the first turn."""
    rng = builder.rng
    conversation = Conversation(
        builder,
        "Continue",
        fixed("<important_rules>\nYou are in chat mode.\n</important_rules>"),
        at=builder.random_start(),
    )
    for number in range(rng.randint(2, 6)):
        conversation.add_user(f"```python main.py\n{output(rng)}\n```\n{phrase(rng)}").turn()
        if not number:
            _quoting_request(
                conversation, "Continue, title", "Given the following, reply with a title of 3 to 4 words.", 1
            )


def claude_code(builder: TraceBuilder) -> None:
    """Claude Code behind a proxy that drops its headers: reminders in the questions, and a topic request for each."""
    rng = builder.rng
    conversation = Conversation(
        builder, "Claude Code, no headers", fixed("You are Claude Code.\n" * 40), tools=TOOLS, at=builder.random_start()
    )
    topic = fixed("Analyze if this message indicates a new conversation topic. Answer in JSON.")
    for number in range(rng.randint(2, 4)):
        question = phrase(rng)
        topic_request = Conversation(
            builder, "Claude Code, topic", topic, client=conversation.client, at=conversation.at
        )
        topic_request.depends_on = last_requests([conversation])
        topic_request.add_user(question).turn()
        reminder = f"<system-reminder>\nYour todo list is empty ({number}).\n</system-reminder>"
        parts = [{"type": "text", "text": text} for text in (reminder, question)]
        conversation.history.append({"role": "user", "content": parts})
        _tools(conversation, 1, 4)
        conversation.turn()


def zed(builder: TraceBuilder) -> None:
    """Zed: the whole thread is sent for a title, without the system prompt and without tools."""
    rng = builder.rng
    conversation = Conversation(
        builder,
        "Zed",
        fixed("You are a highly skilled software engineer.\n" * 20),
        tools=TOOLS,
        at=builder.random_start(),
    )
    for number in range(rng.randint(2, 5)):
        conversation.add_user(phrase(rng))
        _tools(conversation, 0, 2)
        conversation.turn()
        if not number:
            _side_conversation(
                conversation, "Zed, title", _nothing, (), "Generate a concise 3-7 word title for this conversation."
            )


def _nothing(_: float) -> Message | None:
    return None


AGENTS: Sequence[Callable[[TraceBuilder], None]] = (
    qwen_code, aider, langgraph, smolagents, pi, llama_index, agno, vercel, open_webui, cline, goose, continue_dev,
    claude_code, zed,
)  # fmt: skip
