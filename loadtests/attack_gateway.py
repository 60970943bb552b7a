"""A gateway under attack: its process, requests to it, and measurements of its pauses and its memory."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests import contenders
from tests.support.fakes.engine import MODEL

_ROOT = Path(__file__).parent.parent
_ADDRESS_SPACE = 7 * 2**30  # keeps one trial from taking the whole machine
_READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete response; status 0: the connection was closed or reset, or the request timed out."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """The body as JSON; an empty object if it is not JSON."""
        with suppress(ValueError):
            return json.loads(self.body)
        return {}


class Gateway:
    """One `cwg serve` process, started by a trial."""

    def __init__(
        self, folder: Path, source: Path, engine_url: str, limits: Mapping[str, str], **settings: object
    ) -> None:
        self.port = contenders.free_port()
        self.data = folder / "data"
        self.key = str(settings.get("api_key", ""))
        self._log = folder / "gateway.log"
        self._source = source
        self._limits = [f"--{kind}={value}" for kind, value in {"as": str(_ADDRESS_SPACE), **limits}.items()]
        defaults = {"port": self.port, "engine_urls": engine_url, "data_dir": self.data, "auto_freeze": False}
        variables = {f"CWG_{name.upper()}": str(value) for name, value in {**defaults, **settings}.items()}
        self.environment = {**contenders.clean_environment(), **variables, "PYTHONPATH": str(source)}
        self.process: subprocess.Popen[bytes]
        self._monitor: subprocess.Popen[str] | None = None

    def start(self, ready: str = "/readyz", within: float = _READY_S) -> "Gateway":
        """Start it and wait until it is ready. Raises RuntimeError with the end of its log if it does not get ready."""
        self.spawn()
        end = time.monotonic() + within
        while self.get(ready, timeout=2).status != 200:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the gateway did not get ready: {self.log[-1500:]}")
            time.sleep(0.05)
        return self

    def spawn(self) -> None:
        """Start it without waiting until it is ready."""
        command = ["prlimit", *self._limits, sys.executable, "-m", "gateway", "serve"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, cwd=self._source, stdout=log, stderr=log)

    def kill(self) -> None:
        """Send SIGKILL to the parent and all workers."""
        for pid in [*self.workers(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM, within: float = 30) -> int | None:
        """Send a signal; return the exit code, or None if it still runs after `within` seconds."""
        self.process.send_signal(number)
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Kill it, whatever its state, and its pause monitor."""
        if self._monitor is not None:
            self._monitor.kill()
            self._monitor.wait()
            self._monitor = None
        if self.process.poll() is None:
            self.kill()

    def workers(self) -> list[int]:
        """The ids of the worker processes; empty for a gateway of one process."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return []
        return [pid for pid in map(int, children) if "tracker" not in _command(pid)]

    def run_cli(self, *arguments: str, within: float = 60) -> "subprocess.CompletedProcess[bytes]":
        """Run a `cwg` command against it."""
        environment = {**self.environment, "CWG_URL": f"http://127.0.0.1:{self.port}", "CWG_API_KEY": self.key}
        command = [sys.executable, "-m", "gateway", *arguments]
        return subprocess.run(
            command, env=environment, cwd=self._source, capture_output=True, timeout=within, check=False
        )

    @property
    def log(self) -> str:
        """Everything it has logged so far."""
        return self._log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether its parent process runs."""
        return self.process.poll() is None

    # --- requests

    def get(self, path: str, headers: Mapping[str, str] | None = None, timeout: float = 30) -> Reply:
        """GET."""
        return self.request("GET", path, None, headers, timeout)

    def post(
        self, path: str, body: object = None, headers: Mapping[str, str] | None = None, timeout: float = 30
    ) -> Reply:
        """POST a value as JSON, or bytes unchanged."""
        return self.request("POST", path, body, headers, timeout)

    def delete(self, path: str, timeout: float = 30) -> Reply:
        """DELETE."""
        return self.request("DELETE", path, None, None, timeout)

    def request(
        self, method: str, path: str, body: object, headers: Mapping[str, str] | None = None, timeout: float = 30
    ) -> Reply:
        """Send one request on a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        all_headers = {
            "content-type": "application/json",
            **({"x-api-key": self.key} if self.key else {}),
            **(headers or {}),
        }
        try:
            connection.request(method, path, raw, all_headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
        except (OSError, http.client.HTTPException):
            return Reply(0)
        finally:
            connection.close()

    def chat(self, session: str, *texts: str, timeout: float = 30, **body: object) -> Reply:
        """One turn: user and assistant take turns in `texts`."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts or ("hi",))]
        request = {"model": MODEL, "messages": messages, **body}
        return self.post("/v1/chat/completions", request, {"x-session-id": session} if session else {}, timeout)

    def freeze(self, session: str, window: str, timeout: float = 60) -> Reply:
        """Freeze a session."""
        return self.post("/admin/windows", {"session_id": session, "window_name": window}, None, timeout)

    def connect(self, *, receive_buffer: int = 0, timeout: float = 20) -> socket.socket:
        """Open a bare connection."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(timeout)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def send_raw(self, data: bytes, timeout: float = 10) -> Reply:
        """Send bytes on a new connection and read one response."""
        with suppress(OSError), self.connect(timeout=timeout) as sock:
            with suppress(OSError):
                sock.sendall(data)
            return read_reply(sock)
        return Reply(0)

    # --- measurements

    def longest_pause(self) -> dict[str, float]:
        """The longest pause of /healthz since the last call, in ms; the first call starts the monitor."""
        if self._monitor is None:
            command = [sys.executable, "-m", "loadtests.attack_pause_monitor", str(self.port), str(self.process.pid)]
            self._monitor = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
            )
        assert self._monitor.stdin
        assert self._monitor.stdout
        self._monitor.stdin.write("\n")
        self._monitor.stdin.flush()
        return dict(json.loads(self._monitor.stdout.readline()))

    def memory(self, peak: bool = False) -> int:
        """Resident bytes of all its processes, or their peak since `reset_memory_peak`."""
        name = "VmHWM" if peak else "VmRSS"
        return sum(_status_bytes(pid, name) for pid in [self.process.pid, *self.workers()])

    def reset_memory_peak(self) -> int:
        """Reset the memory peak; return the resident bytes."""
        for pid in [self.process.pid, *self.workers()]:
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self.memory()

    def open_files(self) -> int:
        """The number of open file descriptors of all its processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in [self.process.pid, *self.workers()])


def read_reply(sock: socket.socket) -> Reply:
    """Read one response from a bare connection."""
    answer = http.client.HTTPResponse(sock)
    try:
        answer.begin()
        return Reply(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
    except (OSError, http.client.HTTPException, ValueError):
        return Reply(0)


def head(method: str, path: str, *headers: str, length: int | None = None) -> bytes:
    """Return the head of a request as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", *headers]
    if length is not None:
        lines.append(f"content-length: {length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _status_bytes(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
