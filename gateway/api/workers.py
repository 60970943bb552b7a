"""Several worker processes on one port: the parent holds the sockets, starts the workers, and looks after them.

The parent serves nothing and has neither loop nor thread, so that it can fork at any time. Each worker opens parts of
its own. The first one starts alone: what has to be done once (a secret, a schema, a sweep) is done when the others
begin. A worker that dies is started again, at once and then later each time; one that cannot start, when none other
serves, ends all. One that serves and does not respond any more is killed, and so replaced: the kernel would deal it
connections for ever.
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
    """How a worker tells its parent that it is well. Never waits: a parent that is stopped reads nothing."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        os.set_blocking(pipe, False)

    def ready(self) -> None:
        """It serves. From now on it has to call `alive` again and again."""
        self._say(_READY)

    def alive(self) -> None:
        """It responds."""
        self._say(_ALIVE)

    def failed(self, why: str) -> None:
        """It cannot serve."""
        self._say(why.encode())

    def _say(self, what: bytes) -> None:
        with suppress(BrokenPipeError, BlockingIOError):  # the parent is gone or stopped
            os.write(self._pipe, what)


Serve = Callable[[int, socket.socket, Report], None]
"""What a worker does: its number, its socket, and how it tells that it serves and is alive. Raises StartError."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_MANY = 16  # deaths, by when the delay has long been the longest
_SOUND_S = 60.0  # who has lived so long has not died of how it started
_END_S = 30.0  # more than a worker takes to close its streams and to record its turns
_DUMP_S = 3.0  # from SIGABRT, which writes down where a worker hangs, to SIGKILL, which ends also a stopped one
_LATE_S = 1.0  # the parent itself was stopped: what the workers have said meanwhile is yet to be read


@dataclass(slots=True)
class _Worker:
    slot: int
    pid: int
    news: int  # it writes here that it is ready, or why it is not; its end is the worker's
    started: float
    ready: bool = False
    said: bytes = b""
    heard: float = 0.0  # when it last responded
    aborted: bool = False


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a worker has: at the end beyond what it needs to close, and between two signs of life."""

    longer_s: float = 0.0
    silent_s: float = 30.0


def supervise(
    count: int, sock: socket.socket, serve: Serve, on_exit: Callable[[int], None], patience: Patience
) -> None:
    """Keep `count` workers on the address of `sock`, until SIGTERM or SIGINT. Raises StartError.

    `on_exit` is called with the number of a worker that has ended, before another takes its place.
    """
    _Supervisor(count, sock, serve, on_exit, patience).keep()


class _Supervisor:
    def __init__(
        self, count: int, sock: socket.socket, serve: Serve, on_exit: Callable[[int], None], patience: Patience
    ) -> None:
        self._end_s = _END_S + patience.longer_s
        self._silent_s = patience.silent_s
        self._socks = {0: sock}  # by slot; that of a dead worker is kept for the next one, if that comes soon
        self._serve = serve
        self._on_exit = on_exit
        self._workers: dict[int, _Worker] = {}
        self._due = {0: time.monotonic()}  # slots to fill, and when
        self._waiting = list(range(1, count))  # slots that the first worker has to be ready for
        self._deaths: Counter[int] = Counter()  # of each slot, one soon after the other
        self._failure = ""
        self._told = 0
        self._kill_at: float | None = None  # set when it is to end
        self._news = selectors.DefaultSelector()
        self._parent_pipe = os.pipe()  # nobody writes to it: a worker sees its end when the parent is gone

    def keep(self) -> None:
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        self._news.register(woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake.fileno())
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        while self._workers or self._due:
            patience = self._patience()
            began = time.monotonic()
            events = self._news.select(patience)
            if patience is not None and time.monotonic() - began > patience + _LATE_S:
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
        self._told += 1

    def _patience(self) -> float | None:
        times = [*self._due.values(), *([self._kill_at] if self._kill_at is not None else [])]
        times += [self._silent_at(worker) for worker in self._watched]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _handle_signals(self) -> None:
        """End when told; insist when told twice, or when it takes too long."""
        if self._told and self._kill_at is None:
            self._end()
        if self._kill_at is not None and (self._told > 1 or time.monotonic() >= self._kill_at):
            self._signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + self._end_s

    @property
    def _watched(self) -> list[_Worker]:
        """Those that have to show that they are alive: at the end all have a time of their own."""
        return [] if self._kill_at is not None else [worker for worker in self._workers.values() if worker.ready]

    def _silent_at(self, worker: _Worker) -> float:
        return worker.heard + self._silent_s + (_DUMP_S if worker.aborted else 0.0)

    def _excuse(self) -> None:
        """Forget how long the workers have been silent: we were not there to hear them."""
        for worker in self._workers.values():
            worker.heard = time.monotonic()

    def _end_silent(self) -> None:
        """Kill who has not responded for too long; what has happened to it is seen when it has ended."""
        for worker in self._watched:
            if time.monotonic() < self._silent_at(worker):
                continue
            if worker.aborted:
                os.kill(worker.pid, signal.SIGKILL)
                worker.heard = time.monotonic()
            else:
                log.error("worker %d has not responded for %g s and is being killed", worker.pid, self._silent_s)
                os.kill(worker.pid, signal.SIGABRT)
                worker.aborted = True

    def _end(self) -> None:
        self._kill_at = time.monotonic() + self._end_s
        self._due.clear()
        self._waiting.clear()
        for sock in self._socks.values():  # or else the kernel would go on taking connections that nobody serves
            sock.close()
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for worker in self._workers.values():
            os.kill(worker.pid, number)  # it is there, if only as a zombie, until `_reap` has waited for it

    def _fill(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, at in self._due.items() if at <= now]:
            del self._due[slot]
            self._start(slot)

    def _start(self, slot: int) -> None:
        if slot not in self._socks:
            self._socks[slot] = server.listen_beside(next(iter(self._socks.values())))
        news, tell = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a signal to a child must not find the parent's handler
        pid = os.fork()
        if pid == 0:
            self._work(slot, tell)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(tell)
        now = time.monotonic()
        worker = self._workers[slot] = _Worker(slot, pid, news, now, heard=now)
        self._news.register(news, selectors.EVENT_READ, worker)

    def _work(self, slot: int, tell: int) -> NoReturn:
        """Be a worker."""
        code = 1
        report = Report(tell)
        try:
            self._become_worker(slot)
            self._serve(slot, self._socks[slot], report)
            code = 0
        except StartError as error:
            report.failed(str(error))
        except Exception:  # nothing may get out of here: below are the parent's frames
            log.exception("worker %d failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(code)

    def _become_worker(self, slot: int) -> None:
        faulthandler.enable()  # so that SIGABRT tells where it hung
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # SIGINT stays blocked: a Ctrl-C on the terminal comes to all, and the parent says once what follows from it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        self._news.close()
        for other, sock in self._socks.items():
            if other != slot:  # its queue has to end with its own worker
                sock.close()
        held, given = self._parent_pipe
        os.close(given)
        threading.Thread(target=_follow, args=(held, self._end_s), name="parent-pipe", daemon=True).start()

    def _read_status(self, worker: _Worker) -> None:
        said = os.read(worker.news, 4096)
        if not said:
            self._reap(worker)
            return
        worker.heard = time.monotonic()
        worker.said += said.translate(None, _READY + _ALIVE)
        if _READY in said:
            worker.ready = True
            self._due |= dict.fromkeys(self._waiting, worker.heard)
            self._waiting.clear()

    def _reap(self, worker: _Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._news.unregister(worker.news)
        os.close(worker.news)
        del self._workers[worker.slot]
        self._on_exit(worker.slot)
        how = worker.said.decode() or _how(os.waitstatus_to_exitcode(status))
        if self._kill_at is not None:
            if status:
                log.warning("worker %d: %s", worker.pid, how)
        elif self._is_hopeless(worker):
            self._failure = how if worker.said else f"a worker could not start: {how}"
            self._end()
        else:
            self._start_again(worker, how)

    def _is_hopeless(self, worker: _Worker) -> bool:
        if worker.ready or any(other.ready for other in self._workers.values()):
            return False
        return bool(worker.said or self._waiting)

    def _start_again(self, worker: _Worker, how: str) -> None:
        slot = worker.slot
        if time.monotonic() - worker.started >= _SOUND_S:
            del self._deaths[slot]
        deaths = self._deaths[slot]
        delay = min(_FIRST_DELAY_S * 2 ** (deaths - 1), _LONGEST_DELAY_S) if deaths else 0.0
        self._deaths[slot] = min(deaths + 1, _MANY)
        self._due[slot] = time.monotonic() + delay
        if delay and len(self._socks) > 1:  # new connections go to the others; those in its queue are lost
            self._socks.pop(slot).close()
        log.error("worker %d: %s; another starts in %g s", worker.pid, how, delay)


def _follow(held: int, end_s: float) -> None:
    """End with the parent, also where it was killed."""
    os.read(held, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(end_s)
    os._exit(1)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
