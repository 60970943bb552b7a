"""Freeze when one of several policies decides so."""

from collections.abc import Sequence
from dataclasses import dataclass

from policies.contract import Freeze, Observation, Policy, check_policies


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Freezes for the reason of the first policy that has one."""

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        check_policies(self.policies)

    def decide(self, observation: Observation, /) -> Freeze | None:
        return next((decision for policy in self.policies if (decision := policy.decide(observation))), None)
