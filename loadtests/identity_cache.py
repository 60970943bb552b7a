"""How much of each prompt a prefix cache would hit, with the gateway's salts and without a gateway.

A model of vLLM's prefix cache: unlimited blocks of 32 tokens; a block is a hit if it and all blocks before it were
computed under the same salt; prompts and replies are both kept. Four characters count as a token.

- *Through the gateway* the salt is that of the session's lineage, and the prompt has no lines that `normalise` removes.
- *The engine alone* has no salt. As the gateway deliberately isolates unrelated clients, each conversation is compared
  with an engine of its own, shared only with its forks and side conversations.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson
from blake3 import blake3

from gateway.dialects import prompt_filters
from loadtests.identity_conversation import Request
from loadtests.identity_score import Observation
from loadtests.scripted_upstream import Kind, Message, reply

BLOCK = 32
_CHARS = 4 * BLOCK
_RULES = frozenset(prompt_filters.RULES)


@dataclass(slots=True)
class CacheHits:
    """Tokens of some prompts, and how many of them would be hits; `below` counts prompts with fewer hits through the
    gateway than with the engine alone."""

    tokens: int = 0
    alone: int = 0
    gateway: int = 0
    turns: int = 0
    below: int = 0


def by_trace(observations: Sequence[Observation], lineages: Mapping[str, str]) -> dict[str, CacheHits]:
    """Replay the requests in the order of sending, and return the hits by kind of conversation."""
    alone, through = _Cache(), _Cache()
    owners: dict[str, str] = {}
    hits: defaultdict[str, CacheHits] = defaultdict(CacheHits)
    for observed in observations:
        request = observed.request
        owner = owners.setdefault(request.conversation, owners.get(request.forked_from, request.conversation))
        if not observed.session:
            continue
        prompt = _prompt(request, request.messages)
        alone_hits = alone.turn(owner, prompt, request)
        normal, _ = prompt_filters.apply(request.messages, _RULES)
        gateway_hits = through.turn(lineages[observed.session], _prompt(request, normal), request)
        _add(hits[request.trace], len(prompt) // 4, alone_hits, gateway_hits)
    return dict(sorted(hits.items()))


def _add(total: CacheHits, tokens: int, alone: int, gateway: int) -> None:
    total.tokens += tokens
    total.alone += alone
    total.gateway += gateway
    total.turns += 1
    total.below += gateway < alone


class _Cache:
    def __init__(self) -> None:
        self._blocks: defaultdict[str, set[bytes]] = defaultdict(set)

    def turn(self, salt: str, prompt: str, request: Request) -> int:
        """Compute a turn; return how many tokens of its prompt were hits."""
        if request.kind is Kind.FAILS:
            return 0
        cached = self._blocks[salt]
        hits = 0
        for block in _blocks(prompt):
            if block not in cached:
                break
            hits += BLOCK
        cached.update(_blocks(prompt + _message(reply(request.seed))))
        return hits


def _blocks(text: str) -> Iterator[bytes]:
    link = b""
    for start in range(0, len(text) - len(text) % _CHARS, _CHARS):
        link = blake3(link + text[start : start + _CHARS].encode()).digest(16)
        yield link


def _prompt(request: Request, messages: Iterable[Message]) -> str:
    """Render the prompt as a chat template would: the first system message, the tools, the other messages."""
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
