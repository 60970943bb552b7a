"""All LMCache servers: one for each node, of which each has its own memory, over tiers that they share.

What is asked of "the cache" is asked of all of them: what is deleted has to be gone from every memory, and from what
each server remembers of a tier. Loads go to one (`at`), that of the engine which will need it.

KV is named alike on all nodes only where chunk size, hash and number of workers are the same. A server that differs
from most is left out (`left_out`): nothing is loaded there, and health says why.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import CacheInfo, LMCache
from gateway.kv.memory import MemoryUse

log = logging.getLogger(__name__)

T = TypeVar("T")

Answers = Mapping[str, T | GatewayError]
"""The answer of each cache, by its URL, or why there is none."""

_TOKENS_PER_S = 10_000.0  # of a load, until one was measured
_SMOOTHING = 0.3  # weight of the newest measurement


class CachePool:
    """The clients, by URL. A method raises `cache_unavailable` only if no cache answers, unless it says otherwise."""

    def __init__(self, make: Callable[[str], LMCache], chunk_size: int = 0) -> None:
        self.missing: dict[str, str] = {}  # names that are looked up for caches: why one has none
        self.left_out: Mapping[str, str] = {}  # by URL: how it differs from the others
        self.silent: Mapping[str, str] = {}  # by URL: why it could not be asked last time
        self._make = make
        self._chunk_size = chunk_size
        self._members: dict[str, LMCache] = {}
        self._info: CacheInfo | None = None
        self._tokens_per_s: dict[str, float] = {}

    async def __aenter__(self) -> "CachePool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for url in list(self._members):
            await self.remove(url)

    async def add(self, url: str) -> None:
        """Take in a cache, unless it is there."""
        if url not in self._members:
            self._members[url] = await self._make(url).__aenter__()

    async def remove(self, url: str) -> None:
        """Forget a cache."""
        gone = self._members.pop(url, None)
        several = len(self._members) > 1  # one alone differs from none
        self.left_out = {one: why for one, why in self.left_out.items() if several and one != url}
        self.silent = {one: why for one, why in self.silent.items() if several and one != url}
        self._tokens_per_s.pop(url, None)
        if gone is not None:
            await gone.__aexit__()

    @property
    def urls(self) -> list[str]:
        """Of all caches, also of those that are left out."""
        return list(self._members)

    def at(self, url: str) -> LMCache | None:
        """The cache with this URL; None if there is none, or it is left out. The only cache has no need of a URL."""
        return None if url in self.left_out else self.own(url)

    def own(self, url: str) -> LMCache | None:
        """The cache with this URL, even if it is left out. The only cache has no need of a URL."""
        if len(self._members) == 1:
            return next(iter(self._members.values()))
        return self._members.get(url)

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk: as configured, else as most caches reported last; 0 before that."""
        if self._chunk_size or not self._members:
            return self._chunk_size
        if len(self._members) > 1:
            return self._info.chunk_size if self._info else 0
        return next(iter(self._members.values())).chunk_size

    async def info(self) -> CacheInfo:
        """Ask all for their configuration, and leave out those that differ; return that of the others.

        `memory` is the sum, `world_sizes` has the models of all.
        """
        if len(self._members) == 1:
            self._info = await next(iter(self._members.values())).info()
            return self._info
        answers = await self.each(LMCache.info)
        return self._compare(answers)

    def _compare(self, answers: Answers[CacheInfo]) -> CacheInfo:
        said = {url: answer for url, answer in answers.items() if isinstance(answer, CacheInfo)}
        self.silent = {url: answer.message for url, answer in answers.items() if isinstance(answer, GatewayError)}
        if not said:
            raise self.none_of(answers)
        agreed = _most(said.values(), self._info)
        left_out = {url: why for url, one in said.items() if (why := _difference(one, agreed))}
        for url in left_out.keys() - self.left_out.keys():
            log.error("cache %s is left out: %s", url, left_out[url])
        for url in self.left_out.keys() - left_out.keys():
            log.info("cache %s is like the others again", url)
        # Of one that cannot be asked, what was seen last is still true.
        still = {url: why for url, why in self.left_out.items() if url in self.silent}
        self.left_out = {**still, **left_out}
        used = [one for url, one in said.items() if url not in left_out]
        worlds = _workers(used)
        self._info = replace(agreed, world_sizes=worlds, memory=_sum(one.memory for one in said.values()))
        return self._info

    def none_of(self, answers: Answers[Any]) -> GatewayError:
        """The error where no cache answered."""
        first = next((answer for answer in answers.values() if isinstance(answer, GatewayError)), None)
        if first is not None and len(answers) == 1:
            return first
        reasons = [answer.message for answer in answers.values() if isinstance(answer, GatewayError)]
        message = "; ".join([*reasons, *self.missing.values()]) or "no cache is known yet"
        return GatewayError("cache_unavailable", message, hint=first.hint if first else "")

    async def each(self, ask: Callable[[LMCache], Awaitable[T]]) -> Answers[T]:
        """Ask all caches at once; return each one's answer. Raises nothing."""
        members = dict(self._members)
        if len(members) == 1:  # the usual case needs no task
            return {url: await _or_error(ask(cache)) for url, cache in members.items()}
        answers = await asyncio.gather(*(_or_error(ask(cache)) for cache in members.values()))
        return dict(zip(members, answers, strict=True))

    async def troubles(self) -> dict[str, str]:
        """What is wrong with each cache, as far as it tells; empty if nothing. Raises nothing."""
        return {url: str(answer) for url, answer in (await self.each(LMCache.trouble)).items()}

    async def encrypts_by_salt(self) -> bool:
        """Whether a storage adapter of any of them encrypts each object with a key made from its salt."""
        answers = await self.each(LMCache.encrypts_by_salt)
        if answers and all(isinstance(answer, GatewayError) for answer in answers.values()):
            raise self.none_of(answers)
        return any(answer is True for answer in answers.values())

    async def delete_each(
        self, keys: Sequence[ObjectKey], *, tier: str, adapter: str | None = None
    ) -> Answers[tuple[int, int]]:
        """Delete `keys` from every cache; return by cache what `LMCache.delete` does. Raises nothing."""
        return await self.each(lambda cache: cache.delete(keys, tier=tier, adapter=adapter))

    async def delete(self, keys: Sequence[ObjectKey], *, tier: str, adapter: str | None = None) -> tuple[int, int]:
        """Delete `keys` from every cache; see `LMCache.delete`, whose results are added up.

        Raises `cache_unavailable` if one of them does not answer, after all others have deleted them.
        """
        answers = await self.delete_each(keys, tier=tier, adapter=adapter)
        if failed := [answer for answer in answers.values() if isinstance(answer, GatewayError)]:
            message = "; ".join(error.message for error in failed)
            raise GatewayError("cache_unavailable", message, hint=failed[0].hint)
        done = [answer for answer in answers.values() if not isinstance(answer, GatewayError)]
        return sum(deleted for deleted, _ in done), sum(skipped for _, skipped in done)

    async def in_memory(self, manifest: str, salt: str) -> dict[str, bool | None]:
        """By cache, whether all of a window's objects are in its memory, or none is (`LMCache.is_in_memory`)."""
        answers = await self.each(lambda cache: cache.is_in_memory(manifest, salt))
        return {url: None if isinstance(answer, GatewayError) else answer for url, answer in answers.items()}

    def loaded(self, cache: LMCache, tokens: int, began: float) -> None:
        """Measure a load of so many tokens that began at `began` (`time.monotonic`) and has ended now."""
        url, took = cache.url, time.monotonic() - began
        if tokens and took > 0:
            before = self._tokens_per_s.get(url, tokens / took)
            self._tokens_per_s[url] = before + _SMOOTHING * (tokens / took - before)

    def load_s(self, url: str, tokens: int) -> float:
        """Seconds that loading so many tokens into a cache takes, by the loads before; see `loaded`."""
        return tokens / self._tokens_per_s.get(url, _TOKENS_PER_S)


def _layout(info: CacheInfo) -> tuple[int, str]:
    return info.chunk_size, info.hash_algorithm


def _most(infos: Iterable[CacheInfo], before: CacheInfo | None) -> CacheInfo:
    """One of those with the layout that most have; of as many, with the one that most had before, or of the first."""
    groups: dict[tuple[int, str], list[CacheInfo]] = {}
    for info in infos:
        groups.setdefault(_layout(info), []).append(info)
    usual = _layout(before) if before else None
    most = groups[max(groups, key=lambda layout: (len(groups[layout]), layout == usual))]
    return replace(most[0], world_sizes=_workers(most))


def _workers(infos: Iterable[CacheInfo]) -> dict[str, int]:
    """The number of workers of each model, as most say."""
    said: dict[str, Counter[int]] = {}
    for info in infos:
        for model, size in info.world_sizes.items():
            said.setdefault(model, Counter())[size] += 1
    return {model: sizes.most_common(1)[0][0] for model, sizes in said.items()}


def _difference(info: CacheInfo, agreed: CacheInfo) -> str:
    """How a cache's configuration differs from that of the others, and the remedy; empty if it does not."""
    if info.chunk_size != agreed.chunk_size:
        return (
            f"its chunk size is {info.chunk_size}, that of the others {agreed.chunk_size}: "
            f"start it with --chunk-size {agreed.chunk_size}"
        )
    if info.hash_algorithm != agreed.hash_algorithm:
        return (
            f"it hashes with {info.hash_algorithm}, the others with {agreed.hash_algorithm}: "
            f"start it with --hash-algorithm {agreed.hash_algorithm}"
        )
    for model, size in info.world_sizes.items():
        if (other := agreed.world_sizes.get(model, size)) != size:
            return (
                f"its engine computes {model} with {size} workers, the others with {other}: "
                f"start it with --tensor-parallel-size {other}"
            )
    return ""


def _sum(uses: Iterable[MemoryUse | None]) -> MemoryUse | None:
    known = [use for use in uses if use is not None]
    if not known:
        return None
    return MemoryUse(
        sum(one.objects for one in known), sum(one.bytes for one in known), sum(one.capacity_bytes for one in known)
    )


async def _or_error(answer: Awaitable[T]) -> T | GatewayError:
    try:
        return await answer
    except GatewayError as error:
        return error
