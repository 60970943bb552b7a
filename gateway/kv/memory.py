"""What LMCache's memory (L1) holds, as far as LMCache tells.

LMCache (0.5.6) has no call that looks up a key in L1 and leaves it as it is. It reports totals (`/status`), and its
metrics count, by salt, the objects that came into L1 and those that left it (`mp_observability/subscribers/metrics/
l1.py`). So all objects of a window are still there while nothing of its salt has left L1 since before they were loaded,
and none is while nothing of its salt has come into L1 since before they were deleted. Anything else is not known.

LMCache drops events when more than 10,000 wait to be counted (`mp_observability/config.py`, `max_queue_size`): a move
whose event was dropped is not seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MEMORY_TIER = "cpu"
_MOST_KNOWN = 1000  # windows that are remembered


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Objects and bytes in L1, and the bytes that it may hold."""

    objects: int
    bytes: int
    capacity_bytes: int

    @classmethod
    def read(cls, status: Mapping[str, Any]) -> "MemoryUse | None":
        """Read an answer of `/status`; None if it does not say."""
        levels = (status.get("storage_manager") or {}).get("l1_managers")
        if not levels:
            return None
        names = ("total_object_count", "memory_used_bytes", "memory_configured_bytes")
        return cls(*(sum(int(level[name]) for level in levels.values()) for name in names))


class Moves(NamedTuple):
    """How many objects of a salt have come into L1 and left it, in the life of one LMCache process."""

    process: str  # when it began
    came: int
    left: int

    @classmethod
    def read(cls, metrics: bytes, salt: str) -> "Moves | None":
        """Read LMCache's metrics; None if they do not count what this needs, or are no metrics."""
        process = next(_lines_with(b"\n" + metrics, b"\nprocess_start_time_seconds "), None)
        if process is None or b"lmcache_mp_l1_write_chunks_total" not in metrics:
            return None
        lines = list(_lines_with(metrics, f'cache_salt="{salt}"'.encode()))
        try:
            return cls(process.rpartition(b" ")[2].decode(), _total(lines, b"write"), _total(lines, b"evicted"))
        except (ValueError, OverflowError):  # cut off, or garbage
            return None


def _lines_with(metrics: bytes, label: bytes) -> Iterator[bytes]:
    """The whole lines with a label. Each salt has some, so there may be megabytes of others."""
    at = metrics.find(label)
    while at >= 0:
        end = metrics.find(b"\n", at + 1)
        if end < 0:
            return
        yield metrics[metrics.rfind(b"\n", 0, end) + 1 : end]
        at = metrics.find(label, end)


def _total(lines: Iterable[bytes], what: bytes) -> int:
    values = (line.rpartition(b" ")[2] for line in lines if line.startswith(b"lmcache_mp_l1_%b_chunks_total{" % what))
    return sum(int(float(value)) for value in values)


class _Seen(NamedTuple):
    is_there: bool
    before: Moves


class MemoryRecord:
    """Which windows were seen to be in L1 as a whole, or to be out of it. It belongs to one process."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], _Seen] = {}  # by manifest and salt, oldest first

    def remember(self, manifest: str, salt: str, before: Moves | None, *, is_there: bool) -> None:
        """Remember that all of a window's objects were loaded, or deleted. `before`: as counted before that."""
        self._seen.pop((manifest, salt), None)
        if before is None:
            return
        self._seen[manifest, salt] = _Seen(is_there, before)
        if len(self._seen) > _MOST_KNOWN:
            del self._seen[next(iter(self._seen))]

    def knows(self, manifest: str, salt: str) -> bool:
        """Whether there is anything to compare with what is counted now."""
        return (manifest, salt) in self._seen

    def is_there(self, manifest: str, salt: str, now: Moves | None) -> bool | None:
        """Whether all of a window's objects are in L1 (True), none of them is (False), or it is not known (None)."""
        seen = self._seen.get((manifest, salt))
        if seen is None or now is None or now.process != seen.before.process:
            return None
        if now.came < seen.before.came or now.left < seen.before.left:  # no counter shrinks: lines are missing
            return None
        unchanged = now.left == seen.before.left if seen.is_there else now.came == seen.before.came
        return seen.is_there if unchanged else None
