"""Outlive a killed supervisor by a second, to end what it had started.

It reads a pipe whose other end only the supervisor holds. The kernel closes that end whichever way the supervisor dies.
PR_SET_PDEATHSIG would reach the direct children only, and vLLM's engine survives the death of its API server.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.stack import cleanup

_SWEPT_WITHIN = 30.0


@contextmanager
def reaping(run_dir: Path, *held: int) -> Iterator[None]:
    """Until this is left, the death of this process is the death of every part noted in `run_dir`.

    The descriptors `held` stay open until the last part is gone: a lock on them outlives this process by so much.
    """
    reaper = subprocess.Popen(
        [sys.executable, "-m", "gateway.stack.reaper", str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=held,
    )
    try:
        yield
    finally:
        reaper.communicate(timeout=_SWEPT_WITHIN)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    cleanup.sweep(Path(sys.argv[1]))
