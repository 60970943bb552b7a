"""The interface of a durable tier. Three implementations: `disk`, `redis` and `s3`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from gateway.kv.keys import ObjectKey
from gateway.records import PinnedObject


class ObjectState(Enum):
    """What `check_and_restore` found of one object, and what it did."""

    INTACT = "intact"  # under LMCache's name, bytes as pinned
    RELINKED = "relinked"  # was missing or damaged there; restored from the pin
    MISSING = "missing"  # neither LMCache's object nor the pin exists
    CORRUPT = "corrupt"  # the bytes do not match the checksum; deleted, so that nobody loads them

    @property
    def usable(self) -> bool:
        """Whether LMCache will now find the right bytes in this tier."""
        return self in (ObjectState.INTACT, ObjectState.RELINKED)


class TierUnavailable(Exception):
    """The tier cannot be reached or cannot be written; the message says why."""


class TierFull(TierUnavailable):
    """The tier has no room left."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a tier holds of one object: bytes under LMCache's name, bytes of our pin, and the bytes that both take."""

    key: ObjectKey
    original: int
    pin: int
    size: int


class Tier(Protocol):
    """One durable tier. All keys of one call are of one window, so a call may be large but never unbounded."""

    @property
    def name(self) -> str:
        """`disk`, `redis` or `s3`."""

    @property
    def adapter(self) -> str:
        """LMCache's name for the kind of storage behind it."""

    @property
    def checksum(self) -> Literal["blake3", "sha256"]:
        """The algorithm of the checksums of its pins; both have 32 bytes."""

    @property
    def lists(self) -> bool:
        """Whether what it holds can be listed; if not, `keys_with_salt` finds nothing, and `inventory` raises."""

    @property
    def suspended(self) -> bool:
        """Whether it hung a moment ago: every call raises TierUnavailable at once until it is tried again."""

    async def sizes(self, names: Sequence[str], *, lately: bool = False) -> list[int]:
        """Sizes of the objects that LMCache would find now by these names (`str` of a key), 0 for a missing one.

        Where each name is a request, `lately` lets the tier give the same answer for a minute. Raises TierUnavailable.
        """

    async def pin(self, keys: Sequence[ObjectKey], existing: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        """Keep each object, whatever happens to LMCache's own, and checksum it as it is pinned.

        `existing` has, by key, what other windows have pinned here: a pin that still matches it is kept, one that does
        not is damaged and removed. Returns the objects that could be pinned, in the order of `keys`. Raises TierFull,
        TierUnavailable.
        """

    async def check_and_restore(self, objects: Sequence[PinnedObject]) -> list[ObjectState]:
        """Restore what LMCache has lost from the pins, and the reverse, checking every byte. Raises TierUnavailable."""

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        """Let LMCache find the pins by its names, unchecked, until `drop_original`. Raises TierUnavailable."""

    async def verify(self, objects: Sequence[PinnedObject], *, deep: bool = False) -> list[ObjectState]:
        """Check the pins against their checksums and change nothing. Raises TierUnavailable.

        Every byte is read, but in a tier whose storage keeps checksums itself: there only with `deep`.
        """

    async def read(self, item: PinnedObject) -> bytes | None:
        """Return the bytes of a pin, None where they are not what was pinned. Raises TierUnavailable."""

    async def put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        """Pin bytes that LMCache has not written; `check_and_restore` links them. Raises TierFull, TierUnavailable."""

    async def unpin(self, keys: Iterable[ObjectKey]) -> int:
        """Remove pins and return the bytes that this freed; LMCache's own objects stay. Unknown keys are ignored.

        Raises TierUnavailable.
        """

    async def remove(self, keys: Iterable[ObjectKey]) -> int:
        """Remove pin and object of every key and return the bytes that this freed. Raises TierUnavailable."""

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        """Remove LMCache's objects and leave the pins, as an eviction does. Raises TierUnavailable."""

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        """Return every object and every pin of ours with one of `salts`, in one pass over the tier.

        The model of a key may be spelled differently from when it was stored (`ObjectKey.parse_file_name`): compare
        `address`. Raises TierUnavailable.
        """

    async def inventory(self) -> list[Stored]:
        """Return every object and every pin with its size; keys as in `keys_with_salt`. Raises TierUnavailable."""

    async def free(self) -> int | None:
        """Bytes that LMCache may still write here, None where the tier cannot tell. Raises TierUnavailable."""

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        """Remove every pin of this store except those of `keep`; return how many. Raises TierUnavailable.

        One that is never listed has nothing to sweep: nobody but the store knows its pins.
        """

    async def writers(self) -> set[str]:
        """Return the processes (`own_process.tag`) that are writing a pin or were killed then. Raises TierUnavailable.

        Where a pin is there at once and whole, there are none.
        """

    async def discard_unfinished(self, writers: Collection[str]) -> None:
        """Remove what these processes, which have ended, were writing. Raises TierUnavailable."""

    async def risks(self) -> list[str]:
        """What in its storage puts objects or pins at risk, each with the remedy. Raises TierUnavailable."""
