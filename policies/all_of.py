"""Freeze when several policies agree."""

from collections.abc import Sequence
from dataclasses import dataclass

from policies.contract import Freeze, Observation, Policy, check_policies


@dataclass(frozen=True, slots=True)
class AllOf:
    """Freezes when every policy would, for all their reasons."""

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        check_policies(self.policies)

    def decide(self, observation: Observation, /) -> Freeze | None:
        reasons = []
        for policy in self.policies:
            decision = policy.decide(observation)
            if decision is None:
                return None
            reasons.append(decision.reason)
        return Freeze(" and ".join(reasons))
