"""`cwg demo --restart`: which stack it restarts, and how it finds out that it has."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gateway.cli import demo_restart
from gateway.cli.connection import Failure
from gateway.stack import cleanup, lock
from tests.support.cli import assert_failed, cwg
from tests.support.gateway_process import Gateway

_HOLD = (
    "import sys\nfrom pathlib import Path\nfrom gateway.stack import lock\n"
    "with lock.holding(Path(sys.argv[1]), 8700):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def test_it_needs_a_stack_of_cwg_up(gateway: Gateway, tmp_path: Path) -> None:
    command = ("demo", "--restart", "--data-dir", str(tmp_path))
    assert_failed(cwg(*command, url=gateway.url), f"no stack runs on {tmp_path}; pass the --data-dir of a `cwg up`")
    with lock.holding(tmp_path, gateway.port + 1):
        assert_failed(
            cwg(*command, url=gateway.url), f"listens on port {gateway.port + 1}, and CWG_URL is {gateway.url}"
        )


def test_a_data_dir_below_a_file_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = cwg("demo", "--restart", "--data-dir", str(tmp_path / "file" / "data"), url=gateway.url)
    assert_failed(ended, "is no data directory (Not a directory); pass the --data-dir")


def test_the_stack_of_another_user_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    with lock.holding(tmp_path, gateway.port), without_access(tmp_path):
        ended = cwg("demo", "--restart", "--data-dir", str(tmp_path), url=gateway.url)
    assert_failed(ended, f"{tmp_path} belongs to another user; run `cwg demo --restart` as that user")


def test_a_stack_that_has_ended_since_is_reported(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stack:
        assert stack.stdout
        stack.stdout.readline()
        restart = demo_restart.find(tmp_path, "http://127.0.0.1:8700")
        stack.kill()
    with pytest.raises(Failure, match="`cwg up` ended"):
        restart(lambda _step: None)


def test_a_gateway_that_once_does_not_answer_has_not_stopped(
    busy_gateway: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CWG_URL", f"http://127.0.0.1:{busy_gateway}")
    (tmp_path / "run").mkdir()
    ledger = cleanup.Ledger(tmp_path / "run" / "gateway.json")
    replaced: list[threading.Timer] = []
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as old:

        def write(leader: int) -> None:
            ledger.write(leader, tmp_path / "temporary", owns_segments=False)

        def replace(*_: object) -> None:
            # Long after a probe would have found the gateway silent, and the next one found it ready.
            replaced.append(threading.Timer(1.5, write, [os.getpgrp()]))
            replaced[0].start()

        write(old.pid)
        before = signal.signal(signal.SIGUSR1, replace)
        try:
            with lock.holding(tmp_path, busy_gateway):
                demo_restart.find(tmp_path, f"http://127.0.0.1:{busy_gateway}")(lambda _step: None)
            assert not {process for process in ledger.processes() if process.pid == old.pid}
        finally:
            signal.signal(signal.SIGUSR1, before)
            old.kill()
            replaced[0].join()


class _BusyOnce(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(503 if self.asked == 1 else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def busy_gateway() -> Iterator[int]:
    """The port of what is not ready at the first probe, and is at all others."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _BusyOnce)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def without_access(directory: Path) -> Iterator[None]:
    """As a user who may not enter the directory; root may enter any."""
    directory.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        directory.chmod(0o700)
