"""LMCache's `resp` tier: one string per object. A pin is a copy of it under a key of ours.

Redis has no hard links, so a pin takes the object's size again; `COPY` makes it inside the server. Checking bytes means
reading them over the network, in batches, so that memory stays bounded.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

from blake3 import blake3
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as SilentError

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import ObjectState, Stored, TierFull, TierUnavailable
from gateway.kv.tiers.liveness import Hung, Liveness
from gateway.records import PinnedObject

Item = TypeVar("Item")
T = TypeVar("T")
_NAMES_PER_CALL = 1000  # keys without values: small
# One command, one string: a thousand sizes take the client 4 ms, and 28 ms in a pipeline (Xeon at 2.5 GHz).
_SIZES = """local sizes = {}
for i, key in ipairs(KEYS) do sizes[i] = redis.call('STRLEN', key) end
return table.concat(sizes, ' ')"""
_VALUES_PER_CALL = 4  # whole objects: megabytes each
_ANSWER_S = 1.5  # for a PING: Redis runs one command at a time, and each of ours takes milliseconds

Digest = tuple[int, bytes] | None  # size in bytes and blake3 of a value, None where there is none


class RedisTier:
    """The Redis tier as the gateway sees it; `store_id` keeps its pins apart from those of another gateway's store."""

    name = "redis"
    adapter = "resp"

    def __init__(self, url: str, store_id: str, timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._liveness = Liveness(self._ping, min(timeout_s, _ANSWER_S), now)
        self._redis = Redis.from_url(url, socket_connect_timeout=timeout_s, socket_timeout=2 * timeout_s)
        self._prefix = f"cwg:{store_id}:pin:"

    async def __aenter__(self) -> "RedisTier":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    @property
    def suspended(self) -> bool:
        return self._liveness.suspended

    async def sizes(self, names: Sequence[str]) -> list[int]:
        return [
            size for batch in _batches(names, _NAMES_PER_CALL) for size in await self._call(partial(self._sizes, batch))
        ]

    async def _sizes(self, names: Sequence[str]) -> list[int]:
        with suppress(ResponseError):  # the user may not run scripts; any other error will come again
            sizes = await cast("Awaitable[bytes]", self._redis.eval(_SIZES, len(names), *names))
            return [int(size) for size in sizes.split()]
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.strlen(name)
        return list(await pipe.execute())

    async def pin(self, keys: Sequence[ObjectKey], existing: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        names = [str(key) for key in keys]
        good = await self._check_existing([existing[name] for name in names if name in existing])
        fresh = [name for name in names if name not in good]
        await self._copy([(name, self._pin_name(name)) for name in fresh])
        digests = await self._digests([self._pin_name(name) for name in fresh])
        good |= {
            name: PinnedObject(name, self.name, *digest) for name, digest in zip(fresh, digests, strict=True) if digest
        }
        return [good[name] for name in names if name in good]

    async def check_and_restore(self, objects: Sequence[PinnedObject]) -> list[ObjectState]:
        states: list[ObjectState] = []
        for batch in _batches(objects, _VALUES_PER_CALL):
            originals = await self._digests([o.key for o in batch])
            pins = await self._digests([self._pin_name(o.pin_key) for o in batch])
            states += [await self._check_and_restore(*one) for one in zip(batch, originals, pins, strict=True)]
        return states

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        await self._copy([(self._pin_name(one.pin_key), one.key) for one in objects])

    async def verify(self, objects: Sequence[PinnedObject]) -> list[ObjectState]:
        pins = await self._digests([self._pin_name(o.pin_key) for o in objects])
        return [_state(pin, one) for pin, one in zip(pins, objects, strict=True)]

    async def read(self, item: PinnedObject) -> bytes | None:
        value: Any = await self._call(partial(self._redis.get, self._pin_name(item.pin_key)))
        (digest,) = await asyncio.to_thread(_digest_all, [value])
        return value if _state(digest, item).usable else None

    async def put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        await self._call(partial(self._redis.set, self._pin_name(str(key)), value))
        digest = await asyncio.to_thread(lambda: blake3(value).digest())
        return PinnedObject(str(key), self.name, len(value), digest)

    async def unpin(self, keys: Iterable[ObjectKey]) -> int:
        return await self._free([self._pin_name(str(key)) for key in keys])

    async def remove(self, keys: Iterable[ObjectKey]) -> int:
        return await self._free([name for key in keys for name in (str(key), self._pin_name(str(key)))])

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        await self._unlink([str(key) for key in keys])

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        wanted = frozenset(salts)
        names = await self._scan(f"*@{next(iter(wanted))}" if len(wanted) == 1 else "*@*")
        return {key for key in map(self._key_of, names) if key is not None and key.salt in wanted}

    async def inventory(self) -> list[Stored]:
        names = [name for name in dict.fromkeys(await self._scan("*@*")) if self._key_of(name) is not None]
        sizes = {name: size for name, size in zip(names, await self.sizes(names), strict=True) if size}
        pairs = [
            (name, sizes.get(name, 0), sizes.get(self._pin_name(name), 0))
            for name in {name.removeprefix(self._prefix) for name in sizes}
        ]
        return [Stored(ObjectKey.parse(name), original, pin, original + pin) for name, original, pin in pairs]

    async def free(self) -> int | None:
        return None  # Redis refuses writes by itself when it is full (`maxmemory`)

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        names = {self._pin_name(str(key)) for key in keep}
        stray = [name for name in await self._scan(f"{self._prefix}*") if name not in names]
        await self._unlink(stray)
        return len(stray)

    async def _scan(self, match: str) -> list[str]:
        found = self._redis.scan_iter(match=match, count=_NAMES_PER_CALL)

        async def scan() -> list[str]:
            return [name.decode(errors="replace") async for name in found]

        return await self._call(scan)

    def _key_of(self, name: str) -> ObjectKey | None:
        """The object that a Redis key belongs to; None for other keys, and for another store's pins."""
        name = name.removeprefix(self._prefix)
        return None if name.startswith("cwg:") else ObjectKey.parse_or_none(name)

    def _pin_name(self, name: str) -> str:
        return self._prefix + name

    async def _check_existing(self, objects: Sequence[PinnedObject]) -> dict[str, PinnedObject]:
        """Return the pins that still match; delete the others, and LMCache's object where it has the same bytes."""
        good: dict[str, PinnedObject] = {}
        for batch in _batches(objects, _VALUES_PER_CALL):
            pins = await self._digests([self._pin_name(o.key) for o in batch])
            good |= {o.key: o for o, pin in zip(batch, pins, strict=True) if _state(pin, o).usable}
            bad = [(o.key, pin) for o, pin in zip(batch, pins, strict=True) if o.key not in good]
            originals = await self._digests([key for key, _ in bad])
            damaged = [key for (key, pin), one in zip(bad, originals, strict=True) if pin is not None and one == pin]
            await self._unlink([*(self._pin_name(key) for key, _ in bad), *damaged])
        return good

    async def _check_and_restore(self, item: PinnedObject, original: Digest, pin: Digest) -> ObjectState:
        name, pin_name = item.key, self._pin_name(item.pin_key)
        original_good, pin_good = _state(original, item).usable, _state(pin, item).usable
        if pin_good and not original_good:
            await self._copy([(pin_name, name)])
            return ObjectState.RELINKED
        if original_good and not pin_good:
            await self._copy([(name, pin_name)])
        if original_good:
            return ObjectState.INTACT
        await self._unlink([name, pin_name])
        return ObjectState.MISSING if original is None and pin is None else ObjectState.CORRUPT

    async def _copy(self, pairs: Sequence[tuple[str, str]]) -> None:
        for batch in _batches(pairs, _NAMES_PER_CALL):
            pipe = self._redis.pipeline(transaction=False)
            for source, target in batch:
                pipe.copy(source, target, replace=True)
                pipe.persist(target)  # a copy inherits the time to live
            await self._call(pipe.execute)

    async def _free(self, names: Sequence[str]) -> int:
        freed = sum(await self.sizes(names))
        await self._unlink(names)
        return freed

    async def _unlink(self, names: Sequence[str]) -> None:
        for batch in _batches(names, _NAMES_PER_CALL):
            await self._call(partial(self._redis.unlink, *batch))

    async def _digests(self, names: Sequence[str]) -> list[Digest]:
        digests: list[Digest] = []
        for batch in _batches(names, _VALUES_PER_CALL):
            values: list[Any] = await self._call(partial(self._redis.mget, batch))
            digests += await asyncio.to_thread(_digest_all, values)  # hashing megabytes would stall every stream
        return digests

    async def _ping(self) -> None:
        try:
            await _timed(self._redis.ping)
        except TimeoutError:
            raise
        except (RedisError, OSError):  # an error is an answer too; the call itself will raise it
            return

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._liveness.run(partial(_timed, call))
        except OutOfMemoryError as error:
            raise TierFull(f"redis tier: {error}") from error
        except (RedisError, OSError, Hung) as error:
            raise TierUnavailable(f"redis tier: {str(error) or type(error).__name__}") from error


def _batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


async def _timed(call: Callable[[], Awaitable[T]]) -> T:
    """Raises the built-in TimeoutError in place of the client's own."""
    try:
        return await call()
    except SilentError as error:
        raise TimeoutError(str(error)) from error


def _digest_all(values: Iterable[bytes | None]) -> list[Digest]:
    return [None if value is None else (len(value), blake3(value).digest()) for value in values]


def _state(digest: Digest, item: PinnedObject) -> ObjectState:
    if digest is None:
        return ObjectState.MISSING
    return ObjectState.INTACT if digest == (item.size, item.checksum) else ObjectState.CORRUPT
