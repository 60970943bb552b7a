"""Restart the stack that `cwg up` runs on this machine."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from gateway.cli.admin_client import AdminError
from gateway.cli.connection import Failure, admin
from gateway.settings import LOOPBACK
from gateway.stack import cleanup, lock

_STOPPED_WITHIN_S = 180.0  # it may have sessions to freeze
_STARTED_WITHIN_S = 900.0
_POLL_S = 0.2
_PROBE_S = 2.0

Restart = Callable[[Callable[[str], None]], None]


def find(data_dir: Path, url: str) -> Restart:
    """Find the stack that serves `url`, and return what restarts it. Raises Failure unless `cwg up` runs it here."""
    holder = lock.holder(data_dir)
    served = urlsplit(url)
    if holder is None:
        raise Failure(f"--restart: no stack runs on {data_dir}; name the --data-dir of a `cwg up` on this machine")
    if served.port != holder.port or (served.hostname or "") not in LOOPBACK:
        raise Failure(f"--restart: the stack on {data_dir} listens on port {holder.port}, and CWG_URL is {url}")
    return lambda show: _restart(holder, data_dir / "run", show)


def _restart(holder: lock.Holder, run_dir: Path, show: Callable[[str], None]) -> None:
    before = cleanup.recorded(run_dir)
    os.kill(holder.pid, signal.SIGUSR1)
    show("restarting: stopping gateway, engine and cache")
    _wait(lambda: not _is_ready(), _STOPPED_WITHIN_S, holder.pid)
    show("restarting: starting cache, engine and gateway")
    _wait(_is_ready, _STARTED_WITHIN_S, holder.pid)
    after = cleanup.recorded(run_dir)
    if kept := [name for name, processes in before.items() if processes & after.get(name, set())]:
        raise Failure(f"--restart: {' and '.join(kept)} did not restart")


def _wait(holds: Callable[[], bool], within: float, pid: int) -> None:
    deadline = time.monotonic() + within
    while not holds():
        if not Path("/proc", str(pid)).exists():
            raise Failure("--restart: `cwg up` ended; its own output says why")
        if time.monotonic() > deadline:
            raise Failure(f"--restart: not done after {within:g} s; the logs of the stack say more")
        time.sleep(_POLL_S)


def _is_ready() -> bool:
    try:
        admin(_PROBE_S).call("GET", "/readyz")
    except AdminError:
        return False
    return True
