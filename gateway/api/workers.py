"""Several worker processes on one port: the parent has the sockets, starts the workers, and supervises them.

The parent serves nothing and has neither event loop nor threads, so that it can fork at any time. Each worker opens its
own services. The first one starts alone: what has to be done once (a secret, a schema, a sweep) is done when the others
start. A worker that dies is restarted, at once and then with growing delays; one that cannot start while none serves
ends all. A worker that serves and stops responding is killed, and so replaced: the kernel would keep giving it
connections.
"""

import faulthandler
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from gateway.api import server
from gateway.errors import StartError

log = logging.getLogger(__name__)

_READY = b"\x01"
_ALIVE = b"\x02"


class Report:
    """A worker's status reports to its parent. Never blocks: a parent that is stopped reads nothing."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        os.set_blocking(pipe, False)

    def ready(self) -> None:
        """Report that it serves. From now on it has to call `alive` periodically."""
        self._write(_READY)

    def alive(self) -> None:
        """Report that it responds."""
        self._write(_ALIVE)

    def failed(self, reason: str) -> None:
        """Report that it cannot serve."""
        self._write(reason.encode())

    def _write(self, status: bytes) -> None:
        with suppress(BrokenPipeError, BlockingIOError):  # the parent is gone or stopped
            os.write(self._pipe, status)


Serve = Callable[[int, socket.socket, Report], None]
"""What a worker runs, given its number, its socket, and how to report its status. Raises StartError."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0
_MAX_DEATHS = 16  # counted; the delay has reached its maximum before
_SOUND_S = 60.0  # a worker that has lived this long has not died of how it started
_END_S = 20.0  # more than a worker takes to record its turns and to close, once its streams have ended
_DUMP_S = 3.0  # from SIGABRT, which logs where a worker hangs, to SIGKILL, which also ends a stopped one
_LATE_S = 1.0  # later than this, the parent itself was stopped, and has yet to read what the workers reported


@dataclass(slots=True)
class _Worker:
    slot: int
    pid: int
    status_pipe: int  # closed when the worker ends
    started: float
    ready: bool = False
    failure: bytes = b""
    heard_at: float = 0.0
    aborted: bool = False


class Supervisor:
    """Runs `count` workers on the address of `sock`.

    `on_exit` is called with the number of a worker that has ended, before another replaces it. A worker has `extra_s`
    more than usual to close, and is killed if it does not respond for `silent_s`.
    """

    def __init__(
        self, count: int, sock: socket.socket, serve: Serve, on_exit: Callable[[int], None], *, extra_s: float = 0.0,
        silent_s: float = 30.0,
    ) -> None:  # fmt: skip
        self._end_s = _END_S + extra_s
        self._silent_s = silent_s
        self._socks = {0: sock}  # by slot; that of a dead worker is kept for the next one, unless that is delayed
        self._serve = serve
        self._on_exit = on_exit
        self._workers: dict[int, _Worker] = {}
        self._due = {0: time.monotonic()}  # slots to fill, and when
        self._waiting = list(range(1, count))  # slots to start when the first worker is ready
        self._deaths: Counter[int] = Counter()  # of each slot, in quick succession
        self._failure = ""
        self._signals = 0
        self._kill_at: float | None = None  # set once it is stopping
        self._selector = selectors.DefaultSelector()
        self._parent_pipe = os.pipe()  # never written to; closed when the parent ends

    def run(self) -> None:
        """Keep the workers running until SIGTERM or SIGINT. Raises StartError."""
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake.fileno())
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        while self._workers or self._due:
            timeout = self._timeout()
            began = time.monotonic()
            events = self._selector.select(timeout)
            if timeout is not None and time.monotonic() - began > timeout + _LATE_S:
                self._excuse()
            for key, _ in events:
                if key.data is None:
                    woken.recv(64)
                else:
                    self._read_status(key.data)
            self._handle_signals()
            self._end_silent()
            self._fill()
        if self._failure:
            raise StartError(self._failure)

    def _on_signal(self, *_: object) -> None:
        self._signals += 1

    def _timeout(self) -> float | None:
        times = [*self._due.values(), *([self._kill_at] if self._kill_at is not None else [])]
        times += [self._silent_at(worker) for worker in self._watched]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _handle_signals(self) -> None:
        """Stop on a signal; kill the workers on a second one, or when they take too long."""
        if self._signals and self._kill_at is None:
            self._end()
        if self._kill_at is not None and (self._signals > 1 or time.monotonic() >= self._kill_at):
            self._signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + self._end_s

    @property
    def _watched(self) -> list[_Worker]:
        """The workers that have to show that they are alive, none while stopping."""
        return [] if self._kill_at is not None else [worker for worker in self._workers.values() if worker.ready]

    def _silent_at(self, worker: _Worker) -> float:
        return worker.heard_at + self._silent_s + (_DUMP_S if worker.aborted else 0.0)

    def _excuse(self) -> None:
        """Reset how long the workers have been silent: this process did not run."""
        for worker in self._workers.values():
            worker.heard_at = time.monotonic()

    def _end_silent(self) -> None:
        """Kill workers that have not responded for too long; `_reap` follows when they have ended."""
        for worker in self._watched:
            if time.monotonic() < self._silent_at(worker):
                continue
            if worker.aborted:
                os.kill(worker.pid, signal.SIGKILL)
                worker.heard_at = time.monotonic()
            else:
                log.error("worker %d has not responded for %g s and is being killed", worker.pid, self._silent_s)
                os.kill(worker.pid, signal.SIGABRT)
                worker.aborted = True

    def _end(self) -> None:
        self._kill_at = time.monotonic() + self._end_s
        self._due.clear()
        self._waiting.clear()
        for sock in self._socks.values():  # else the kernel would keep accepting connections that no worker serves
            sock.close()
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for worker in self._workers.values():
            os.kill(worker.pid, number)  # it exists, if only as a zombie, until `_reap` has waited for it

    def _fill(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, at in self._due.items() if at <= now]:
            del self._due[slot]
            self._start(slot)

    def _start(self, slot: int) -> None:
        if slot not in self._socks:
            self._socks[slot] = server.listen_again(next(iter(self._socks.values())))
        status, report = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a child must not run the parent's signal handler
        pid = os.fork()
        if pid == 0:
            self._work(slot, report)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(report)
        now = time.monotonic()
        worker = self._workers[slot] = _Worker(slot, pid, status, now, heard_at=now)
        self._selector.register(status, selectors.EVENT_READ, worker)

    def _work(self, slot: int, pipe: int) -> NoReturn:
        """Run a worker and exit."""
        code = 1
        report = Report(pipe)
        try:
            self._become_worker(slot)
            self._serve(slot, self._socks[slot], report)
            code = 0
        except StartError as error:
            report.failed(str(error))
        except Exception:  # nothing may escape: the frames below are the parent's
            log.exception("worker %d failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(code)

    def _become_worker(self, slot: int) -> None:
        faulthandler.enable()  # so that SIGABRT logs where it hung
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # SIGINT stays blocked: a Ctrl-C on the terminal goes to all processes, and the parent handles it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        self._selector.close()
        for other, sock in self._socks.items():
            if other != slot:  # its queue has to close with its own worker
                sock.close()
        read_end, write_end = self._parent_pipe
        os.close(write_end)
        threading.Thread(target=_end_with_parent, args=(read_end, self._end_s), name="parent-pipe", daemon=True).start()

    def _read_status(self, worker: _Worker) -> None:
        status = os.read(worker.status_pipe, 4096)
        if not status:
            self._reap(worker)
            return
        worker.heard_at = time.monotonic()
        worker.failure += status.translate(None, _READY + _ALIVE)
        if _READY in status:
            worker.ready = True
            self._due |= dict.fromkeys(self._waiting, worker.heard_at)
            self._waiting.clear()

    def _reap(self, worker: _Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._selector.unregister(worker.status_pipe)
        os.close(worker.status_pipe)
        del self._workers[worker.slot]
        self._on_exit(worker.slot)
        reason = worker.failure.decode() or _exit_reason(os.waitstatus_to_exitcode(status))
        if self._kill_at is not None:
            if status:
                log.warning("worker %d: %s", worker.pid, reason)
        elif self._cannot_start(worker):
            self._failure = reason if worker.failure else f"a worker could not start: {reason}"
            self._end()
        else:
            self._restart(worker, reason)

    def _cannot_start(self, worker: _Worker) -> bool:
        if worker.ready or any(other.ready for other in self._workers.values()):
            return False
        return bool(worker.failure or self._waiting)

    def _restart(self, worker: _Worker, reason: str) -> None:
        slot = worker.slot
        if time.monotonic() - worker.started >= _SOUND_S:
            del self._deaths[slot]
        deaths = self._deaths[slot]
        delay = min(_FIRST_DELAY_S * 2 ** (deaths - 1), _MAX_DELAY_S) if deaths else 0.0
        self._deaths[slot] = min(deaths + 1, _MAX_DEATHS)
        self._due[slot] = time.monotonic() + delay
        if delay and len(self._socks) > 1:  # new connections go to the others; those in its queue are lost
            self._socks.pop(slot).close()
        log.error("worker %d: %s; another starts in %g s", worker.pid, reason, delay)


def _end_with_parent(pipe: int, end_s: float) -> None:
    """End this process when the parent has ended, even if it was killed."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(end_s)
    os._exit(1)


def _exit_reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
