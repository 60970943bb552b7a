"""Several worker processes on one port: the parent holds the sockets, starts the workers, and looks after them.

The parent serves nothing and has neither loop nor thread, so that it can fork at any time. Each worker opens parts of
its own. The first one starts alone: what has to be done once (a secret, a schema, a sweep) is done when the others
begin. A worker that dies is started again, at once and then later each time; one that cannot start, when none other
serves, ends all.
"""

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

from gateway.edge import server
from gateway.errors import StartError

log = logging.getLogger(__name__)

Serve = Callable[[int, socket.socket, Callable[[], None]], None]
"""What a worker does: its number, its socket, and what it calls when it serves. Raises StartError."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_MANY = 16  # deaths, by when the delay has long been the longest
_SOUND_S = 60.0  # who has lived so long has not died of how it started
_END_S = 30.0  # more than a worker takes to close its streams and to record its turns
_READY = b"+"


@dataclass(slots=True)
class _Worker:
    slot: int
    pid: int
    news: int  # it writes here that it is ready, or why it is not; its end is the worker's
    started: float
    ready: bool = False
    said: bytes = b""


def supervise(
    count: int, sock: socket.socket, serve: Serve, mourn: Callable[[int], None], *, longer_s: float = 0.0
) -> None:
    """Keep `count` workers on the address of `sock`, until SIGTERM or SIGINT. Raises StartError.

    `mourn` is called with the number of a worker that has ended, before another takes its place. At the end a worker
    has `longer_s` beyond what it needs to close.
    """
    _Crew(count, sock, serve, mourn, _END_S + longer_s).keep()


class _Crew:
    def __init__(
        self, count: int, sock: socket.socket, serve: Serve, mourn: Callable[[int], None], end_s: float
    ) -> None:
        self._end_s = end_s
        self._socks = {0: sock}  # by slot; that of a dead worker is kept for the next one, if that comes soon
        self._serve = serve
        self._mourn = mourn
        self._workers: dict[int, _Worker] = {}
        self._due = {0: time.monotonic()}  # slots to fill, and when
        self._waiting = list(range(1, count))  # slots that the first worker has to be ready for
        self._deaths: Counter[int] = Counter()  # of each slot, one soon after the other
        self._failure = ""
        self._told = 0
        self._kill_at: float | None = None  # set when it is to end
        self._news = selectors.DefaultSelector()
        self._leash = os.pipe()  # nobody writes to it: a worker sees its end when the parent is gone

    def keep(self) -> None:
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        self._news.register(woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake.fileno())
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        while self._workers or self._due:
            for key, _ in self._news.select(self._patience()):
                if key.data is None:
                    woken.recv(64)
                else:
                    self._hear(key.data)
            self._obey()
            self._fill()
        if self._failure:
            raise StartError(self._failure)

    def _on_signal(self, *_: object) -> None:
        self._told += 1

    def _patience(self) -> float | None:
        times = [*self._due.values(), *([self._kill_at] if self._kill_at is not None else [])]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _obey(self) -> None:
        """End when told; insist when told twice, or when it takes too long."""
        if self._told and self._kill_at is None:
            self._end()
        if self._kill_at is not None and (self._told > 1 or time.monotonic() >= self._kill_at):
            self._signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + self._end_s

    def _end(self) -> None:
        self._kill_at = time.monotonic() + self._end_s
        self._due.clear()
        self._waiting.clear()
        for sock in self._socks.values():  # or else the kernel would go on taking connections that nobody serves
            sock.close()
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for worker in self._workers.values():
            os.kill(worker.pid, number)  # it is there, if only as a zombie, until `_bury` has waited for it

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
        worker = self._workers[slot] = _Worker(slot, pid, news, time.monotonic())
        self._news.register(news, selectors.EVENT_READ, worker)

    def _work(self, slot: int, tell: int) -> NoReturn:
        """Be a worker."""
        code = 1
        try:
            self._become_worker(slot)
            self._serve(slot, self._socks[slot], lambda: _say(tell, _READY))
            code = 0
        except StartError as error:
            _say(tell, str(error).encode())
        except Exception:  # nothing may get out of here: below are the parent's frames
            log.exception("worker %d failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(code)

    def _become_worker(self, slot: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # SIGINT stays blocked: a Ctrl-C on the terminal comes to all, and the parent says once what follows from it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        self._news.close()
        for other, sock in self._socks.items():
            if other != slot:  # its queue has to end with its own worker
                sock.close()
        held, given = self._leash
        os.close(given)
        threading.Thread(target=_follow, args=(held, self._end_s), name="leash", daemon=True).start()

    def _hear(self, worker: _Worker) -> None:
        said = os.read(worker.news, 4096)
        if not said:
            self._bury(worker)
        elif said == _READY:
            worker.ready = True
            now = time.monotonic()
            self._due |= dict.fromkeys(self._waiting, now)
            self._waiting.clear()
        else:
            worker.said += said

    def _bury(self, worker: _Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._news.unregister(worker.news)
        os.close(worker.news)
        del self._workers[worker.slot]
        self._mourn(worker.slot)
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


def _say(tell: int, what: bytes) -> None:
    with suppress(BrokenPipeError):  # the parent is gone, and the leash says so
        os.write(tell, what)


def _follow(held: int, end_s: float) -> None:
    """End with the parent, also where it was killed."""
    os.read(held, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(end_s)
    os._exit(1)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
