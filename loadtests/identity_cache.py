"""What a prefix cache would have found of each prompt, with the gateway's salts and without a gateway.

A model of vLLM's prefix cache: blocks of 32 tokens, unlimited, a block found if it and all before it were computed
under the same salt; prompts and replies both stay. Four characters are a token.

- *Through the gateway* the salt is that of the session's lineage, and the prompt has no lines that `normalise` removes.
- *The engine alone* has no salt. But what strangers share is kept apart by the gateway on purpose, so each conversation
  is compared with an engine that it has to itself, with its forks and side conversations: the same one that left it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson
from blake3 import blake3

from gateway.dialects import prompt_filters
from loadtests.identity_score import Seen
from loadtests.identity_talk import Request
from loadtests.scripted_upstream import Kind, Message, reply

BLOCK = 32
_CHARS = 4 * BLOCK
_RULES = frozenset(prompt_filters.RULES)


@dataclass(slots=True)
class Found:
    """Tokens of some prompts, and how many of them would have been found; `behind` counts prompts of which the gateway
    would have found less than the engine alone."""

    tokens: int = 0
    alone: int = 0
    gateway: int = 0
    turns: int = 0
    behind: int = 0


def by_trace(seen: Sequence[Seen], lineages: Mapping[str, str]) -> dict[str, Found]:
    """What would have been found, by kind of conversation, in the order in which requests were sent."""
    alone, through = _Cache(), _Cache()
    owners: dict[str, str] = {}
    found: defaultdict[str, Found] = defaultdict(Found)
    for one in seen:
        request = one.request
        owner = owners.setdefault(request.conversation, owners.get(request.of, request.conversation))
        if not one.session:
            continue
        prompt = _prompt(request, request.messages)
        had = alone.turn(owner, prompt, request)
        normal, _ = prompt_filters.apply(request.messages, _RULES)
        has = through.turn(lineages[one.session], _prompt(request, normal), request)
        _add(found[request.trace], len(prompt) // 4, had, has)
    return dict(sorted(found.items()))


def _add(total: Found, tokens: int, alone: int, gateway: int) -> None:
    total.tokens += tokens
    total.alone += alone
    total.gateway += gateway
    total.turns += 1
    total.behind += gateway < alone


class _Cache:
    def __init__(self) -> None:
        self._blocks: defaultdict[str, set[bytes]] = defaultdict(set)

    def turn(self, salt: str, prompt: str, request: Request) -> int:
        """Compute a turn; return how many tokens of its prompt were found."""
        if request.kind is Kind.FAILS:
            return 0
        known = self._blocks[salt]
        found = 0
        for block in _blocks(prompt):
            if block not in known:
                break
            found += BLOCK
        known.update(_blocks(prompt + _message(reply(request.seed))))
        return found


def _blocks(text: str) -> Iterator[bytes]:
    link = b""
    for start in range(0, len(text) - len(text) % _CHARS, _CHARS):
        link = blake3(link + text[start : start + _CHARS].encode()).digest(16)
        yield link


def _prompt(request: Request, messages: Iterable[Message]) -> str:
    """The prompt as a template would write it: the first system message, the tools, the other messages."""
    first, *rest = [_message(message) for message in messages]
    tools = f"<tools>{','.join(request.tools)}{'.' * 400}</tools>" if request.tools else ""
    return f"{first}{tools}{''.join(rest)}" if first.startswith("<system>") else f"{tools}{first}{''.join(rest)}"


def _message(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    calls = "".join(_call(call) for call in message.get("tool_calls") or ())
    return f"<{message['role']}>{text}{calls}</>"


def _call(call: Message) -> str:
    function = call["function"]
    return f"<call>{function['name']}{orjson.dumps(orjson.loads(function['arguments'])).decode()}</call>"
