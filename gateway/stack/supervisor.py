"""The supervisor behind `cwg up`: starts the processes, restarts one that dies, and stops all of them."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gateway.stack import cleanup, commands, local, lock, preflight, trial_tiers
from gateway.stack.errors import StackError
from gateway.stack.process import ManagedProcess
from gateway.stack.reaper import reaping
from gateway.stack.terminal import Terminal

_TICK = 0.2
_NOTED_EVERY = 0.5
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 30.0
_SOUND_AFTER = 60.0
"""Seconds that a process has to be ready before its next death counts as its first."""
_DEATHS_AT_START = 3
_USAGE = 2
"""The exit code of a process that refuses its options (argparse, click)."""


def up(options: local.LocalStack) -> int:
    """Run the whole stack until a signal ends it. Raises `StackError` where it cannot start."""
    terminal = Terminal()
    # A SIGTERM while the model is built or downloaded acts like a Ctrl-C: temporary files are removed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        preflight.check(options)
        with lock.holding(options.data_dir, options.port) as descriptor:
            plan = _prepare(options, terminal)
            with reaping(plan.run_dir, descriptor):
                return _Supervisor(plan, terminal).run()
    except KeyboardInterrupt:
        return 0
    finally:
        terminal.settled()
        signal.signal(signal.SIGTERM, before)


def _prepare(options: local.LocalStack, terminal: Terminal) -> local.Plan:
    terminal.waiting("preparing the model")
    plan = local.plan(options, terminal.waiting)
    cleanup.sweep(plan.run_dir)
    preflight.check_memory(plan)
    for warning in (plan.model.warning, preflight.version_warning(preflight.installed_versions())):
        if warning:
            terminal.say(warning, style="yellow")
    for line in _facts(plan):
        terminal.say(line)
    return plan


def _facts(plan: local.Plan) -> Iterator[str]:
    """What is served, and what it takes."""
    model = plan.model
    about = f": {model.about}" if model.about else ""
    yield f"model {model.served_name}{about} ({model.directory})"
    yield f"memory: up to {preflight.needed_memory(plan) / 2**30:.1f} GiB"
    yield from trial_tiers.facts(plan)
    if "disk" not in plan.options.tiers:
        return
    if plan.disk_budget_bytes is None:
        limit = "the disk_budget_bytes that you set"
    else:
        share = f"{local.DISK_SHARE:.0%} of the free disk; CWG_DISK_BUDGET_BYTES sets another limit"
        limit = f"{plan.disk_budget_bytes / 2**30:.1f} GiB ({share})"
    yield f"disk: KV of idle sessions is deleted past {limit}; windows count, and are never deleted"


class _Stop(Exception):
    """A signal requested the end."""


class _Watched:
    """A process, how often it has died, and when it is restarted."""

    def __init__(self, process: ManagedProcess, terminal: Terminal) -> None:
        self.process = process
        self.deaths = 0
        self._terminal = terminal
        self._delay = _FIRST_DELAY
        self._due: float | None = None
        self._started = self._noted = 0.0
        self._ready_since: float | None = None

    @property
    def is_ready(self) -> bool:
        return self._ready_since is not None

    def start(self) -> None:
        self._due = None
        self._started = time.monotonic()
        self.process.start()

    def tick(self) -> None:
        """Check it once, and restart it if that is due."""
        now = time.monotonic()
        if self._due is not None:
            if now >= self._due:
                self.start()
        elif self.process.exit_code is not None:
            self._died(now)
        elif self._ready_since is None:
            self._await(now)
        elif now - max(self._ready_since, self._noted) > _SOUND_AFTER:
            self.deaths, self._delay = 0, _FIRST_DELAY
            self._noted = now
            self.process.note()
            self.process.bound_log()

    def _await(self, now: float) -> None:
        if now - self._noted > _NOTED_EVERY:
            self.process.note()
            self._noted = now
        if self.process.is_ready():
            self.process.note()
            self._ready_since = now
            self._terminal.say(f"{self.process.name} is ready after {now - self._started:.1f} s", style="green")

    def _died(self, now: float) -> None:
        refused = self.process.exit_code == _USAGE and not self.is_ready
        again = "" if refused else f"again in {self._delay:g} s; "
        self._terminal.say(f"{self.process.exit_reason()}; {again}log: {self.process.log}", style="red")
        # Before its last line, a process that refuses its options prints all those that it has.
        self._terminal.quote(self.process.last_lines(1 if refused else 12))
        if refused:
            raise StackError(f"{self.process.name} refused its options; see above")
        self.process.clear()
        self.deaths += 1
        self._ready_since = None
        self._due = now + self._delay
        self._delay = min(self._delay * 2, _LONGEST_DELAY)


class _Supervisor:
    def __init__(self, plan: local.Plan, terminal: Terminal) -> None:
        self._plan = plan
        self._terminal = terminal
        self._processes = commands.processes(plan)
        self._watched: list[_Watched] = []
        self._signals = 0
        self._restart_requested = False

    def run(self) -> int:
        with self._listening():
            try:
                while True:
                    self._run_until_restart()
            except _Stop:
                return 0
            finally:
                self._stop()

    def _run_until_restart(self) -> None:
        """Start everything, and stop it when that is requested. Raises `_Stop`."""
        self._start()
        while not self._restart_requested:
            self._turn()
        self._terminal.say("a restart was requested")
        self._stop()
        self._watched.clear()

    def _start(self) -> None:
        self._restart_requested = False
        self._bring_up(*self._processes.storage)
        # The engine connects to the cache half a minute after its start, so both can load at the same time.
        self._bring_up(self._processes.cache, self._processes.engine)
        self._bring_up(self._processes.gateway)
        self._terminal.settled()
        self._terminal.say(f"engine {self._plan.engine_url}, cache {self._plan.cache_url}, data {self._plan.data_dir}")
        sys.stdout.write(f"ready {self._plan.url}\n")
        sys.stdout.flush()

    def _bring_up(self, *processes: ManagedProcess) -> None:
        fresh = [_Watched(process, self._terminal) for process in processes]
        for watched in fresh:
            watched.start()
        self._watched += fresh
        while waiting := [watched.process.name for watched in self._watched if not watched.is_ready]:
            self._terminal.waiting(f"starting {' and '.join(waiting)}")
            self._turn()
            for watched in self._watched:
                if watched.deaths == _DEATHS_AT_START:
                    raise StackError(
                        f"{watched.process.name} ended {_DEATHS_AT_START} times; see {watched.process.log}"
                    )

    def _turn(self) -> None:
        for watched in self._watched:
            watched.tick()
        if self._signals:
            raise _Stop
        time.sleep(_TICK)

    def _stop(self) -> None:
        for watched in reversed(self._watched):
            self._terminal.waiting(f"stopping {watched.process.name}")
            if not watched.is_ready:
                watched.process.kill()  # vLLM ignores SIGTERM while it loads, and there is nothing to save yet
            watched.process.stop()
        self._terminal.settled()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_restart)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_restart(self, _number: int, _frame: FrameType | None) -> None:
        self._restart_requested = True

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            for watched in self._watched:
                watched.process.kill()
