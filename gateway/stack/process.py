"""One process of the stack: its log, its readiness, its end."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from gateway.stack import cleanup
from gateway.stack.errors import StackError

_PROBE_WITHIN = 2.0
_TAIL_BYTES = 64 * 1024
_LOG_BYTES = 64 * 2**20
_CAUSE = re.compile(r"\b[A-Z]\w*(?:Error|Exception)\b: ")
_CAUSES = 3
_OWNER_ONLY = 0o077  # umask: logs, KV and stores hold conversations
_LINE_CHARS = 300
"""vLLM logs its whole configuration as one line."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to run a process, and how to check that it is ready."""

    name: str
    argv: tuple[str, ...]
    ready_url: str
    log: Path
    ledger: Path
    env: Mapping[str, str] = field(default_factory=dict)
    without_env: str = ""
    """Variables with this prefix are withheld from the process: the engine need not know the gateway's keys."""
    cwd: Path | None = None
    stop_within: float = 10.0
    owns_shared_memory: bool = False


class ManagedProcess:
    """A process that can be started, checked and stopped, and started again."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._ledger = cleanup.Ledger(launch.ledger)
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary = Path()

    @property
    def name(self) -> str:
        """cache, engine, gateway, or what holds a tier: valkey, s3."""
        return self._launch.name

    @property
    def log(self) -> Path:
        """The file that all its output goes to."""
        return self._launch.log

    @property
    def pid(self) -> int:
        """The process that was started; its children are in a process group of the same number."""
        return self._started().pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, else as in `subprocess`: negative for a signal."""
        return self._started().poll()

    def start(self) -> None:
        """Start it in a session of its own: a Ctrl-C on the terminal is for the supervisor."""
        self._ledger.sweep()
        if self._process is None:
            _rotate(self._launch.log)
        # Sockets and start-up files go where a sweep finds them. A short path: a socket's has 107 bytes at most.
        self._temporary = Path(tempfile.mkdtemp(prefix="cwg-"))
        inherited = {name: value for name, value in os.environ.items() if not self._is_withheld(name)}
        with os.fdopen(_open_private(self._launch.log), "ab") as log:
            self._process = subprocess.Popen(
                self._launch.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, "TMPDIR": str(self._temporary), **self._launch.env},
                cwd=self._launch.cwd,
                start_new_session=True,
                umask=_OWNER_ONLY,
            )
        self.note()

    def note(self) -> None:
        """Write its processes and segments to the ledger, in case this process is killed."""
        self._ledger.write(self.pid, self._temporary, owns_segments=self._launch.owns_shared_memory)

    def is_ready(self) -> bool:
        """Whether it answers 200 now, or a PING where its URL is one of Redis."""
        url = urlsplit(self._launch.ready_url)
        if url.scheme == "redis":
            return _answers_ping(url.hostname or "", url.port or 0)
        connection = HTTPConnection(url.hostname or "", url.port, timeout=_PROBE_WITHIN)
        try:
            connection.request("GET", f"{url.path}?{url.query}" if url.query else url.path)
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False  # not listening yet, or busy: the caller asks again
        finally:
            connection.close()

    def stop(self) -> None:
        """Terminate it, kill it if that takes too long, and clean up. Does nothing if it was never started."""
        if self._process is None:
            return
        deadline = time.monotonic() + self._launch.stop_within
        self._process.terminate()
        while self.exit_code is None and time.monotonic() < deadline:
            self.note()
            time.sleep(0.1)
        self.kill()
        self.clear()

    def kill(self) -> None:
        """Send SIGKILL to it and its children if it still runs; `clear` removes the rest."""
        if self._process and self._process.poll() is None:
            self.note()  # a segment created since then could not be found once its process is dead
            os.killpg(self._process.pid, signal.SIGKILL)

    def clear(self) -> None:
        """After its end, kill the children that outlived it and remove their shared memory."""
        self._started().wait()
        self.note()
        self._ledger.sweep()

    def exit_reason(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is None:
            return f"{self.name} is running"
        if code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"

    def last_lines(self, count: int = 12) -> str:
        """The end of its log, and the errors logged before it: vLLM's last lines only refer to them."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = _COLOUR.sub("", log.read().decode("utf-8", "replace"))
        lines = [line[:_LINE_CHARS] for line in text.splitlines() if line.strip()]
        causes = [line for line in lines[:-count] if _CAUSE.search(line)]
        return "\n".join(causes[-_CAUSES:] + lines[-count:])

    def bound_log(self) -> None:
        """Move the content of a log that has grown too long to the old one; the process keeps writing to the log."""
        if self.log.stat().st_size > _LOG_BYTES:
            shutil.copyfile(self.log, _old(self.log))
            os.truncate(self.log, 0)

    def _is_withheld(self, name: str) -> bool:
        return bool(self._launch.without_env) and name.startswith(self._launch.without_env)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise StackError(f"{self.name} has not been started")
        return self._process


def _answers_ping(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_PROBE_WITHIN) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _open_private(log: Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _rotate(log: Path) -> None:
    """Begin a new log and keep one old one."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists():
        log.replace(_old(log))


def _old(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")
