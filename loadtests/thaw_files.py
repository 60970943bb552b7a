"""A window's files: how fast they can be read at all, and how fast LMCache reads them."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.thaw_samples import Files

_POLL_S = 0.001
_PREFETCH_WITHIN = 120.0
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Kept:
    """What a window consists of on the disk, and what LMCache has to be told to load it."""

    model: str
    salt: str
    ids: Sequence[int]
    blocks: Sequence[dict[str, Any]]
    paths: Sequence[Path]

    @property
    def size(self) -> int:
        """All bytes."""
        return sum(block["size_bytes"] for block in self.blocks)


class Cache:
    """LMCache's HTTP side, used directly: the gateway asks it only every 20 ms whether a prefetch is done."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=_PREFETCH_WITHIN)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def forget(self, kept: Kept) -> None:
        """Drop the window's objects from LMCache's memory."""
        keys = [
            {
                "chunk_hash_hex": block["hash"], "model_name": kept.model, "kv_rank": block["rank"],
                "object_group_id": 0, "cache_salt": kept.salt,
            }
            for block in kept.blocks
        ]  # fmt: skip
        answer = self._http.request("DELETE", "/cache/objects", json={"keys": keys, "tier": "l1", "adapter": None})
        answer.raise_for_status()

    def prefetch_ms(self, kept: Kept) -> float:
        """Load the window from the disk tier into LMCache's memory."""
        body = {"model_name": kept.model, "world_size": 1, "token_ids": list(kept.ids), "cache_salt": kept.salt}
        began = time.perf_counter()
        job = self._http.post("/cache/prefetches", json=body).raise_for_status().json()
        while (status := self._status(job["request_id"]))["status"] != "completed":
            if time.perf_counter() - began > _PREFETCH_WITHIN:
                raise RuntimeError(f"a prefetch was not over after {_PREFETCH_WITHIN:g} s")
            time.sleep(_POLL_S)
        took = (time.perf_counter() - began) * 1000
        if status["found_keys"] != len(kept.blocks):
            raise RuntimeError(f"a prefetch found {status['found_keys']} of {len(kept.blocks)} objects")
        return took

    def _status(self, request_id: str) -> dict[str, Any]:
        return dict(self._http.get(f"/cache/prefetches/{request_id}").raise_for_status().json())


def find(kv_dir: Path, model: str, salt: str, ids: Sequence[int], blocks: Sequence[dict[str, Any]]) -> Kept:
    """The files of a window's objects, in order."""
    by_hash = {path.name.split("@")[3]: path for path in kv_dir.glob(f"*@{salt}.data")}
    return Kept(model, salt, ids, blocks, [by_hash[block["hash"]] for block in blocks])


def measure(cache: Cache, kept: Kept, size: int, repeats: int) -> Files:
    """Read the files and have LMCache read them, from the page cache and, where that works, from the disk."""
    buffer = memoryview(bytearray(kept.size))
    read_ms(kept.paths, buffer)  # LMCache's memory has been touched before; so has this now, and the page cache is warm
    plain, prefetch = [], []
    for _ in range(repeats):
        plain.append(read_ms(kept.paths, buffer))
        cache.forget(kept)
        prefetch.append(cache.prefetch_ms(kept))
    cache.forget(kept)
    return Files(
        size=size,
        bytes=kept.size,
        files=len(kept.paths),
        plain_ms=plain,
        prefetch_ms=prefetch,
        plain_uncached_ms=read_ms(kept.paths, buffer) if evict(kept.paths) else None,
        prefetch_uncached_ms=cache.prefetch_ms(kept) if evict(kept.paths) else None,
    )


def read_ms(paths: Sequence[Path], buffer: memoryview) -> float:
    """Read files one after the other into a buffer: the plain copy that LMCache is compared with."""
    began, at = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer[at:]):
                at += count
    return (time.perf_counter() - began) * 1000


def evict(paths: Sequence[Path]) -> bool:
    """Take these files, and no others, out of the page cache; return whether they are out.

    Not by /proc/sys/vm/drop_caches, which needs root and takes everybody's files.
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what has not been written yet is kept
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return not any(_is_cached(path) for path in paths)


def _is_cached(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(_PROBE_BYTES)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system that cannot tell
    finally:
        os.close(fd)


def usage(*directories: Path) -> tuple[int, int]:
    """How many files lie in these directories, and how many bytes they take, hard links counted once."""
    stats = [entry.stat() for directory in directories if directory.is_dir() for entry in directory.rglob("*")
             if entry.is_file()]  # fmt: skip
    return len(stats), sum({stat.st_ino: stat.st_size for stat in stats}.values())


def rate(size: int, took_ms: Sequence[float]) -> float:
    """Bytes a second, by the median."""
    return size / (statistics.median(took_ms) / 1000)
