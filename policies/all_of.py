"""Freeze when several policies agree."""

from collections.abc import Sequence
from dataclasses import dataclass

from policies.contract import Freeze, Observation, Policy


@dataclass(frozen=True, slots=True)
class AllOf:
    """Freezes when every policy would, for all their reasons."""

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("policies must be a list of at least one policy")

    def decide(self, seen: Observation, /) -> Freeze | None:
        """See `Policy.decide`."""
        reasons = []
        for policy in self.policies:
            decision = policy.decide(seen)
            if decision is None:
                return None
            reasons.append(decision.reason)
        return Freeze(" and ".join(reasons))
