"""Policies as strangers bring them: good, failing, lying, slow."""

import time

from policies.contract import Freeze, Observation


class Turns:
    """Freezes at a number of turns."""

    def __init__(self, turns: int = 2) -> None:
        self._turns = turns

    def decide(self, seen: Observation, /) -> Freeze | None:
        return Freeze(f"{seen.turn_count} turns") if seen.turn_count >= self._turns else None


class Failing:
    """Fails whenever it is asked."""

    def decide(self, seen: Observation, /) -> Freeze | None:
        raise RuntimeError(f"no idea what to do with {seen.session_id}")


class Exiting:
    """Ends the process, as it thinks."""

    def decide(self, seen: Observation, /) -> Freeze | None:
        raise SystemExit(3)


class Lying:
    """Answers something else than a decision."""

    def decide(self, seen: Observation, /) -> bool:
        return True


class Unprintable:
    """Fails to show what it returns, and what it raises."""

    class _Answer:
        def __repr__(self) -> str:
            raise RuntimeError("not to be shown")

    class _Error(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not to be shown")

    def decide(self, seen: Observation, /) -> object:
        if seen.turn_count:
            return self._Answer()
        raise self._Error


class Slow:
    """Thinks long, and blocks its thread meanwhile."""

    def decide(self, seen: Observation, /) -> Freeze | None:
        time.sleep(1)


class NotOne:
    """Has no `decide`."""


class SlowToMake:
    """Takes its time before it can be asked."""

    def __init__(self, seconds: float = 0) -> None:
        time.sleep(seconds)

    def decide(self, seen: Observation, /) -> Freeze | None:
        return None
