"""The servers under measurement: how each is started, and stopped with everything it has started."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from loadtests import machine
from loadtests.canned_upstream import MODELS

UPSTREAM = "upstream"
GATEWAY = "gateway"
_READY_S = 120.0
_STOP_S = 15.0
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Launch:
    """A server to start: its command line, the path of its readiness check, its environment variables, and where."""

    command: Sequence[str]
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = _ROOT


@dataclass(frozen=True, slots=True)
class Contender:
    """A running server under measurement."""

    name: str
    version: str
    port: int
    pid: int

    def url(self, path: str) -> str:
        """Return the URL of a path on this server."""
        return f"http://127.0.0.1:{self.port}{path}"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another proxy: its executable, how to install it, and how to start it in front of an upstream."""

    name: str
    executable: str
    distribution: str
    how_to_install: str
    launch: Callable[[Path, int, str, Path], Launch]


def _vllm_router(executable: Path, port: int, upstream: str, _: Path) -> Launch:
    command = [
        str(executable), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", upstream,
        "--policy", "consistent_hash", "--prometheus-port", str(free_port()), "--log-level", "warning",
    ]  # fmt: skip
    return Launch(command, "/health")


def _agentic_api(executable: Path, port: int, upstream: str, _: Path) -> Launch:
    command = [str(executable), "serve", "--vllm-base-url", upstream, "--host", "127.0.0.1", "--port", str(port)]
    return Launch(command, "/health")


def _litellm(executable: Path, port: int, upstream: str, work: Path) -> Launch:
    def entry(name: str) -> dict[str, object]:
        to = {"model": f"hosted_vllm/{name}", "api_base": f"{upstream}/v1", "api_key": "none"}
        return {"model_name": name, "litellm_params": to}

    config = work / "litellm.yaml"
    config.write_text(json.dumps({"model_list": [entry(name) for name in MODELS]}))  # JSON is YAML
    command = [str(executable), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    offline = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOG": "ERROR",
    }
    return Launch(command, "/health/liveliness", offline)


PEERS = (
    Peer("vllm-router", "vllm-router", "vllm-router", "pip install 'vllm-router>=0.1.17,<0.2'", _vllm_router),
    Peer("agentic-api", "agentic-api", "agentic-api", "pip install agentic-api", _agentic_api),
    Peer("litellm", "litellm", "litellm", "pip install 'litellm[proxy]', best in a separate environment", _litellm),
)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def clean_environment() -> dict[str, str]:
    """Return the environment of this process without the gateway's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CWG_")}


def find(peer: Peer, path: str | None) -> Path | None:
    """Return the executable of a peer: `path` if given, else from this Python's directory or PATH; None if missing."""
    here = str(Path(sys.executable).parent)
    file = shutil.which(path or peer.executable, path=None if path else f"{here}{os.pathsep}{os.environ['PATH']}")
    return Path(file).absolute() if file else None


class StartError(Exception):
    """A contender exited or did not get ready; the message contains the end of its log."""


@contextmanager
def upstream(work: Path, module: str = "loadtests.canned_upstream") -> Iterator[Contender]:
    """Run the canned engine, or the engine of another module."""
    port = free_port()
    launch = Launch([sys.executable, "-m", module, "--port", str(port)], "/health")
    with run(UPSTREAM, "", port, launch, work) as running:
        yield running


@contextmanager
def gateway(work: Path, engine: Contender) -> Iterator[Contender]:
    """Run this gateway as `cwg serve` does, with its default settings and a new data directory."""
    port = free_port()
    launch = Launch(
        [sys.executable, "-m", "gateway", "serve"],
        "/readyz",
        {"CWG_PORT": str(port), "CWG_ENGINE_URLS": engine.url(""), "CWG_DATA_DIR": str(work / "gateway-data")},
    )
    version = metadata_version("context-window-gateway") or _commit()
    with run(GATEWAY, version, port, launch, work) as running:
        yield running


@contextmanager
def peer(kind: Peer, executable: Path, work: Path, engine: Contender) -> Iterator[Contender]:
    """Run a peer in front of an engine."""
    port = free_port()
    launch = kind.launch(executable, port, engine.url(""), work)
    with run(kind.name, _version_of(executable, kind.distribution), port, launch, work) as running:
        yield running


@contextmanager
def run(name: str, version: str, port: int, launch: Launch, work: Path) -> Iterator[Contender]:
    """Run a server until the end of the block, with its log in `work`/`name`.log. Raises StartError."""
    home = work / f"{name}-home"  # peers keep databases and caches in the home directory
    home.mkdir()
    inherited = {k: v for k, v in clean_environment().items() if not k.lower().endswith("_proxy")}
    environment = {**inherited, "HOME": str(home), "NO_PROXY": "127.0.0.1", **launch.environment}
    log = work / f"{name}.log"
    with log.open("wb") as out, ExitStack() as stack:
        process = subprocess.Popen(
            launch.command, cwd=launch.directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        stack.callback(_stop, process)
        _wait_ready(name, process, port, launch.ready, log)
        yield Contender(name, version, port, process.pid)


def _wait_ready(name: str, process: "subprocess.Popen[bytes]", port: int, path: str, log: Path) -> None:
    end = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < end:
        if _answers(port, path):
            return
        time.sleep(0.1)
    reason = f"exited with {process.returncode}" if process.returncode is not None else f"not ready in {_READY_S:g} s"
    raise StartError(f"{name}: {reason}\n{log.read_text(errors='replace')[-2000:]}")


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server and its descendants: some servers are launchers."""
    processes = machine.tree(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    for survivor in machine.still_running(processes):
        with suppress(ProcessLookupError):
            os.kill(survivor.pid, signal.SIGKILL)
    process.wait()


def metadata_version(distribution: str) -> str:
    """Return the installed version of a distribution, or ""."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _version_of(executable: Path, distribution: str) -> str:
    """Return the version in the environment of an executable: peers may be installed in separate environments."""
    python = executable.parent / "python"
    if not python.exists():
        return ""
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    process = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return process.stdout.strip()


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
