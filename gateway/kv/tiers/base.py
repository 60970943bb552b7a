"""The interface of a durable tier. Two implementations: `disk` and `redis`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from gateway.kv.keys import ObjectKey
from gateway.records import PinnedObject


class Restored(Enum):
    """What `restore` found of one object, and what it did about it."""

    INTACT = "intact"  # under LMCache's name, bytes as pinned
    RELINKED = "relinked"  # was missing or wrong there; put back from the pin
    MISSING = "missing"  # neither LMCache's object nor the pin is there
    CORRUPT = "corrupt"  # what is there does not match the checksum; taken away, so that nobody loads it

    @property
    def usable(self) -> bool:
        """Whether LMCache will now find the right bytes in this tier."""
        return self in (Restored.INTACT, Restored.RELINKED)


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
        """`disk` or `redis`."""
        ...

    @property
    def adapter(self) -> str:
        """LMCache's name for the kind of storage behind it."""
        ...

    @property
    def resting(self) -> bool:
        """Whether it hung a moment ago: every call raises TierUnavailable at once until it is tried again."""
        ...

    async def sizes(self, names: Sequence[str]) -> list[int]:
        """Bytes that LMCache would find now of each of these keys, spelled as `str` writes them; 0 where it has none.

        Raises TierUnavailable.
        """
        ...

    async def pin(self, keys: Sequence[ObjectKey], known: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        """Hold on to each object, whatever happens to LMCache's own, and checksum it as it is held.

        `known` has, by key, what other windows hold here already: a pin that still matches it is kept, one that does
        not is
        damaged and taken away. The answer has the keys that could be pinned, in the order asked. Raises TierFull,
        TierUnavailable.
        """
        ...

    async def restore(self, objects: Sequence[PinnedObject]) -> list[Restored]:
        """Make LMCache's names lead to the pinned bytes again, checking every byte. Raises TierUnavailable."""
        ...

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        """Let LMCache find the pins under its names as they are, unread; `lose` ends it. Raises TierUnavailable."""
        ...

    async def verify(self, objects: Sequence[PinnedObject]) -> list[Restored]:
        """Check the pins against their checksums and change nothing. Raises TierUnavailable."""
        ...

    async def read(self, item: PinnedObject) -> bytes | None:
        """Return the bytes of a pin, None where they are not what was pinned. Raises TierUnavailable."""
        ...

    async def put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        """Pin bytes that LMCache has not written; `restore` shows them to it. Raises TierFull, TierUnavailable."""
        ...

    async def unpin(self, keys: Iterable[ObjectKey]) -> int:
        """Let go of pins and return the bytes that this really freed; LMCache's own objects stay.

        Unknown keys are no error. Raises TierUnavailable.
        """
        ...

    async def remove(self, keys: Iterable[ObjectKey]) -> int:
        """Remove pin and object of every key and return the bytes that this really freed. Raises TierUnavailable."""
        ...

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        """Remove LMCache's objects and leave the pins, as an eviction does. Raises TierUnavailable."""
        ...

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        """Return every object and every pin of ours that lies under one of `salts`, in one look at the tier.

        The model of a key may be spelled otherwise than when it was stored (`ObjectKey.parse_file_name`): compare
        `address`. Raises TierUnavailable.
        """
        ...

    async def inventory(self) -> list[Stored]:
        """Return every object and every pin of ours with its size; keys as in `under`. Raises TierUnavailable."""
        ...

    async def free(self) -> int | None:
        """Bytes that LMCache may still write here, None where the tier cannot tell. Raises TierUnavailable."""
        ...

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        """Let go of every pin of this store but those of `keep`; return how many. Raises TierUnavailable."""
        ...
