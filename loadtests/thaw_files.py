"""The files of a window: how fast they can be read at all, and how fast LMCache reads them."""

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
_PREFETCH_TIMEOUT_S = 120.0
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class WindowFiles:
    """The files of a window on disk, and the parameters with which LMCache loads them."""

    model: str
    salt: str
    ids: Sequence[int]
    blocks: Sequence[dict[str, Any]]
    paths: Sequence[Path]

    @property
    def size(self) -> int:
        """The total size in bytes."""
        return sum(block["size_bytes"] for block in self.blocks)


class Cache:
    """A client of LMCache's HTTP API, used directly because the gateway polls a prefetch only every 20 ms."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=_PREFETCH_TIMEOUT_S)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def forget(self, window: WindowFiles) -> None:
        """Drop the window's objects from LMCache's memory."""
        keys = [
            {
                "chunk_hash_hex": block["hash"], "model_name": window.model, "kv_rank": block["rank"],
                "object_group_id": 0, "cache_salt": window.salt,
            }
            for block in window.blocks
        ]  # fmt: skip
        answer = self._http.request("DELETE", "/cache/objects", json={"keys": keys, "tier": "l1", "adapter": None})
        answer.raise_for_status()

    def prefetch_ms(self, window: WindowFiles) -> float:
        """Load the window from the disk tier into LMCache's memory."""
        body = {"model_name": window.model, "world_size": 1, "token_ids": list(window.ids), "cache_salt": window.salt}
        began = time.perf_counter()
        job = self._http.post("/cache/prefetches", json=body).raise_for_status().json()
        while (status := self._status(job["request_id"]))["status"] != "completed":
            if time.perf_counter() - began > _PREFETCH_TIMEOUT_S:
                raise RuntimeError(f"a prefetch was not finished after {_PREFETCH_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        took = (time.perf_counter() - began) * 1000
        if status["found_keys"] != len(window.blocks):
            raise RuntimeError(f"a prefetch found {status['found_keys']} of {len(window.blocks)} objects")
        return took

    def _status(self, request_id: str) -> dict[str, Any]:
        return dict(self._http.get(f"/cache/prefetches/{request_id}").raise_for_status().json())


def find(kv_dir: Path, model: str, salt: str, ids: Sequence[int], blocks: Sequence[dict[str, Any]]) -> WindowFiles:
    """Return the files of a window's objects, in order."""
    by_hash = {path.name.split("@")[3]: path for path in kv_dir.glob(f"*@{salt}.data")}
    return WindowFiles(model, salt, ids, blocks, [by_hash[block["hash"]] for block in blocks])


def measure(cache: Cache, window: WindowFiles, size: int, repeats: int) -> Files:
    """Read the files, and have LMCache read them: from the page cache and, where possible, from the disk."""
    buffer = memoryview(bytearray(window.size))
    read_ms(
        window.paths, buffer
    )  # touches the buffer, as LMCache's memory was touched before, and warms the page cache
    plain, prefetch = [], []
    for _ in range(repeats):
        plain.append(read_ms(window.paths, buffer))
        cache.forget(window)
        prefetch.append(cache.prefetch_ms(window))
    cache.forget(window)
    return Files(
        size=size,
        bytes=window.size,
        files=len(window.paths),
        plain_ms=plain,
        prefetch_ms=prefetch,
        plain_uncached_ms=read_ms(window.paths, buffer) if evict(window.paths) else None,
        prefetch_uncached_ms=cache.prefetch_ms(window) if evict(window.paths) else None,
    )


def read_ms(paths: Sequence[Path], buffer: memoryview) -> float:
    """Read files one after the other into a buffer; this plain copy is the baseline for LMCache."""
    began, at = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer[at:]):
                at += count
    return (time.perf_counter() - began) * 1000


def evict(paths: Sequence[Path]) -> bool:
    """Evict these files, and no others, from the page cache; return whether that worked.

    /proc/sys/vm/drop_caches would need root and would evict all files.
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be evicted
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
        return True  # the file system does not support the check
    finally:
        os.close(fd)


def usage(*directories: Path) -> tuple[int, int]:
    """Return the number of files in these directories and their size in bytes, counting hard links once."""
    stats = [entry.stat() for directory in directories if directory.is_dir() for entry in directory.rglob("*")
             if entry.is_file()]  # fmt: skip
    return len(stats), sum({stat.st_ino: stat.st_size for stat in stats}.values())


def rate(size: int, took_ms: Sequence[float]) -> float:
    """Return the median rate in bytes per second."""
    return size / (statistics.median(took_ms) / 1000)
