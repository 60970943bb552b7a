"""Custom policies: good, failing, lying, slow."""

import time

from policies.contract import Freeze, Observation


class Turns:
    """Freezes at a number of turns."""

    def __init__(self, turns: int = 2) -> None:
        self._turns = turns

    def decide(self, observation: Observation, /) -> Freeze | None:
        return Freeze(f"{observation.turn_count} turns") if observation.turn_count >= self._turns else None


class Failing:
    """Always fails."""

    def decide(self, observation: Observation, /) -> Freeze | None:
        raise RuntimeError(f"no idea what to do with {observation.session_id}")


class Exiting:
    """Raises SystemExit."""

    def decide(self, observation: Observation, /) -> Freeze | None:
        raise SystemExit(3)


class Lying:
    """Returns something other than a decision."""

    def decide(self, observation: Observation, /) -> bool:
        return True


class Unprintable:
    """Fails to show what it returns, and what it raises."""

    class _Answer:
        def __repr__(self) -> str:
            raise RuntimeError("not to be shown")

    class _Error(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not to be shown")

    def decide(self, observation: Observation, /) -> object:
        if observation.turn_count:
            return self._Answer()
        raise self._Error


class Slow:
    """Blocks its thread for a second."""

    def decide(self, observation: Observation, /) -> Freeze | None:
        time.sleep(1)


class NotOne:
    """Has no `decide`."""


class SlowToMake:
    """Takes `seconds` to create."""

    def __init__(self, seconds: float = 0) -> None:
        time.sleep(seconds)

    def decide(self, observation: Observation, /) -> Freeze | None:
        return None
