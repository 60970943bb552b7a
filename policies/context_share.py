"""Freeze a conversation that is about to fill its model's context."""

from dataclasses import dataclass

from policies.contract import Freeze, Observation, check_number


@dataclass(frozen=True, slots=True)
class ContextShare:
    """Freezes once when the session passes `share` of the context limit."""

    share: float = 0.9

    def __post_init__(self) -> None:
        check_number("share", self.share, most=1)

    def decide(self, observation: Observation, /) -> Freeze | None:
        limit = observation.context_limit
        if not limit or not observation.passes(self.share * limit):
            return None
        used = observation.token_count / limit
        return Freeze(f"{used:.1%} of the context limit of {limit} tokens (threshold {self.share:.1%})")
