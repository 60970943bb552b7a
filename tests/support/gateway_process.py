"""A gateway as the process that users run, and helpers that wait for what it does."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.stack import local
from tests.support import openapi_check
from tests.support.fakes.engine import MODEL, WITHIN
from tests.support.postgres import store_settings

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "gateway", "serve"]
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
os.execv(sys.argv[3], sys.argv[3:])
"""


def eventually(
    holds: Callable[[], bool], what: str, within: float = WITHIN, more: Callable[[], str] = lambda: ""
) -> None:
    """Wait until something holds; fail with `what` and `more` if it does not in time."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, f"not within {within:g} s: {what}\n{more()}"
        threading.Event().wait(0.01)


def free_port() -> int:
    """A port without a listener, and none that Linux gives to another connection in the next moment."""
    return local.free_ports(1)[0]


@contextmanager
def not_accepting() -> Iterator[str]:
    """The URL of an engine that lets every connection wait."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # once its queue is full, the kernel lets further connections wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: ours without any setting of the gateway, and `settings`."""
    return {k: v for k, v in os.environ.items() if not k.startswith("CWG_")} | dict(settings)


class Gateway:
    """A running `cwg serve`. Settings in capitals are variables of the environment as they are."""

    def __init__(self, folder: Path, engine_url: str, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data_dir = folder / "data"
        self._log = folder / "gateway.log"
        own: dict[str, object] = {"port": self.port, "data_dir": self.data_dir, **store_settings(self.data_dir)}
        own |= {"engine_urls": engine_url} if engine_url else {}  # or they are in `engines`
        given = {**own, "auto_freeze": False, **settings}  # only where a test asks for it
        self._environment = environment({_variable(name): str(value) for name, value in given.items()})
        headers = {"x-api-key": str(settings["api_key"])} if "api_key" in settings else {}
        hooks = {"response": [openapi_check.check]}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers, event_hooks=hooks)
        self.process: subprocess.Popen[bytes]
        self.limit_files: tuple[int, int] | None = None  # soft and hard limit on its open files; None: ours

    def start(self) -> "Gateway":
        """Start the process, without waiting for it."""
        limits = [sys.executable, "-c", _LIMITED, *map(str, self.limit_files)] if self.limit_files else []
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([*limits, *SERVE], env=self._environment, cwd=ROOT, stdout=log, stderr=log)
        return self

    def wait(self, path: str = "/readyz") -> "Gateway":
        """Wait until it is ready."""
        eventually(
            lambda: self._answers(path), f"200 at {path}", within=60, more=lambda: f"{self._last_answer}\n{self.log}"
        )
        return self

    def stop(self) -> int:
        """Ask it to end and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        """End it whatever state it is in."""
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return self._log.read_text()

    @property
    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def chat(
        self, session: str, text: str = "hi", headers: Mapping[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """Send one chat completion of a session."""
        whole = {"model": MODEL, "messages": [{"role": "user", "content": text}], **body}
        return self.http.post("/v1/chat/completions", json=whole, headers={"x-session-id": session, **(headers or {})})

    def freeze(self, session: str, window: str, **more: Any) -> httpx.Response:
        """Freeze a session; it waits until no turn of it is in flight."""
        return self.http.post("/admin/windows", json={"session_id": session, "window_name": window, **more})

    def turns(self, session: str, count: int = 1) -> list[dict[str, Any]]:
        """The turns of a session, newest first, once there are so many."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = self.http.get(f"/admin/sessions/{session}").json().get("turns", [])
            return len(found) >= count

        eventually(there, f"{count} turns of {session}")
        return found

    def _answers(self, path: str) -> bool:
        assert self.process.poll() is None, f"the gateway ended with {self.process.poll()}:\n{self.log}"
        try:
            answer = self.http.get(path, timeout=5)
        except httpx.TransportError as error:
            self._last_answer = repr(error)
            return False
        self._last_answer = answer.text
        return answer.status_code == 200


def _variable(setting: str) -> str:
    return setting if setting.isupper() else f"CWG_{setting.upper()}"


@contextmanager
def gateway_in_front_of(engine_url: str, folder: Path, **settings: object) -> Iterator[Gateway]:
    """A gateway of a test's own, ready."""
    gateway = Gateway(folder, engine_url, **settings)
    try:
        yield gateway.start().wait()
    finally:
        gateway.close()
