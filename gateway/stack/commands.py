"""The command lines of LMCache and vLLM, as pure functions: what to run and with which environment."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from gateway.stack.errors import StackError

LOOPBACK = "127.0.0.1"
"""Neither LMCache's ports nor vLLM's /tokenize and /metrics ask for a key, so no other machine may reach them."""

CPU_BLOCK_SIZE = 32
"""vLLM's CPU attention takes multiples of 32 only."""
GPU_BLOCK_SIZE = 16

Transfer = Literal["lmcache_driven", "engine_driven", "shm"]
"""How KV goes between a CPU engine and the cache: the server reads and writes the engine's own memory; pickled through
a socket, which is LMCache's default; or through the server's memory, shared under a name (`Cache.shm_name`)."""

# Nothing of the user's prompts, and not even the fact that they use this, is reported anywhere.
QUIET: Mapping[str, str] = MappingProxyType(
    {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The model is on this disk before the engine starts; a look-up could only delay or fail.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
)


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute, and which variables to add to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Cache:
    """How to run the LMCache server."""

    port: int
    http_port: int
    kv_dir: Path
    chunk_size: int
    memory_gb: float
    instance_id: str
    redis_url: str | None = None
    shm_name: str | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How the model's reasoning is told from its answer: vLLM's parser, and what stands before and after."""

    parser: str
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class Engine:
    """How to run vLLM. `model` is part of every key of the cache, so it has to stay the same for a data directory."""

    port: int
    cache_port: int
    model: str
    served_model_name: str
    on_cpu: bool
    kv_gb: int
    max_model_len: int | None = None
    tool_parser: str | None = None
    reasoning: Reasoning | None = None
    transfer: Transfer = "lmcache_driven"
    dtype: str | None = None
    one_process: bool = False
    """Scheduler and worker in one, on a CPU: no thread is bound to a core, and nobody spins while the other works."""


def cache_command(python: str, cache: Cache) -> Command:
    """The LMCache server with a disk tier, and a Redis tier where a URL is given."""
    redis = redis_tier(cache.redis_url) if cache.redis_url else None
    adapters: list[dict[str, Any]] = [{"type": "fs", "base_path": str(cache.kv_dir)}]
    if redis:
        adapters.append({"type": "resp", "host": redis.host, "port": redis.port, "num_workers": 2})
    argv = [python, "-m", "lmcache.cli.main", "server", "--host", LOOPBACK, "--port", str(cache.port)]
    argv += ["--http-host", LOOPBACK, "--http-port", str(cache.http_port)]
    argv += ["--chunk-size", str(cache.chunk_size), "--instance-id", cache.instance_id]
    argv += ["--l1-size-gb", f"{cache.memory_gb:g}", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    for adapter in adapters:
        argv += ["--l2-adapter", json.dumps(adapter)]
    if cache.shm_name:
        argv += ["--shm-name", cache.shm_name]
    # The password goes by the environment, because every user of the machine may read a command line.
    return Command(tuple(argv), {**QUIET, **(redis.env if redis else {})})


def engine_command(python: str, engine: Engine) -> Command:
    """vLLM's OpenAI server, connected to the LMCache server on `cache_port`."""
    # Not `vllm serve`: the console script of the CPU build looks for a distribution named `vllm` and dies.
    argv = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", engine.model]
    argv += ["--served-model-name", engine.served_model_name, "--host", LOOPBACK, "--port", str(engine.port)]
    argv += ["--max-model-len", str(engine.max_model_len or "auto")]
    argv += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--enable-scale-out"]
    argv += ["--kv-transfer-config", json.dumps(_connector(engine))]
    if engine.dtype:
        argv += ["--dtype", engine.dtype]
    if engine.tool_parser:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", engine.tool_parser]
    if engine.reasoning:
        argv += ["--reasoning-parser", engine.reasoning.parser]
        # A parser that only some requests think with does not tell vLLM these, and a thinking budget needs them.
        marks = {"reasoning_start_str": engine.reasoning.start, "reasoning_end_str": engine.reasoning.end}
        argv += ["--reasoning-config", json.dumps(marks)]
    if not engine.on_cpu:
        return Command(tuple(argv), QUIET)
    # Compiling needs g++ and costs 20 s to minutes at every start. It makes prefill no faster, only decoding of very
    # small models (the demo: 80 to 155 tokens/s). Both the flag and the variable: with the flag alone, sampling still
    # compiles a little, on the first request that wants logprobs.
    argv += ["--block-size", str(CPU_BLOCK_SIZE), "--enforce-eager"]
    # Threads that wait for each other at every step would spin, and take the cores from everything else. Measured with
    # the demo beside other load, on 2 cores: 5.0 s for 200 tokens, not 7.6; on an idle machine the same.
    own = {"VLLM_CPU_KVCACHE_SPACE": str(engine.kv_gb), "TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}
    if engine.one_process:
        # Without the variable, the CPU platform of vLLM 0.32 overrules the flag and starts a worker process.
        argv += ["--distributed-executor-backend", "uni"]
        own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return Command(tuple(argv), {**QUIET, **own})


def _connector(engine: Engine) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "lmcache.mp.host": f"tcp://{LOOPBACK}",
        "lmcache.mp.port": engine.cache_port,
        # Replies are stored as well, so that freezing finds most of its chunks done.
        "lmcache.mp.save_decode_cache": True,
        # A cache that died is noticed within about two heartbeats; the defaults let requests hang for minutes.
        "lmcache.mp.heartbeat_interval": 3,
        "lmcache.mp.mq_timeout": 30,
    }
    if engine.on_cpu:
        # By default KV in POSIX shared memory: the server reads and writes it directly, ten times faster than pickled.
        driven = "lmcache_driven" if engine.transfer == "lmcache_driven" else "engine_driven"
        extra["lmcache.mp.mp_transfer_mode"] = driven
    return {
        # LMCache's own, with a mend: without it a client that leaves during a load ends the engine.
        "kv_connector": "AbortSafeLMCacheConnector",
        "kv_connector_module_path": "gateway.stack.connector",
        "kv_role": "kv_both",
        # The default is to fail the request when the cache dies between look-up and load.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


@dataclass(frozen=True, slots=True)
class RedisTier:
    """What LMCache can be told of a Redis."""

    host: str
    port: int
    env: Mapping[str, str]


def redis_tier(url: str) -> RedisTier:
    """Take a Redis URL apart; refuse what LMCache would silently ignore."""
    parts = urlsplit(url)
    if parts.scheme == "rediss":
        raise StackError("--redis-url: LMCache's Redis tier has no TLS; give redis:// and a network you trust")
    if parts.scheme != "redis" or not parts.hostname:
        raise StackError("--redis-url: expected redis://[user:password@]host[:port]")
    if parts.path.strip("/") not in {"", "0"} or parts.query:
        raise StackError("--redis-url: LMCache's Redis tier uses database 0 only; omit the number and the options")
    env = {"LMCACHE_RESP_USERNAME": parts.username, "LMCACHE_RESP_PASSWORD": parts.password}
    return RedisTier(parts.hostname, parts.port or 6379, {name: unquote(value) for name, value in env.items() if value})
