"""The two conversations of `cwg demo`: a short one with a fact to remember, and one of some 4,000 tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

_LONG_TOKENS = 4_000
_SHARE = 0.6  # of the context limit that the long conversation takes at most
_WINDS = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
_SIGHTS = ("a whale", "two fishing boats", "nothing but water", "a bank of fog", "gulls", "a lighthouse", "the moon")
_WORKS = ("mended the sails", "scrubbed the deck", "checked the ropes", "wrote letters", "painted the rail")
_MEALS = ("beans and bread", "fish soup", "rice with onions")


@dataclass(slots=True)
class Script:
    """What the user says, and the question at the end; `messages` grows with the replies."""

    kind: str
    turns: tuple[str, ...]
    question: str
    messages: list[dict[str, str]] = field(default_factory=list)


def short_script() -> Script:
    """A fact in the first message, asked for two turns later."""
    return Script(
        "short",
        (
            "The secret word for the launch is marmalade. Please remember it.",
            "Thank you. Now something else: tell me in two sentences what the sea is like in the morning, when the "
            "boats come back to the harbour, the gulls follow them, and the market on the quay opens its stalls.",
        ),
        "What is the secret word for the launch?",
    )


def long_script(count: Callable[[str], int], limit: int) -> Script:
    """The log of a ship, as many days of it as make some 4,000 tokens by `count`, or fit into a smaller context."""
    wanted = min(_LONG_TOKENS, int(limit * _SHARE)) if limit else _LONG_TOKENS
    days = list(islice(_days(), 200))
    tokens = count("\n".join(days))
    kept = "\n".join(days[: max(1, len(days) * wanted // max(tokens, 1))])
    return Script(
        "long", (f"This is the log of the ship Marigold.\n{kept}\nPlease read it.",), "What is the name of the ship?"
    )


def _days() -> Iterator[str]:
    day = 0
    while True:
        day += 1
        wind, sight = _WINDS[day % len(_WINDS)], _SIGHTS[day % len(_SIGHTS)]
        work, meal = _WORKS[day % len(_WORKS)], _MEALS[day % len(_MEALS)]
        yield f"Day {day}: wind from the {wind}. We saw {sight}, {work} and had {meal} for dinner."
