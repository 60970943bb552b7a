"""The interface of a policy: one method that takes an observation and returns a decision or None.

A custom policy needs this file alone:

    class Nightly:
        def decide(self, observation: Observation, /) -> Freeze | None:
            return Freeze("it is late") if observation.idle_s > 60 and time.localtime().tm_hour == 3 else None

It is called again and again, off the event loop, by one thread at a time.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

_LONGEST_TEXT = 100  # characters of a wrong value that an error repeats

Event = Literal["turn", "sweep", "shutdown"]


@dataclass(frozen=True, slots=True)
class Observation:
    """A session that has had turns since it was last frozen.

    `event` is the occasion: one of its turns was just recorded, time has passed, or the gateway is shutting down.
    `covered_tokens` is how many tokens it had when it was last frozen automatically, or fewer if it has shrunk since;
    0 if it never was. `context_limit` is None if the model is unknown.
    """

    event: Event
    session_id: str
    model: str
    turn_count: int
    token_count: int
    covered_tokens: int
    context_limit: int | None
    idle_s: float
    age_s: float

    def passes(self, tokens: float) -> bool:
        """Whether the session has reached this many tokens since it was last frozen."""
        return self.covered_tokens < tokens <= self.token_count


@dataclass(frozen=True, slots=True)
class Freeze:
    """The decision to freeze; `reason` becomes the window's description."""

    reason: str


class Policy(Protocol):
    """Decides when to freeze, never how."""

    def decide(self, observation: Observation, /) -> Freeze | None:
        """Return `Freeze` to freeze the session now, else None."""
        ...


def abbreviated(value: object) -> str:
    """Return a wrong value for an error message: text and numbers as they are, anything larger as its type.

    Values come from a request; the `repr` of a large or deeply nested one would take minutes, or fail.
    """
    if isinstance(value, str):
        return repr(value[:_LONGEST_TEXT])
    plain = value is None or isinstance(value, bool | int | float) or value in ([], {})
    return f"{value!r:.{_LONGEST_TEXT}}" if plain else f"a value of type {type(value).__name__}"


def check_number(name: str, value: object, *, most: float, whole: bool = False) -> None:
    """Raise ValueError unless a policy's parameter is a number, more than 0 and at most `most`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not 0 < value <= most:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} must be a {kind}, more than 0 and at most {most:.10g}, not {abbreviated(value)}")


def check_policies(value: object) -> None:
    """Raise ValueError unless a combination's parameter is a list of policies."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"policies must be a list of at least one policy, not {abbreviated(value)}")
