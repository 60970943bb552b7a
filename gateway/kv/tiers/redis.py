"""LMCache's `resp` or `valkey` tier: one string per object. A pin is a copy of it under a key of ours.

Redis has no hard links, so a pin takes the object's size again; `COPY` makes it inside the server. Checking bytes means
reading them over the network, in batches, so that memory stays bounded.

The `valkey` adapter may put a prefix and an `@` in front of its keys (lmcache 0.5.6,
`l2_adapters/valkey_l2_adapter.py`), and only it speaks to a cluster. There a pin must be in the slot of its object to
be copied: so it has the whole of LMCache's key in braces, the part of a key that a cluster hashes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeVar, cast

from blake3 import blake3
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import OutOfMemoryError, RedisClusterException, RedisError, ResponseError
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
_KEEPS_ALL = "noeviction"
_ANSWER_S = 1.5  # for a PING: Redis runs one command at a time, and each of ours takes milliseconds

Digest = tuple[int, bytes] | None  # size in bytes and blake3 of a value, None where there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisOptions:
    """Where LMCache's Redis is, and how LMCache uses it: by which adapter, with which `key_prefix`, as a cluster."""

    url: str
    adapter: Literal["resp", "valkey"] = "resp"
    prefix: str = ""
    cluster: bool = False


class RedisTier:
    """The Redis tier as the gateway sees it; `store_id` keeps its pins apart from those of another gateway's store."""

    name = "redis"
    checksum: Final = "blake3"
    lists = True

    def __init__(
        self, options: RedisOptions, store_id: str, timeout_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._liveness = Liveness(self._ping, min(timeout_s, _ANSWER_S), now)
        client: type[Any] = RedisCluster if options.cluster else Redis  # of the same commands
        self._redis = client.from_url(options.url, socket_connect_timeout=timeout_s, socket_timeout=2 * timeout_s)
        self._cluster = options.cluster
        self._prefix = f"{options.prefix}@" if options.prefix else ""
        self._pins = f"cwg:{store_id}:pin:"
        self.adapter = options.adapter

    async def __aenter__(self) -> "RedisTier":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    @property
    def suspended(self) -> bool:
        return self._liveness.suspended

    async def sizes(self, names: Sequence[str], *, lately: bool = False) -> list[int]:
        return await self._sizes_of([self._original(name) for name in names])

    async def _sizes_of(self, names: Sequence[str]) -> list[int]:
        return [
            size for batch in _batches(names, _NAMES_PER_CALL) for size in await self._call(partial(self._sizes, batch))
        ]

    async def _sizes(self, names: Sequence[str]) -> list[int]:
        if not self._cluster:  # there a script may use the keys of one slot only
            with suppress(ResponseError):  # the user may not run scripts; any other error will come again
                sizes = await cast("Awaitable[bytes]", self._redis.eval(_SIZES, len(names), *names))
                return [int(size) for size in sizes.split()]
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.strlen(name)
        return list(await pipe.execute())

    async def _values(self, names: Sequence[str]) -> list[bytes | None]:
        if not self._cluster:
            return list(await self._redis.mget(names))
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.get(name)
        return list(await pipe.execute())

    async def pin(self, keys: Sequence[ObjectKey], existing: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        names = [str(key) for key in keys]
        good = await self._check_existing([existing[name] for name in names if name in existing])
        fresh = [name for name in names if name not in good]
        await self._copy([(self._original(name), self._pin_name(name)) for name in fresh])
        digests = await self._digests([self._pin_name(name) for name in fresh])
        good |= {
            name: PinnedObject(name, self.name, *digest) for name, digest in zip(fresh, digests, strict=True) if digest
        }
        return [good[name] for name in names if name in good]

    async def check_and_restore(self, objects: Sequence[PinnedObject]) -> list[ObjectState]:
        states: list[ObjectState] = []
        for batch in _batches(objects, _VALUES_PER_CALL):
            originals = await self._digests([self._original(o.key) for o in batch])
            pins = await self._digests([self._pin_name(o.pin_key) for o in batch])
            states += [await self._check_and_restore(*one) for one in zip(batch, originals, pins, strict=True)]
        return states

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        await self._copy([(self._pin_name(one.pin_key), self._original(one.key)) for one in objects])

    async def verify(self, objects: Sequence[PinnedObject], *, deep: bool = False) -> list[ObjectState]:
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
        return await self._free([n for key in keys for n in (self._original(str(key)), self._pin_name(str(key)))])

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        await self._unlink([self._original(str(key)) for key in keys])

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        wanted = frozenset(salts)
        names = await self._scan("*@*" if self._cluster or len(wanted) != 1 else f"*@{next(iter(wanted))}")
        keys = (ObjectKey.parse_or_none(self._key_of(name)) for name in names)
        return {key for key in keys if key is not None and key.salt in wanted}

    async def inventory(self) -> list[Stored]:
        keys = dict.fromkeys(self._key_of(name) for name in await self._scan("*@*"))
        parsed = [(name, key) for name in keys if (key := ObjectKey.parse_or_none(name)) is not None]
        originals = await self._sizes_of([self._original(name) for name, _ in parsed])
        pins = await self._sizes_of([self._pin_name(name) for name, _ in parsed])
        sized = zip(parsed, originals, pins, strict=True)
        return [Stored(key, original, pin, original + pin) for (_, key), original, pin in sized if original or pin]

    async def free(self) -> int | None:
        return None  # Redis refuses writes by itself when it is full (`maxmemory`)

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        names = {self._pin_name(str(key)) for key in keep}
        stray = [name for name in await self._scan(f"{self._pins}*") if name not in names]
        await self._unlink(stray)
        return len(stray)

    async def writers(self) -> set[str]:
        return set()

    async def discard_unfinished(self, writers: Collection[str]) -> None:
        return

    async def risks(self) -> list[str]:
        policies = set(await self._call(self._policies)) - {_KEEPS_ALL}
        return [
            f"redis tier: its maxmemory-policy is {policy}, by which windows may be evicted; set it to {_KEEPS_ALL}"
            for policy in sorted(policies)
        ]

    async def _policies(self) -> list[str]:
        """The `maxmemory-policy` of every master, none if the user may not ask for it."""
        with suppress(ResponseError):
            if not self._cluster:
                answers = [await self._redis.info("memory")]
            else:
                await self._redis.initialize()
                masters = self._redis.get_primaries()
                answers = [await self._redis.info("memory", target_nodes=node) for node in masters]
            return [str(answer.get("maxmemory_policy", _KEEPS_ALL)) for answer in answers]
        return []

    async def _scan(self, match: str) -> list[str]:
        found = self._redis.scan_iter(match=match, count=_NAMES_PER_CALL)

        async def scan() -> list[str]:
            return [name.decode(errors="replace") async for name in found]

        return await self._call(scan)

    def _key_of(self, name: str) -> str:
        """The object that a Redis key belongs to, as `str` writes it; "" for other keys and another store's pins."""
        key = name.removeprefix(self._pins)
        if key != name and not self._cluster:
            return key
        key = key.removeprefix("{").removesuffix("}") if key != name else key
        return key.removeprefix(self._prefix) if key.startswith(self._prefix) and not key.startswith("cwg:") else ""

    def _original(self, name: str) -> str:
        return self._prefix + name

    def _pin_name(self, name: str) -> str:
        return f"{self._pins}{{{self._prefix}{name}}}" if self._cluster else self._pins + name

    async def _check_existing(self, objects: Sequence[PinnedObject]) -> dict[str, PinnedObject]:
        """Return the pins that still match; delete the others, and LMCache's object where it has the same bytes."""
        good: dict[str, PinnedObject] = {}
        for batch in _batches(objects, _VALUES_PER_CALL):
            pins = await self._digests([self._pin_name(o.key) for o in batch])
            good |= {o.key: o for o, pin in zip(batch, pins, strict=True) if _state(pin, o).usable}
            bad = [(o.key, pin) for o, pin in zip(batch, pins, strict=True) if o.key not in good]
            originals = await self._digests([self._original(key) for key, _ in bad])
            pairs = zip(bad, originals, strict=True)
            damaged = [self._original(key) for (key, pin), one in pairs if pin is not None and one == pin]
            await self._unlink([*(self._pin_name(key) for key, _ in bad), *damaged])
        return good

    async def _check_and_restore(self, item: PinnedObject, original: Digest, pin: Digest) -> ObjectState:
        name, pin_name = self._original(item.key), self._pin_name(item.pin_key)
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
        freed = sum(await self._sizes_of(names))
        await self._unlink(names)
        return freed

    async def _unlink(self, names: Sequence[str]) -> None:
        for batch in _batches(names, _NAMES_PER_CALL):
            await self._call(partial(self._redis.unlink, *batch))

    async def _digests(self, names: Sequence[str]) -> list[Digest]:
        digests: list[Digest] = []
        for batch in _batches(names, _VALUES_PER_CALL):
            values = await self._call(partial(self._values, batch))
            digests += await asyncio.to_thread(_digest_all, values)  # hashing megabytes would stall every stream
        return digests

    async def _ping(self) -> None:
        try:
            await _timed(self._redis.ping)
        except TimeoutError:
            raise
        except (RedisError, RedisClusterException, OSError):  # an error is an answer too; the call itself will raise it
            return

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._liveness.run(partial(_timed, call))
        except OutOfMemoryError as error:
            raise TierFull(f"redis tier: {error}") from error
        except (RedisError, RedisClusterException, OSError, Hung) as error:
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
