"""Pins across tiers: what holds a window's KV objects, however many windows share them.

An object is pinned once, not once per window; which windows hold it is written in the store. So a clone costs no file
and a delete has to ask the store what nobody else holds. Between pinning and the commit of the manifest the store does
not know the pin yet, and between the commit of a deletion and the unpinning it knows it no more; `FileLock` keeps the
two apart, over all processes of this machine that share the store: freezes hold it shared, deletions and sweeps alone.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Restored, Tier, TierFull, TierUnavailable
from gateway.records import PinnedObject, Sizes

_POLL_S = 0.005


class FileLock:
    """A shared or exclusive lock on a file, let go by the kernel when its process dies."""

    def __init__(self, path: Path, poll_s: float = _POLL_S) -> None:
        self._path = path
        self._poll_s = poll_s

    @asynccontextmanager
    async def acquire(self, *, alone: bool) -> AsyncIterator[None]:
        """Wait for the lock and hold it for the block."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):  # noqa: ASYNC110 - the kernel wakes no task
                await asyncio.sleep(self._poll_s)
            yield
        finally:
            os.close(fd)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Pins:
    """The configured tiers, in the order in which LMCache reads them, and the lock over their pins."""

    tiers: tuple[Tier, ...]
    lock: FileLock

    async def present(self, names: Sequence[str]) -> tuple[dict[str, set[str]], list[str]]:
        """Return which of these keys each reachable tier has, and a warning for each tier that cannot be reached."""
        found: dict[str, set[str]] = {}
        warnings: list[str] = []
        for tier in self.tiers:
            try:
                sizes = await tier.sizes(names)
            except TierUnavailable as error:
                warnings.append(str(error))
            else:
                found[tier.name] = {name for name, size in zip(names, sizes, strict=True) if size}
        return found, warnings

    async def missing(self, held: Sizes) -> dict[str, set[str]]:
        """Return by tier what LMCache would not find, going by names and sizes; all of a tier that cannot be asked."""
        tiers = {tier.name: tier for tier in self.tiers}
        missing: dict[str, set[str]] = {}
        for name, objects in held.items():
            sizes = [0] * len(objects)  # no object is empty
            if name in tiers:
                with suppress(TierUnavailable):  # `restore` warns of it
                    sizes = await tiers[name].sizes(list(objects))
            if sizes != list(objects.values()):
                missing[name] = {key for (key, size), seen in zip(objects.items(), sizes, strict=True) if seen != size}
        return missing

    async def pin(
        self, keys: Sequence[ObjectKey], known: Sequence[PinnedObject]
    ) -> tuple[dict[str, dict[str, PinnedObject]], list[str]]:
        """Pin `keys` in every tier that can be reached; `known` is what windows hold already.

        The answer is by tier and key. Raises TierFull; call it under the shared lock.
        """
        pinned: dict[str, dict[str, PinnedObject]] = {}
        warnings: list[str] = []
        for tier in self.tiers:
            try:
                done = await tier.pin(keys, {o.key: o for o in known if o.tier == tier.name})
            except TierFull:
                raise
            except TierUnavailable as error:
                warnings.append(str(error))
                continue
            pinned[tier.name] = {o.key: o for o in done}
        return pinned, warnings

    async def restore(self, objects: Sequence[PinnedObject]) -> tuple[dict[str, dict[str, Restored]], list[str]]:
        """Put back what LMCache lost, checking every byte; the answer is by tier and key."""
        found: dict[str, dict[str, Restored]] = {}
        warnings: list[str] = []
        for tier in self.tiers:
            mine = [o for o in objects if o.tier == tier.name]
            try:
                outcome = await tier.restore(mine)
            except TierUnavailable as error:
                warnings.append(str(error))
                continue
            found[tier.name] = {o.key: state for o, state in zip(mine, outcome, strict=True)}
        return found, warnings

    async def remove(self, keys: Sequence[ObjectKey], *, originals: bool) -> tuple[int, list[str]]:
        """Remove the pins, and LMCache's `originals` too if asked, in every tier; return the bytes freed.

        Call it under the exclusive lock.
        """
        freed = 0
        warnings: list[str] = []
        for tier in self.tiers:
            try:
                freed += await (tier.remove(keys) if originals else tier.unpin(keys))
            except TierUnavailable as error:
                warnings.append(str(error))
        return freed, warnings

    async def under(self, salts: Collection[str]) -> tuple[set[ObjectKey], list[str]]:
        """Return what lies under `salts` in the tiers that can be reached, and a warning for each that cannot."""
        found: set[ObjectKey] = set()
        warnings: list[str] = []
        for tier in self.tiers:
            try:
                found |= await tier.keys_with_salt(salts)
            except TierUnavailable as error:
                warnings.append(str(error))
        return found, warnings

    async def check_room(self, reserve: int) -> None:
        """Raise TierFull where a tier has less than `reserve` bytes free."""
        for tier in self.tiers:
            try:
                free = await tier.free()
            except TierUnavailable:  # whoever goes on to use it is told
                continue
            if free is not None and free < reserve:
                raise TierFull(f"{tier.name} tier: {free} bytes are free, {reserve} are kept free (disk_reserve_bytes)")

    async def sweep(self, held: Collection[ObjectKey]) -> tuple[int, list[str]]:
        """Unpin what no window holds: what a gateway left that died in mid-freeze. Call it under the exclusive lock."""
        swept = 0
        warnings: list[str] = []
        for tier in self.tiers:
            try:
                swept += await tier.sweep(held)
            except TierUnavailable as error:
                warnings.append(str(error))
        return swept, warnings
