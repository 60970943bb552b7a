"""A gateway's services on both tiers, with a fake engine, as much of LMCache as an operation needs, and a window."""

import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

from gateway.app import open_services
from gateway.kv.keys import object_keys
from gateway.records import Manifest, PinnedObject, Window
from gateway.settings import Settings
from gateway.store.types import Text
from gateway.windows.context import OperationContext, Services
from tests.support.fakes.engine import MODEL, FakeEngine, render
from tests.support.postgres import store_settings
from tests.support.tier_harness import RedisServer, RedisTierHarness

CHUNK = 16
MESSAGES = [{"role": "user", "content": "hello there, how are you? " * 3}, {"role": "assistant", "content": "Fine."}]
IDS = tuple(render(MESSAGES, generation_prompt=False))
CHUNKS = len(IDS) // CHUNK
BOTH_WORK = MappingProxyType({"fs": True, "resp": True})
FRAME = {"chat_template_kwargs": {"x": 1}}


class _Cache(BaseHTTPRequestHandler):
    """As much of LMCache as the operations need: its status, and dropping objects, which it always reports as done."""

    server: "_CacheServer"

    def do_GET(self) -> None:
        status = {"chunk_size": CHUNK, "hash_algorithm": "blake3", "storage_manager": self.server.storage}
        self._say(status if self.path == "/status" else self.server.config)

    def do_DELETE(self) -> None:
        keys = json.loads(self.rfile.read(int(self.headers["content-length"])))["keys"]
        self._say({"deleted": len(keys), "skipped": 0, "ok": True})

    def _say(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class _CacheServer(ThreadingHTTPServer):
    config: dict[str, object]
    storage: dict[str, object]


@contextmanager
def cache_server(serde: str | None = None, adapters: Mapping[str, bool] = BOTH_WORK) -> Iterator[str]:
    """The URL of an LMCache that writes objects through `serde`, with adapters that work or have switched off."""
    server = _CacheServer(("127.0.0.1", 0), _Cache)
    adapter = {"base_path": "/kv", "serde_config": serde and f"SerdeConfig(type='{serde}', kwargs={{}})"}
    server.config = {
        "storage_manager": {"l2_adapter_config": {"adapters": [adapter]}},
        "adapters": [{"index": index, "type_name": name} for index, name in enumerate(adapters)],
    }
    states = [{"is_healthy": works, "connection_disabled": not works} for works in adapters.values()]
    server.storage = {"l2_adapters": states}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class GatewayHarness:
    """A gateway's services, and where its tiers keep things."""

    services: Services
    kv: Path
    redis: RedisTierHarness
    settings: Settings

    @property
    def ctx(self) -> OperationContext:
        """The context of an operation that begins now."""
        return OperationContext(self.services, "default")

    def everything(self) -> tuple[set[str], set[str], set[str]]:
        """Files on disk, keys in Redis and files of the gateway's own."""
        files = {str(f) for f in self.kv.parent.rglob("*") if f.is_file() and "data" not in f.parts[-2:]}
        own = {f.name for f in self.services.settings.data_path.iterdir()} - {"gateway.db-wal", "gateway.db-shm"}
        keys = self.redis.client.keys("*")
        assert isinstance(keys, list)
        return files, {key.decode() for key in keys}, own


@asynccontextmanager
async def open_harness(
    engine: FakeEngine, cache: str, redis_server: RedisServer, tmp_path: Path
) -> AsyncIterator[GatewayHarness]:
    """A harness in an empty folder."""
    kv = tmp_path / "kv"
    kv.mkdir()
    redis = RedisTierHarness(redis_server.port)
    settings = Settings(
        engine_urls=(engine.url,),
        cache_url=cache,
        kv_dir=str(kv),
        kv_redis_url=f"redis://127.0.0.1:{redis_server.port}",
        data_dir=str(tmp_path / "own"),
        **store_settings(tmp_path / "own"),
    )
    (tmp_path / "own").mkdir()
    async with open_services(settings) as parts:
        yield GatewayHarness(parts, kv, redis, settings)
    redis.client.close()


def value(index: int, size: int = 3000) -> bytes:
    """The bytes of one object."""
    return hashlib.shake_256(str(index).encode()).digest(size + index)


async def window(services: Services, name: str = "w", size: int = 3000) -> Window:
    """A window with KV in every tier, its objects of about so many bytes."""
    model = await services.engines.model(MODEL)
    salt = services.salts.of("default", "l", model.fingerprint)
    keys = object_keys(model.root, IDS, CHUNK, 1, salt)
    objects: list[PinnedObject] = []
    for index, key in enumerate(keys):
        objects += [await tier.put(key, value(index, size)) for tier in services.pins.tiers]
    new = Window(
        tenant="default", name=name, session_id="s", lineage="l", salt=salt, pin_salt=salt, model=MODEL,
        model_root=model.root, fingerprint=model.fingerprint,
        world_size=1, token_count=len(IDS), chunk_size=CHUNK, chunk_count=CHUNKS,
        size_bytes=1, kv="complete", transcript=b"", frame=None, manifest=f"m-{name}", created_at=1.0,
        description="d", tags=("a",), receipt={"tokens": len(IDS)},
    )  # fmt: skip
    made = await services.store.add_window(new, Manifest(new.manifest, IDS, tuple(objects)), Text(MESSAGES, FRAME))
    assert made is not None
    return made
