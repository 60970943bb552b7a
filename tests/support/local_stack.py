"""vLLM and LMCache as `cwg up` runs them, without a supervisor."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.stack import cleanup, commands, local, lock, models
from gateway.stack.demos import Demo
from gateway.stack.process import ManagedProcess
from gateway.stack.reaper import reaping

CACHE_WITHIN = 120.0
ENGINE_WITHIN = 900.0


def plan_for(
    options: local.LocalStack, *, demo: Demo | None = "random", on_cpu: bool = True, dtype: str | None = None
) -> local.Plan:
    """A plan for a stack that is not started."""
    return local.Plan(
        options=options, data_dir=options.data_dir,
        model=models.Model(options.data_dir, "models/m", "m", "f", demo=demo, dtype=dtype),
        engine_port=1, cache_port=2, cache_http_port=3, chunk_size=64, cache_gb=options.cpu_cache_gb or 1.0,
        engine_kv_gb=1, on_cpu=on_cpu,
    )  # fmt: skip


@contextmanager
def running(options: local.LocalStack) -> Iterator[tuple[local.Plan, commands.Processes]]:
    """Run cache and engine for the block, or until this process dies."""
    options.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.holding(options.data_dir, options.port) as descriptor:
        plan = local.plan(options)
        cleanup.sweep(plan.run_dir)
        with reaping(plan.run_dir, descriptor):
            yield from _running(plan)


def _running(plan: local.Plan) -> Iterator[tuple[local.Plan, commands.Processes]]:
    processes = commands.processes(plan)
    try:
        for storage in processes.storage:
            storage.start()
            wait_ready(storage, CACHE_WITHIN)
        start(processes)
        yield plan, processes
    finally:
        for process in (processes.gateway, processes.engine, processes.cache, *processes.storage):
            process.stop()


def start(processes: commands.Processes) -> None:
    """Start cache and engine, and wait until both are ready."""
    processes.cache.start()
    processes.engine.start()
    wait_ready(processes.cache, CACHE_WITHIN)
    wait_ready(processes.engine, ENGINE_WITHIN)


def wait_ready(process: ManagedProcess, within: float) -> None:
    """Wait until a process is ready; fail with the end of its log if it ends before, or takes too long."""
    deadline = time.monotonic() + within
    while not process.is_ready():
        process.note()
        assert process.exit_code is None, f"{process.exit_reason()}\n{process.last_lines()}"
        assert time.monotonic() < deadline, f"{process.name} is not ready after {within:g} s\n{process.last_lines()}"
        time.sleep(0.1)
    process.note()
