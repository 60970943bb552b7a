"""Freeze a conversation that has been idle."""

from dataclasses import dataclass

from policies.contract import Freeze, Observation, check_number

MOST_MINUTES = 7 * 24 * 60


@dataclass(frozen=True, slots=True)
class IdleTimeout:
    """Freezes when the last turn is `minutes` ago."""

    minutes: float = 15

    def __post_init__(self) -> None:
        check_number("minutes", self.minutes, most=MOST_MINUTES)

    def decide(self, observation: Observation, /) -> Freeze | None:
        if observation.idle_s < self.minutes * 60:
            return None
        return Freeze(f"idle for {observation.idle_s / 60:.1f} minutes (idle timeout {self.minutes:g})")
