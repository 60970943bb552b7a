"""The reason for a miss, compared with the truth: which token is the first to differ.

A turn and the one after it are rendered with the demo model's chat template and tokenizer, as the engine renders them.
The reply is put in as it was sampled: in tokens that its text need not be made of. Where the first token differs says
what the true reason is; the explainer sees neither tokens nor template.
"""

import copy
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway.sessions.misses import PreviousTurn, TurnCacheStats, explain_miss
from gateway.stack import demo_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURNS = 2_000
CHUNK = 32
PROSE = "the cache holds what was read before and a prefix that is shared costs nothing twice look at this\n"
WORDS = re.findall(r"\S+|\n", PROSE)
Message = dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """What a request holds: messages, and what else its prompt is made from."""

    messages: list[Message]
    frame: dict[str, Any]


@dataclass(slots=True)
class Case:
    """A turn with its reply, and the one after it."""

    before: Conversation
    reply: Message
    now: Conversation
    edits: list[str]


class Template:
    """The demo model's template and tokenizer, as vLLM uses them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self.end = tokenizer.convert_tokens_to_ids(demo_model.END)

    def render(self, one: Conversation, *, generation: bool = True, count: int | None = None) -> list[int]:
        messages = [_parsed(message) for message in one.messages[:count]]
        text = self._tokenizer.apply_chat_template(  # type: ignore[no-untyped-call]
            messages, tools=one.frame.get("tools") or None, add_generation_prompt=generation, tokenize=False
        )
        return self.encode(text)

    def front(self, one: Conversation, ids: list[int]) -> int:
        """Tokens of the system message and the tools."""
        if not system_of(one) and not one.frame.get("tools"):
            return 0
        return ids.index(self.end) + 2

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def sampled(self, reply: Message, rng: random.Random) -> list[int]:
        """The reply as a model may have sampled it: odd tokens now and then, and the token that ends it."""
        (text,) = [self.render(Conversation([reply], {}), generation=False)]
        start = len(self.encode("<|im_start|>assistant\n"))
        content = str(self._tokenizer.decode(text[start:-2]))
        if rng.random() < 0.3 and len(content) > 4:
            cut = rng.randint(1, len(content) - 2)
            return [*self.encode(content[:cut]), *self.encode(content[cut:]), text[-2]]
        return [*self.encode(content), text[-2]]


def _parsed(message: Message) -> Message:
    """vLLM hands the arguments of calls to the template as objects (chat_utils)."""
    calls = copy.deepcopy(message.get("tool_calls"))
    for call in calls or ():
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return {**message, "tool_calls": calls} if calls else message


# --- turns


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def tool(rng: random.Random) -> Message:
    name = rng.choice(("read", "write", "shell", "search")) + str(rng.randint(1, 99))
    parameters = {"type": "object", "properties": {"path": {"type": "string", "description": words(rng, 2, 30)}}}
    return {"type": "function", "function": {"name": name, "description": words(rng, 3, 40), "parameters": parameters}}


def said(rng: random.Random, number: int, *, tools: bool) -> Message:
    if tools and rng.random() < 0.3:
        function = {"name": "read", "arguments": json.dumps({"path": words(rng, 1, 6), "limit": rng.randint(1, 99)})}
        call = {"id": f"call-{number}", "type": "function", "function": function}
        return {"role": "assistant", "content": words(rng, 1, 9) if rng.random() < 0.5 else None, "tool_calls": [call]}
    space = rng.choice(("", "", "", " ", "\n"))
    return {"role": "assistant", "content": space + words(rng, 2, 60) + rng.choice(("", "", "\n", " "))}


def asked(rng: random.Random, last: Message | None) -> Message:
    if last and last.get("tool_calls"):
        return {"role": "tool", "tool_call_id": last["tool_calls"][0]["id"], "content": words(rng, 0, 80)}
    return {"role": "user", "content": words(rng, 2, 80)}


def conversation(rng: random.Random) -> Conversation:
    frame: dict[str, Any] = {"tool_choice": "auto"}
    if rng.random() < 0.6:
        frame["tools"] = [tool(rng) for _ in range(rng.randint(1, 6))]
    messages = [{"role": "system", "content": words(rng, 2, 150)}] if rng.random() < 0.8 else []
    last: Message | None = None
    for number in range(rng.randint(0, 5)):
        last_asked, last = asked(rng, last), said(rng, number, tools="tools" in frame)
        messages += [last_asked, last]
    return Conversation([*messages, asked(rng, last)], frame)


Edit = Callable[[random.Random, Conversation], None]


def _none(rng: random.Random, now: Conversation) -> None:
    pass


def _strip_reply(rng: random.Random, now: Conversation) -> None:
    for message in now.messages:
        if message["role"] == "assistant" and message["content"]:
            message["content"] = message["content"].strip()


def _alter_reply(rng: random.Random, now: Conversation) -> None:
    reply = [message for message in now.messages if message["role"] == "assistant"][-1]
    reply["content"] = (reply["content"] or "")[: rng.randint(0, 20)] + words(rng, 1, 9)


def _alter_system(rng: random.Random, now: Conversation) -> None:
    if now.messages[0]["role"] == "system":
        text = now.messages[0]["content"]
        at = rng.randint(0, len(text))
        now.messages[0]["content"] = f"{text[:at]}12:0{rng.randint(0, 9)}{text[at:]}"


def _drop_system(rng: random.Random, now: Conversation) -> None:
    if now.messages[0]["role"] == "system":
        del now.messages[0]


def _alter_tools(rng: random.Random, now: Conversation) -> None:
    tools = now.frame.setdefault("tools", [])
    what = rng.randint(0, 2)
    if what == 0 or not tools:
        tools.append(tool(rng))
    elif what == 1:
        tools.pop(rng.randrange(len(tools)))
    else:
        rng.choice(tools)["function"]["description"] += " changed"


def _reorder_tool(rng: random.Random, now: Conversation) -> None:
    if now.frame.get("tools"):
        now.frame["tools"][0] = dict(reversed(now.frame["tools"][0].items()))


def _choice(rng: random.Random, now: Conversation) -> None:
    now.frame["tool_choice"] = rng.choice(("required", "auto"))
    now.frame["parallel_tool_calls"] = rng.random() < 0.5


def _trim(rng: random.Random, now: Conversation) -> None:
    system = now.messages[:1] if now.messages[0]["role"] == "system" else []
    now.messages = [*system, *now.messages[-rng.choice((1, 3)) :]]


def _alter_question(rng: random.Random, now: Conversation) -> None:
    some = [message for message in now.messages[:-1] if message["role"] in ("user", "tool")]
    message = rng.choice(some)
    message["content"] = f"<reminder>{words(rng, 1, 5)}</reminder>\n{message['content']}"


def _forget(rng: random.Random, now: Conversation) -> None:
    place = rng.randrange(len(now.messages) - 1)
    del now.messages[place]


def _insert(rng: random.Random, now: Conversation) -> None:
    now.messages.insert(rng.randrange(1, len(now.messages)), {"role": "user", "content": words(rng, 1, 20)})


def _rename_calls(rng: random.Random, now: Conversation) -> None:
    """Other ids, as some clients make them: no template of ours writes them."""
    for message in now.messages:
        for call in message.get("tool_calls") or ():
            call["id"] = f"x{call['id']}"
        if message["role"] == "tool":
            message["tool_call_id"] = f"x{message['tool_call_id']}"


EDITS: dict[Edit, int] = {
    _none: 6, _strip_reply: 5, _alter_reply: 3, _alter_system: 3, _drop_system: 1, _alter_tools: 4, _reorder_tool: 1,
    _choice: 5, _trim: 2, _alter_question: 3, _forget: 2, _insert: 2, _rename_calls: 1,
}  # fmt: skip


def case(rng: random.Random) -> Case:
    before = conversation(rng)
    reply = said(rng, 99, tools="tools" in before.frame)
    now = copy.deepcopy(before)
    now.messages += [copy.deepcopy(reply), asked(rng, reply)]
    edits = rng.choices(list(EDITS), weights=list(EDITS.values()), k=rng.choice((1, 1, 1, 2, 3)))
    for edit in edits:
        if {"user", "assistant"} <= {message["role"] for message in now.messages[:-1]}:
            edit(rng, now)
    return Case(before, reply, now, [edit.__name__ for edit in edits])


# --- the truth


def truth(template: Template, one: Case, had: list[int], has: list[int], prompt: int) -> str:
    """The reason, by the first token of `had` that `has` has not."""
    place = next((i for i, (a, b) in enumerate(zip(had, has, strict=False)) if a != b), min(len(had), len(has)))
    if place >= prompt:
        sent_back = [m for m in one.now.messages if m["role"] == "assistant"][-1:]
        text = sent_back[0]["content"] if sent_back else None
        return "reply-rerendered" if text == one.reply["content"] else "message-changed"
    if place >= max(template.front(one.before, had), template.front(one.now, has)):
        return "message-changed"
    before, now = system_of(one.before), system_of(one.now)
    # The template writes the system message first, the tools behind it.
    first = before != now and place <= len(template.encode(f"<|im_start|>system\n{before}"))
    return "message-changed" if first else "frame-changed"


def system_of(one: Conversation) -> str:
    return str(one.messages[0]["content"]) if one.messages[0]["role"] == "system" else ""


@pytest.fixture(scope="module")
def template(demo_folder: Path) -> Template:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - takes seconds to import

    return Template(PreTrainedTokenizerFast.from_pretrained(demo_folder))


@pytest.mark.timeout(300)
def test_the_reason_is_the_true_one(template: Template) -> None:
    rng, wrong, seen = random.Random(11), Counter[tuple[str, str, str]](), Counter[str]()
    judged = 0
    while judged < TURNS:
        one = case(rng)
        prompt = template.render(one.before)
        had = [*prompt, *template.sampled(one.reply, rng)]
        has = template.render(one.now)
        common = next((i for i, (a, b) in enumerate(zip(had, has, strict=False)) if a != b), min(len(had), len(has)))
        cached = min(common, len(had) - 1, len(has) - 1) // CHUNK * CHUNK
        evicted = rng.random() < 0.1
        miss = explain_miss(
            TurnCacheStats(
                prompt=len(has), cached=0 if evicted else cached, chunk_size=CHUNK, messages=one.now.messages,
                frame=one.now.frame, salt="s",
                before=PreviousTurn(len(had), len(prompt), [*one.before.messages, one.reply], one.before.frame, "s"),
            )
        )  # fmt: skip
        if not evicted and cached >= miss.expected:
            assert miss.reason in ("none", "shorter-than-chunk")
            continue
        if not miss.expected:
            continue
        true = truth(template, one, had, has, len(prompt)) if cached < miss.expected else "evicted"
        judged += 1
        seen[true] += 1
        if miss.reason != true and not (evicted and miss.reason == "evicted"):
            wrong[(true, str(miss), ",".join(one.edits))] += 1
    assert set(seen) == {"message-changed", "frame-changed", "reply-rerendered", "evicted"}, seen
    agreed = 1 - wrong.total() / judged
    assert agreed >= 0.99, f"{agreed:.2%}\n" + "\n".join(f"{n} {what}" for what, n in wrong.most_common(30))
