"""LMCache's `s3` tier: one object of a bucket for each KV object. A pin is a copy of it in a second bucket.

The copy is made inside S3 (CopyObject), which also computes and keeps its SHA-256: no KV passes through the gateway,
unless a server keeps no checksums, and then the object is read and hashed here. LMCache (0.5.6) writes without a
checksum, takes any size for a hit, and lists every object of its bucket as one of its own
(`l2_adapters/s3_l2_adapter.py`): hence our own checksums, and a bucket of our own, in which nothing may expire.

No bucket is ever listed, for it may have millions of objects: `lists` is False. What LMCache wrote for sessions that
are gone is left to a lifecycle rule of its bucket.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Final, TypeVar

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import ObjectState, Stored, TierUnavailable
from gateway.kv.tiers.liveness import Hung, Liveness
from gateway.kv.tiers.s3_client import Head, Place, S3Client, S3Options
from gateway.records import PinnedObject

Item = TypeVar("Item")
T = TypeVar("T")
_REQUESTS = 32  # at once
_READS = 4  # whole objects at once: megabytes each
_LATELY_S = 60.0
_SIZED = 500  # windows whose sizes are remembered as long


class S3Tier:
    """The S3 tier as the gateway sees it; `store_id` keeps its pins apart from those of another gateway's store."""

    name = "s3"
    adapter = "s3"
    checksum: Final = "sha256"
    lists = False

    def __init__(
        self, options: S3Options, store_id: str, timeout_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._options = options
        self._prefix = f"{store_id}/"
        self._client = S3Client(options, timeout_s)
        self._liveness = Liveness(self._ping, timeout_s, now)
        self._requests = asyncio.Semaphore(_REQUESTS)
        self._reads = asyncio.Semaphore(_READS)
        self._now = now
        self._sized: dict[tuple[str, int], tuple[float, list[int]]] = {}  # of windows that were there as a whole

    async def __aenter__(self) -> "S3Tier":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    @property
    def suspended(self) -> bool:
        return self._liveness.suspended

    async def sizes(self, names: Sequence[str], *, lately: bool = False) -> list[int]:
        if not names:
            return []
        which, now = (names[-1], len(names)), self._now()  # the hash of a window's last chunk is that of all of them
        at, sizes = self._sized.get(which, (0.0, []))
        if lately and sizes and now - at < _LATELY_S:
            return sizes
        heads = await self._each([self._original(name) for name in names], self._head)
        sizes = [head.size if head else 0 for head in heads]
        if all(sizes):
            self._sized = {**dict(islice(self._sized.items(), max(0, len(self._sized) - _SIZED), None)),
                           which: (now, sizes)}  # fmt: skip
        return sizes

    async def pin(self, keys: Sequence[ObjectKey], existing: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        names = [str(key) for key in keys]
        pinned = await self._each(names, lambda name: self._pin_one(name, existing.get(name)))
        return [one for one in pinned if one is not None]

    async def check_and_restore(self, objects: Sequence[PinnedObject]) -> list[ObjectState]:
        return await self._each(objects, self._check_and_restore)

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        await self._each(objects, lambda one: self._copy(self._pin(one.pin_key), self._original(one.key)))

    async def verify(self, objects: Sequence[PinnedObject], *, deep: bool = False) -> list[ObjectState]:
        return await self._each(objects, lambda one: self._check(self._pin(one.pin_key), one, deep=deep))

    async def read(self, item: PinnedObject) -> bytes | None:
        value = await self._run(lambda: self._client.get(self._pin(item.pin_key)))
        if value is None or len(value) != item.size:
            return None
        return value if await asyncio.to_thread(_sha256, value) == item.checksum else None

    async def put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        digest = await asyncio.to_thread(_sha256, value)
        await self._run(lambda: self._client.put(self._pin(str(key)), value, digest))
        return PinnedObject(str(key), self.name, len(value), digest)

    async def unpin(self, keys: Iterable[ObjectKey]) -> int:
        return sum(await self._each([self._pin(str(key)) for key in keys], self._free))

    async def remove(self, keys: Iterable[ObjectKey]) -> int:
        places = [place for key in keys for place in (self._original(str(key)), self._pin(str(key)))]
        return sum(await self._each(places, self._free))

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        await self._each([self._original(str(key)) for key in keys], self._delete)

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        return set()  # the lifecycle rule deletes them

    async def inventory(self) -> list[Stored]:
        raise TierUnavailable("s3 tier: a bucket is never listed")

    async def free(self) -> int | None:
        return None

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        return 0  # what a gateway leaves that ends while it pins is known by its claim (`gateway.windows.claims`)

    async def writers(self) -> set[str]:
        return set()

    async def discard_unfinished(self, writers: Collection[str]) -> None:
        return

    async def risks(self) -> list[str]:
        buckets = (self._options.bucket, self._options.pins_bucket)
        there = await self._each(buckets, self._client.head_bucket)
        return [
            f"s3 tier: there is no bucket {bucket}; create it, and in LMCache's bucket alone a lifecycle rule"
            for bucket, found in zip(buckets, there, strict=True)
            if not found
        ]

    def _original(self, name: str) -> Place:
        return Place(self._options.bucket, name)

    def _pin(self, name: str) -> Place:
        return Place(self._options.pins_bucket, self._prefix + name)

    async def _pin_one(self, name: str, existing: PinnedObject | None) -> PinnedObject | None:
        original, pin = self._original(name), self._pin(name)
        if existing is not None:
            if (await self._check(pin, existing)).usable:
                return existing
            await self._remove_damaged(original, pin)
        await self._copy(original, pin)  # if there is nothing to copy, another freeze may have pinned it before
        head = await self._head(pin)
        found = (head.size, head.sha256) if head and head.sha256 else await self._digest(pin)
        return PinnedObject(name, self.name, *found) if found else None

    async def _remove_damaged(self, original: Place, pin: Place) -> None:
        """Delete a damaged pin, and LMCache's object where it has the same bytes."""
        damaged = await self._digest(pin)
        if damaged is not None and await self._digest(original) == damaged:
            await self._delete(original)
        await self._delete(pin)

    async def _check_and_restore(self, item: PinnedObject) -> ObjectState:
        original, pin = self._original(item.key), self._pin(item.pin_key)
        at_original, at_pin = await self._head(original), await self._head(pin)
        if (await self._compare(pin, at_pin, item)).usable:
            if at_original and at_pin and at_original.has_bytes_of(at_pin):
                return ObjectState.INTACT
            if at_original and at_original.sha256 == item.checksum and at_original.size == item.size:
                return ObjectState.INTACT
            # What LMCache wrote may be right all the same: copying it inside S3 is cheaper than reading it.
            await self._copy(pin, original)
            if (await self._check(original, item)).usable:
                return ObjectState.RELINKED
            await self._delete(original)
            return ObjectState.CORRUPT
        if (await self._compare(original, at_original, item)).usable:
            await self._copy(original, pin)
            return ObjectState.INTACT
        await self._delete(original)
        await self._delete(pin)
        return ObjectState.CORRUPT if at_original or at_pin else ObjectState.MISSING

    async def _check(self, place: Place, item: PinnedObject, *, deep: bool = False) -> ObjectState:
        return await self._compare(place, await self._head(place), item, deep=deep)

    async def _compare(self, place: Place, head: Head | None, item: PinnedObject, *, deep: bool = False) -> ObjectState:
        """Compare an object with what was pinned, by reading it if S3 has no checksum of it or with `deep`."""
        if head is None:
            return ObjectState.MISSING
        if head.size != item.size:
            return ObjectState.CORRUPT
        found = (head.size, head.sha256) if head.sha256 and not deep else await self._digest(place)
        if found is None:
            return ObjectState.MISSING  # since then
        return ObjectState.INTACT if found == (item.size, item.checksum) else ObjectState.CORRUPT

    async def _free(self, place: Place) -> int:
        head = await self._head(place)
        if head is None:
            return 0
        await self._delete(place)
        return head.size

    async def _head(self, place: Place) -> Head | None:
        async with self._requests:
            return await self._client.head(place)

    async def _copy(self, source: Place, target: Place) -> bool:
        async with self._requests:
            return await self._client.copy(source, target)

    async def _delete(self, place: Place) -> None:
        self._sized.clear()
        async with self._requests:
            await self._client.delete(place)

    async def _digest(self, place: Place) -> tuple[int, bytes] | None:
        async with self._reads:
            return await self._client.digest(place)

    async def _ping(self) -> None:
        with suppress(TierUnavailable):  # an error is an answer too; the call itself will raise it
            await self._client.head_bucket(self._options.pins_bucket)

    async def _each(self, items: Sequence[Item], work: Callable[[Item], Awaitable[T]]) -> list[T]:
        """Do `work` on every item, several at once; the order is kept. All have ended before a failure is raised."""
        return await self._run(partial(_in_parallel, items, work))

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._liveness.run(call)
        except Hung as error:
            raise TierUnavailable(f"s3 tier: {error}") from error


async def _in_parallel(items: Sequence[Item], work: Callable[[Item], Awaitable[T]]) -> list[T]:
    results: dict[int, T] = {}
    waiting = iter(enumerate(items))

    async def take() -> None:
        for index, item in waiting:
            results[index] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(_REQUESTS, len(items))):
                group.create_task(take())
    except BaseExceptionGroup as failures:  # the first one ends the others
        raise failures.exceptions[0] from None
    return [results[index] for index in range(len(items))]


def _sha256(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()
