"""Freeze a conversation that passes a number of tokens."""

from dataclasses import dataclass

from policies.contract import Freeze, Observation, check_number

MOST_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class TokenThreshold:
    """Freezes once when the session passes `tokens`; again only where it has shrunk below that in between."""

    tokens: int

    def __post_init__(self) -> None:
        check_number("tokens", self.tokens, most=MOST_TOKENS, whole=True)

    def decide(self, observation: Observation, /) -> Freeze | None:
        if not observation.passes(self.tokens):
            return None
        return Freeze(f"{observation.token_count} tokens (threshold {self.tokens})")
