"""The processes of the stack: their command lines and environments."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2s
from types import MappingProxyType
from typing import Any

from gateway.stack import trial_tiers
from gateway.stack.demo_model import THINK, THOUGHT
from gateway.stack.local import LOOPBACK, Plan
from gateway.stack.process import Launch, ManagedProcess

CPU_BLOCK_SIZE = 32
"""vLLM's CPU attention takes multiples of 32 only."""
GPU_BLOCK_SIZE = 16

# No prompt, and not even the fact that this is used, is reported anywhere.
QUIET: Mapping[str, str] = MappingProxyType(
    {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The model is on disk before the engine starts; a look-up could only delay or fail.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes, in the order they start; `storage` is what holds tiers, if it is not the disk."""

    cache: ManagedProcess
    engine: ManagedProcess
    gateway: ManagedProcess
    storage: tuple[ManagedProcess, ...] = ()


def processes(plan: Plan) -> Processes:
    """The processes, not started yet."""
    return Processes(
        cache=ManagedProcess(cache_launch(plan)),
        engine=ManagedProcess(engine_launch(plan)),
        gateway=ManagedProcess(gateway_launch(plan)),
        storage=tuple(map(ManagedProcess, trial_tiers.launches(plan))),
    )


def cache_launch(plan: Plan) -> Launch:
    """The LMCache server with the stack's tiers."""
    # The same for every run on this directory, for coordinators and dashboards.
    instance = "local-" + blake2s(str(plan.data_dir).encode(), digest_size=6).hexdigest()
    argv = ["-m", "lmcache.cli.main", "server", "--host", LOOPBACK, "--port", str(plan.cache_port)]
    argv += ["--http-host", LOOPBACK, "--http-port", str(plan.cache_http_port)]
    argv += ["--chunk-size", str(plan.chunk_size), "--instance-id", instance]
    argv += ["--l1-size-gb", f"{plan.cache_gb:g}", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    for adapter in trial_tiers.adapters(plan):
        argv += ["--l2-adapter", json.dumps(adapter)]
    if plan.options.transfer == "shm":
        # No other stack on the machine has this port, so none has a segment of that name.
        argv += ["--shm-name", f"cwg-l1-{plan.cache_port}"]
    if plan.s3_port:
        argv += ["--l2-prefetch-policy", "retain"]  # else a later turn on the same engine reads it from S3 again
    # The password is in the environment, because every user of the machine may read a command line.
    secrets = trial_tiers.redis_address(plan.redis_url).env if plan.redis_url else {}
    return _launch(plan, "cache", argv, secrets, f"{plan.cache_url}/healthcheck")


def engine_launch(plan: Plan) -> Launch:
    """vLLM's OpenAI server, connected to the LMCache server."""
    model = plan.model
    # Not `vllm serve`: the console script of the CPU build looks for a distribution named `vllm` and dies.
    argv = ["-m", "vllm.entrypoints.openai.api_server", "--model", model.key]
    argv += ["--served-model-name", model.served_name, "--host", LOOPBACK, "--port", str(plan.engine_port)]
    argv += ["--max-model-len", str(plan.options.max_model_len or "auto")]
    argv += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--enable-scale-out"]
    argv += ["--kv-transfer-config", json.dumps(_connector(plan))]
    if model.dtype:
        argv += ["--dtype", model.dtype]
    if model.is_demo:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    if model.demo == "random":
        # It reasons only if a request asks for it (`reasoning_effort`, or `thinking` among the template's
        # arguments): then this parser looks for its reasoning, and it leaves all other replies alone.
        argv += ["--reasoning-parser", "deepseek_v3"]
        # vLLM needs these for a thinking budget, and does not get them from a parser for optional reasoning.
        argv += ["--reasoning-config", json.dumps({"reasoning_start_str": THINK, "reasoning_end_str": THOUGHT})]
    env: dict[str, str] = {}
    if plan.on_cpu or plan.options.engine_kv_gb:
        argv += ["--kv-cache-memory-bytes", str(int(plan.engine_kv_gb * 2**30))]
    if plan.on_cpu:
        # Compiling needs g++ and costs 20 s to minutes at every start. It makes prefill no faster, only decoding of
        # very small models (the demo: 80 to 155 tokens/s). Both the flag and the variable: with the flag alone,
        # sampling still compiles a little, on the first request that wants logprobs.
        argv += ["--block-size", str(CPU_BLOCK_SIZE), "--enforce-eager"]
        # Threads that wait for each other at every step would spin, and take the cores from everything else. Measured
        # with the demo under other load, on 2 cores: 5.0 s for 200 tokens, not 7.6; on an idle machine the same.
        env = {"TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}
    if plan.on_cpu and model.is_demo:
        # Scheduler and worker in one process: no thread is bound to a core, and none spins while the other works. The
        # demo starts in 37 s, not 48, and takes 3.6 s of processor time for 200 tokens, not 6.0 (2 cores). A larger
        # model on more cores needs bound threads. Without the variable, vLLM 0.32 overrules the flag.
        argv += ["--distributed-executor-backend", "uni"]
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Of an option that is given twice, vLLM takes the last.
    argv += plan.options.engine_args
    return _launch(plan, "engine", argv, env, f"{plan.engine_url}/health")


def _connector(plan: Plan) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "lmcache.mp.host": f"tcp://{LOOPBACK}",
        "lmcache.mp.port": plan.cache_port,
        # Replies are stored as well, so that freezing finds most of its chunks done.
        "lmcache.mp.save_decode_cache": True,
        # A cache that died is noticed within about two heartbeats; the defaults let requests hang for minutes.
        "lmcache.mp.heartbeat_interval": 3,
        "lmcache.mp.mq_timeout": 30,
    }
    if plan.on_cpu:
        # By default KV in POSIX shared memory: the server reads and writes it directly, ten times faster than pickled.
        driven = "lmcache_driven" if plan.options.transfer == "lmcache_driven" else "engine_driven"
        extra["lmcache.mp.mp_transfer_mode"] = driven
    return {
        # LMCache's own, patched: unpatched, a client that disconnects during a load crashes the engine.
        "kv_connector": "AbortSafeLMCacheConnector",
        "kv_connector_module_path": "gateway.stack.connector",
        "kv_role": "kv_both",
        # The default is to fail the request when the cache dies between look-up and load.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def _launch(plan: Plan, name: str, argv: list[str], env: Mapping[str, str], ready_url: str) -> Launch:
    return Launch(
        name=name,
        argv=(sys.executable, *argv),
        # torch would create a folder in /tmp, whether it compiles or not.
        env={**QUIET, **env, "TORCHINDUCTOR_CACHE_DIR": str(plan.data_dir / "torchinductor")},
        ready_url=ready_url,
        log=plan.data_dir / "logs" / f"{name}.log",
        ledger=plan.run_dir / f"{name}.json",
        without_env="CWG_",
        cwd=plan.data_dir,
        owns_shared_memory=name == "engine",
    )


def gateway_launch(plan: Plan) -> Launch:
    """The gateway, configured for this engine and cache."""
    settings = {
        "CWG_HOST": plan.options.host,
        "CWG_PORT": str(plan.options.port),
        "CWG_ENGINE_URLS": plan.engine_url,
        "CWG_CACHE_URL": plan.cache_url,
        "CWG_DATA_DIR": str(plan.data_dir),
        "CWG_MODEL_FINGERPRINT": plan.model.fingerprint,
    }
    if plan.disk_budget_bytes is not None:
        settings["CWG_DISK_BUDGET_BYTES"] = str(plan.disk_budget_bytes)
    settings |= trial_tiers.settings(plan)
    config = ("--config", str(plan.options.config)) if plan.options.config else ()
    return Launch(
        name="gateway",
        argv=(sys.executable, "-m", "gateway", "serve", *config),
        env={"PYTHONUNBUFFERED": "1", **settings},
        ready_url=f"{plan.url}/readyz",
        log=plan.data_dir / "logs" / "gateway.log",
        ledger=plan.run_dir / "gateway.json",
        # It may be freezing its active sessions, which takes longer the more there are.
        stop_within=120.0,
        # No `cwd`: relative paths in the user's own CWG_ variables mean the directory the user is in.
    )
