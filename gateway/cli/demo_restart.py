"""Restart the stack that `cwg up` runs on this machine."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway.cli.admin_client import Admin, AdminError
from gateway.cli.connection import Failure, admin
from gateway.settings import LOOPBACK
from gateway.stack import cleanup, lock

_STOPPED_WITHIN_S = 180.0  # it may have sessions to freeze
_STARTED_WITHIN_S = 900.0
_POLL_S = 0.5
_PROBE_S = 2.0
_ENDED = "--restart: `cwg up` ended; its own output says why"

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Restart:
    """Restarts the stack that it was found for, when called. Raises Failure if that does not come back."""

    holder: lock.Holder
    run_dir: Path
    probe: Admin

    def __call__(self, show: Show) -> None:
        before = cleanup.recorded(self.run_dir)
        _request(self.holder.pid)
        show("restarting: stopping gateway, engine and cache")
        # The gateway not answering says nothing: it may only be busy.
        _wait(lambda: not _still_recorded(before, cleanup.recorded(self.run_dir)), _STOPPED_WITHIN_S, self.holder.pid)
        show("restarting: starting cache, engine and gateway")
        self._wait_until_ready()

    def is_back(self, show: Show) -> bool:
        """Wait for a stack whose restart was interrupted; whether it came back."""
        show("waiting for the stack, which is being restarted")
        try:
            self._wait_until_ready()
        except Failure:
            return False
        return True

    def _wait_until_ready(self) -> None:
        _wait(lambda: _is_ready(self.probe), _STARTED_WITHIN_S, self.holder.pid)


def find(data_dir: Path, url: str) -> Restart:
    """Find the stack that serves `url`, and return what restarts it. Raises Failure unless `cwg up` runs it here."""
    holder = _holder(data_dir)
    served = urlsplit(url)
    if holder is None:
        raise Failure(f"--restart: no stack runs on {data_dir}; pass the --data-dir of a `cwg up` on this machine")
    if served.port != holder.port or (served.hostname or "") not in LOOPBACK:
        raise Failure(f"--restart: the stack on {data_dir} listens on port {holder.port}, and CWG_URL is {url}")
    return Restart(holder, data_dir / "run", admin(_PROBE_S))


def _holder(data_dir: Path) -> lock.Holder | None:
    try:
        return lock.holder(data_dir)
    except PermissionError:
        raise Failure(f"--restart: {data_dir} belongs to another user; run `cwg demo --restart` as that user") from None
    except OSError as error:
        problem = f"{data_dir} is no data directory ({error.strerror})"
        raise Failure(f"--restart: {problem}; pass the --data-dir of a `cwg up` on this machine") from None


def _request(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGUSR1)
    except ProcessLookupError:
        raise Failure(_ENDED) from None
    except PermissionError:
        raise Failure(f"--restart: `cwg up` (process {pid}) belongs to another user; run this as that user") from None


def _still_recorded(before: dict[str, set[cleanup.Process]], now: dict[str, set[cleanup.Process]]) -> bool:
    return any(processes & now.get(name, set()) for name, processes in before.items())


def _wait(holds: Callable[[], bool], within: float, pid: int) -> None:
    deadline = time.monotonic() + within
    while not holds():
        if not Path("/proc", str(pid)).exists():
            raise Failure(_ENDED)
        if time.monotonic() > deadline:
            raise Failure(f"--restart: not done after {within:g} s; the logs of the stack say more")
        time.sleep(_POLL_S)


def _is_ready(probe: Admin) -> bool:
    try:
        probe.call("GET", "/readyz")
    except AdminError:
        return False
    return True
