"""The LMCache server over its HTTP interface (lmcache 0.5.6, `v1/multiprocess/http_apis`)."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary
from zlib import crc32

import httpx

from gateway.errors import GatewayError
from gateway.kv import message_port
from gateway.kv.file_lock import FileLock
from gateway.kv.keys import ObjectKey
from gateway.kv.memory import MemoryRecord, MemoryUse, Moves
from gateway.runtime.progress import Progress
from gateway.validation.shown import shown

ENCRYPTING_SERDE = "SerdeConfig(type='aesgcm'"
"""How the configuration of an adapter that encrypts by salt begins in `/config`: LMCache prints its dataclass."""

Alone = Callable[[str, float], AbstractAsyncContextManager[None]]
"""Holds something by its name for at most so many seconds, which no other process can then."""

_CONFIG_AGE_S = 5.0  # LMCache's configuration changes by a restart only, which takes longer
_KEYS_PER_DELETE = 10_000  # LMCache refuses more in one request
_POLL_S = 0.02
_LOCKS = 64  # files; salts that share one wait for each other needlessly
_METRICS_S = 2.0  # the metrics only make an answer more complete
_METRICS_BYTES = 4 * 1024 * 1024  # they grow with every salt
_FRESH_S = 10.0  # loaded objects are not evicted sooner, unless the memory is too small for them


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """The cache's configuration, as it reports it."""

    chunk_size: int
    hash_algorithm: str
    world_sizes: dict[str, int]  # of each model that an engine has registered
    adapters: tuple[str, ...]  # the type of each L2 adapter, in the order in which they are read
    memory: MemoryUse | None = None
    disabled: tuple[str, ...] = ()  # those of `adapters` that store and load nothing
    token_bytes: frozenset[int] = frozenset()  # what a token takes in the engines' own layouts, of one worker

    @classmethod
    def read(cls, status: Mapping[str, Any], adapters: Mapping[str, Any]) -> "CacheInfo":
        """Read the answers of `/status` and `/config/adapters`. Raises KeyError, TypeError and their like."""
        types = tuple(str(adapter["type_name"]) for adapter in adapters["adapters"])
        states = (status.get("storage_manager") or {}).get("l2_adapters") or []
        registered = {**status.get("non_cuda_context_meta", {}), **status.get("cache_context_meta", {})}
        return cls(
            chunk_size=int(status["chunk_size"]),
            hash_algorithm=str(status["hash_algorithm"]),
            world_sizes={m["model_name"]: int(m["world_size"]) for m in registered.values()},
            adapters=types,
            memory=MemoryUse.read(status),
            disabled=tuple(name for name, state in zip(types, states, strict=False) if not _works(state)),
            token_bytes=frozenset(
                int(m["kv_cache_layout"]["cache_size_per_token"]) for m in registered.values() if "kv_cache_layout" in m
            ),
        )


class _Load(NamedTuple):
    """A finished load: the name and number of its token ids, objects found and asked for, and when."""

    what: tuple[str, int]
    found: tuple[int, int]
    at: float


class LMCache:
    """A client of one LMCache server. Every method raises `cache_unavailable` when it cannot be reached.

    Lock files in the folder `locks` make the processes of this machine wait for each other's loads; `alone` takes their
    place where those of other machines have to wait as well.
    """

    def __init__(
        self, url: str, timeout_s: float, locks: Path, chunk_size: int = 0, alone: Alone | None = None
    ) -> None:
        self.url = url
        self._locks = locks
        self._alone = alone
        self._chunk_size = chunk_size
        self._reported_chunk_size = 0
        self._encrypts = False
        self._encrypts_at = -math.inf
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by salt, while in use
        self._last: dict[str, _Load] = {}  # by salt, only recent ones
        self._memory = MemoryRecord()
        self._is_http = False  # whether the server was seen to be no message port
        self._connect_timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=url, timeout=httpx.Timeout(30.0, connect=timeout_s), limits=httpx.Limits(keepalive_expiry=4.0)
        )

    async def __aenter__(self) -> "LMCache":
        self._locks.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk: as configured, else as last reported; 0 before that."""
        return self._chunk_size or self._reported_chunk_size

    async def info(self) -> CacheInfo:
        """Ask for chunk size, hash algorithm, registered models and storage adapters."""
        status = await self._call("GET", "/status")
        # Their configuration does not tell their types (`http_apis/config_api.py`).
        adapters = await self._call("GET", "/config/adapters")
        with self._as_expected("/status and /config/adapters"):
            info = CacheInfo.read(status, adapters)
        self._reported_chunk_size = info.chunk_size
        return info

    async def encrypts_by_salt(self) -> bool:
        """Whether a storage adapter encrypts each object with a key made from its salt; known for 5 s."""
        if time.monotonic() - self._encrypts_at >= _CONFIG_AGE_S:
            config = await self._call("GET", "/config")
            with self._as_expected("/config"):
                storage: Any = next((c["l2_adapter_config"] for c in config.values() if "l2_adapter_config" in c), {})
                serdes = [str(adapter.get("serde_config")) for adapter in storage.get("adapters", ())]
            self._encrypts = any(serde.startswith(ENCRYPTING_SERDE) for serde in serdes)
            self._encrypts_at = time.monotonic()
        return self._encrypts

    async def trouble(self) -> str:
        """What is wrong with the server, as far as it tells; empty if nothing. Raises nothing."""
        try:
            if (await self._call("GET", "/healthcheck")).get("status") != "healthy":
                return "LMCache reports itself unhealthy"
            return "" if await self.reads_messages() else message_port.ENDED
        except GatewayError as error:
            return error.message

    async def reads_messages(self) -> bool:
        """Whether it still reads what engines send to its message port; true if it does not tell."""
        config = await self._call("GET", "/config")
        try:
            threads = await self._request("GET", f"/threads?name={message_port.THREAD}")
        except GatewayError:  # another version may have no such path
            return True
        return message_port.is_read(config, threads.text)

    async def delete(self, keys: Sequence[ObjectKey], *, tier: str, adapter: str | None = None) -> tuple[int, int]:
        """Delete `keys` from `tier`: `l1`, `l2` or `all`; of the L2 adapters only from `adapter`.

        Returns how many were deleted, and how many were skipped because they are being read; `l2` does not count.
        """
        deleted = skipped = 0
        for salt in {key.salt for key in keys}:
            self._last.pop(salt, None)
        for start in range(0, len(keys), _KEYS_PER_DELETE):
            batch = [key.wire() for key in keys[start : start + _KEYS_PER_DELETE]]
            body = {"keys": batch, "tier": tier, "adapter": adapter}
            answer = await self._call("DELETE", "/cache/objects", json=body)
            if not answer.get("ok", True):
                raise GatewayError("cache_unavailable", f"LMCache failed to delete in {adapter}: {answer.get('error')}")
            deleted += int(answer.get("deleted", 0))
            skipped += int(answer.get("skipped", 0))
        return deleted, skipped

    async def prefetch(
        self, model: str, world_size: int, name: str, token_ids: Sequence[int], salt: str, timeout_s: float,
        progress: Progress,
    ) -> tuple[int, int]:  # fmt: skip
        """Load the chunks of `token_ids` from L2 into L1; return (objects found, objects asked for).

        LMCache (0.5.6) can report a miss while another request is loading the same objects. So the loads of a salt run
        one after the other, and a call that waited for a load of the same token ids (identified by `name`) returns the
        result of that load.

        Raises `cache_unavailable` if no engine has registered the model there yet, or if it takes longer than
        `timeout_s`, including the wait for other loads.
        """
        began, what = time.monotonic(), (name, len(token_ids))
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._turns.setdefault(salt, asyncio.Lock()),
                self._only_load(salt, timeout_s),
            ):
                last = self._last.get(salt)
                if last is None or last.what != what or last.at < began:
                    found = await self._prefetch(model, world_size, token_ids, salt, progress)
                    last = _Load(what, found, time.monotonic())
                    self._last = {s: one for s, one in self._last.items() if _is_fresh(one)} | {salt: last}
                return last.found
        except TimeoutError as error:
            raise GatewayError(
                "cache_unavailable", f"prefetch of {len(token_ids)} tokens took over {timeout_s:g} s"
            ) from error

    def _only_load(self, salt: str, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """Keep other processes from loading what has this salt."""
        if self._alone is not None:
            return self._alone(f"load:{self.url}:{salt}", timeout_s)
        return FileLock(self._locks / f"{crc32(salt.encode()) % _LOCKS:02d}.lock").acquire(exclusive=True)

    def has_loaded_lately(self, name: str, tokens: int, salt: str) -> bool:
        """Whether the first `tokens` of the token ids called `name` were all loaded lately, and not evicted by us."""
        last = self._last.get(salt)
        if last is None or last.what != (name, tokens):
            return False
        found, wanted = last.found
        return found == wanted and _is_fresh(last)

    async def moves(self, salt: str) -> Moves | None:
        """Ask how many objects of a salt have come into L1 and left it; None if it does not say in 2 s and 4 MiB."""
        try:
            async with asyncio.timeout(_METRICS_S):
                metrics = await self._metrics()
                return await asyncio.to_thread(Moves.read, metrics, salt)  # megabytes take some 10 ms
        except (httpx.HTTPError, GatewayError, TimeoutError):
            return None

    async def _metrics(self) -> bytes:
        """LMCache's metrics; empty if they are too long."""
        await self._refuse_message_port()
        text = bytearray()
        async with self._http.stream("GET", "/metrics", headers={"accept-encoding": "identity"}) as response:
            async for part in response.raise_for_status().aiter_raw():
                text += part
                if len(text) > _METRICS_BYTES:
                    return b""
        return bytes(text)

    def remember(self, manifest: str, salt: str, before: Moves | None, *, is_there: bool) -> None:
        """See `MemoryRecord.remember`."""
        self._memory.remember(manifest, salt, before, is_there=is_there)

    async def is_in_memory(self, manifest: str, salt: str) -> bool | None:
        """Whether all of a window's objects are in L1, or none is; None if it is not known. Raises nothing."""
        if not self._memory.knows(manifest, salt):
            return None
        return self._memory.is_there(manifest, salt, await self.moves(salt))

    async def _prefetch(
        self, model: str, world_size: int, token_ids: Sequence[int], salt: str, progress: Progress
    ) -> tuple[int, int]:
        body = {"model_name": model, "world_size": world_size, "token_ids": list(token_ids), "cache_salt": salt}
        job = await self._call("POST", "/cache/prefetches", json=body)
        with self._as_expected("/cache/prefetches"):
            if job["status"] == "noop":
                return 0, 0
            chunks, path = int(job["chunks"]), f"/cache/prefetches/{job['request_id']}"
            while (answer := await self._call("GET", path))["status"] != "completed":
                progress("prefetch", 0, chunks)
                await asyncio.sleep(_POLL_S)
            progress("prefetch", chunks, chunks)
            return int(answer["found_keys"]), int(answer["total_keys"])

    async def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = await self._request(method, path, **arguments)
        with self._as_expected(path):
            return dict(response.json())

    @contextmanager
    def _as_expected(self, path: str) -> Iterator[None]:
        """The block reads an answer, and raises `cache_unavailable` if that is none of LMCache's."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GatewayError(
                "cache_unavailable",
                f"what answers at {self._http.base_url} is not LMCache, or another version: {path} has "
                f"{type(error).__name__} {shown(str(error), 100)}",
                hint="is cache_url the HTTP address (--http-port) of an LMCache 0.5.6?",
            ) from error

    def _no_answer(self, error: Exception) -> GatewayError:
        return GatewayError(
            "cache_unavailable",
            f"LMCache at {self._http.base_url} does not answer: {str(error) or type(error).__name__}",
            hint="is the LMCache server running, and is cache_url its HTTP address (--http-port)?",
        )

    async def _refuse_message_port(self) -> None:
        """Raise `cache_unavailable` if `cache_url` is LMCache's message port, before any HTTP is sent there."""
        if self._is_http:
            return
        url = str(self._http.base_url)
        try:
            speaks_zmq = await message_port.speaks_zmq(url, self._connect_timeout_s)
        except OSError as error:
            raise self._no_answer(error) from error
        if speaks_zmq:
            raise GatewayError(
                "cache_unavailable",
                f"at {url} LMCache reads messages of engines (--port), which HTTP would end for good: nothing was sent",
                hint="set cache_url to its HTTP address (--http-port)",
            )
        self._is_http = True

    async def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        await self._refuse_message_port()
        try:
            response = await self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            self._is_http = False  # it may come back with other ports
            self._last.clear()  # and with nothing in its memory
            raise self._no_answer(error) from error
        if response.status_code >= 400:
            raise GatewayError(
                "cache_unavailable", f"LMCache answered {response.status_code} to {path}: {response.text:.300}"
            )
        return response


def _works(adapter: Mapping[str, Any]) -> bool:
    """Whether an adapter works, as `report_status` of LMCache's `l2_adapters` has it."""
    return bool(adapter.get("is_healthy", True)) and not adapter.get("connection_disabled", False)


def _is_fresh(load: _Load) -> bool:
    return time.monotonic() - load.at < _FRESH_S
