"""Sizes, times and counts as people read them."""

from datetime import UTC, datetime

_SIZES = ("KiB", "MiB", "GiB", "TiB")
_SPANS = ((86400, "day"), (3600, "h"), (60, "min"), (1, "s"))
_LONG_S = 120  # from then on minutes are exact enough
_LONG_AGO_S = 60 * 86400  # from then on a date says more


def size(count: int) -> str:
    """A number of bytes: `512 bytes`, `1.0 MiB`."""
    power = min((count.bit_length() - 1) // 10, len(_SIZES))
    return f"{count / 1024**power:.1f} {_SIZES[power - 1]}" if power > 0 else counted(count, "byte")


def counted(count: int, noun: str) -> str:
    """A number of things: `1 chunk`, `1,024 chunks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def share(part: int, whole: int | None, noun: str) -> str:
    """A part of a whole, in percent where the whole is known: `208 of 32,768 tokens (0.6%)`."""
    return f"{part:,} of {counted(whole, noun)} ({part / whole:.1%})" if whole else counted(part, noun)


def took(duration_ms: float) -> str:
    """How long something took, given in milliseconds: `78 ms`, `1.2 s`."""
    return f"{duration_ms:.0f} ms" if duration_ms < 1000 else f"{duration_ms / 1000:,.1f} s"


def about(seconds: float) -> str:
    """An estimated time: `about 0.3 s`, `about 14 min`."""
    return f"about {took(seconds * 1000) if seconds < _LONG_S else span(seconds)}"


def span(seconds: float) -> str:
    """A longer time in its largest unit, rounded down: `5 s`, `2 days`."""
    length, unit = next((one for one in _SPANS if seconds >= one[0]), _SPANS[-1])
    whole = int(seconds // length)
    return counted(whole, unit) if unit == "day" else f"{whole} {unit}"


def ago(moment: str | None, now: float) -> str:
    """How long before `now` an ISO 8601 time was; a date for one long ago, and nothing for None."""
    if moment is None:
        return ""
    passed = now - _epoch(moment)
    if passed < 1:
        return "just now"
    return moment[:10] if passed > _LONG_AGO_S else f"{span(passed)} ago"


def until(moment: str | None, now: float) -> str:
    """How long after `now` an ISO 8601 time is, or how long ago; nothing for None."""
    if moment is None:
        return ""
    left = _epoch(moment) - now
    return f"in {span(left)}" if left >= 1 else ago(moment, now)


def at(moment: str | None, now: float) -> str:
    """An ISO 8601 time with how long ago or away it is: `2026-11-30 14:35:10 UTC, 2 min ago`; nothing for None."""
    if moment is None:
        return ""
    there = datetime.fromtimestamp(_epoch(moment), UTC)
    return f"{there:%Y-%m-%d %H:%M:%S} UTC, {until(moment, now)}"


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
