"""Freeze unfrozen sessions when the gateway shuts down."""

from dataclasses import dataclass

from policies.contract import Freeze, Observation, check_number

_A_WEEK = 7 * 24 * 60


@dataclass(frozen=True, slots=True)
class AtShutdown:
    """Freezes at the end whatever was active within the last `minutes`."""

    minutes: float = _A_WEEK

    def __post_init__(self) -> None:
        check_number("minutes", self.minutes, most=_A_WEEK)

    def decide(self, observation: Observation, /) -> Freeze | None:
        ending = observation.event == "shutdown" and observation.idle_s <= self.minutes * 60
        return Freeze("the gateway was stopped") if ending else None
