"""Compare two greedy continuations of the same tokens: on stored KV, and computed without it.

They are not equal to the last bit: stored KV was computed turn by turn, a reference in one pass (differences of 0.03 of
a log probability were measured in bfloat16). If two tokens are almost equally likely in both, sound KV may continue
with the other one: the texts differ from there and are no longer compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol

TOLERANCE = 0.1  # of a log probability


class Continuation(Protocol):
    """Generated tokens, by id and as text, their log probabilities, and the likeliest tokens at each position.

    `ids` may be anything that tells two tokens apart.
    """

    @property
    def ids(self) -> Sequence[int | str]:
        """What is compared."""

    @property
    def tokens(self) -> Sequence[str]:
        """As in `likeliest`."""

    @property
    def logprobs(self) -> Sequence[float | None]:
        """Of the tokens."""

    @property
    def likeliest(self) -> Sequence[Mapping[str, float]]:
        """Tokens and their log probabilities."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many tokens were compared, the largest difference of a log probability, and how the comparison ended.

    equal: at the end of both. tie, different: at the last of the tokens that were compared.
    """

    tokens: int
    largest: float
    verdict: Literal["equal", "tie", "different"]


def compare(expected: Continuation, actual: Continuation) -> Comparison:
    """Compare token by token, up to the first difference or tie."""
    largest, compared = 0.0, 0
    pairs = zip_longest(expected.ids, actual.ids, expected.logprobs, actual.logprobs)
    for position, (wanted, got, logprob, other) in enumerate(pairs):
        compared = position + 1
        if _tied(expected, actual, position):
            return Comparison(compared, largest, "tie")
        apart = abs(logprob - other) if logprob is not None and other is not None else None
        if wanted == got and apart is not None:
            largest = max(largest, apart)
        if wanted != got or apart is None or apart > TOLERANCE:
            return Comparison(compared, largest, "different")
    return Comparison(compared, largest, "equal")


def _tied(expected: Continuation, actual: Continuation, position: int) -> bool:
    """Whether the two tokens differ but are almost equally likely in both continuations."""
    if position >= min(len(expected.tokens), len(actual.tokens)):
        return False
    one, other = expected.tokens[position], actual.tokens[position]
    a, b = expected.likeliest[position], actual.likeliest[position]
    if one == other or any(token not in top for token in (one, other) for top in (a, b)):
        return False
    return max(abs(a[one] - b[one]), abs(a[other] - b[other]), abs(a[one] - a[other])) <= TOLERANCE
