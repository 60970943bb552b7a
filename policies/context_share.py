"""Freeze a conversation that is about to fill its model's context."""

from dataclasses import dataclass

from policies.contract import Freeze, Observation, check_number


@dataclass(frozen=True, slots=True)
class ContextShare:
    """Freezes once when the session passes `share` of the context limit; see `TokenThreshold`."""

    share: float = 0.9

    def __post_init__(self) -> None:
        check_number("share", self.share, most=1)

    def decide(self, seen: Observation, /) -> Freeze | None:
        """See `Policy.decide`."""
        if not seen.context_limit or not seen.covered_tokens < self.share * seen.context_limit <= seen.token_count:
            return None
        used = seen.token_count / seen.context_limit
        return Freeze(f"{used:.1%} of the context limit of {seen.context_limit} tokens (threshold {self.share:.1%})")
