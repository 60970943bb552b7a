"""Outlive a killed supervisor by a second, to stop what it had started.

It reads a pipe whose other end only the supervisor has. The kernel closes that end however the supervisor dies.
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
def reaping(run_dir: Path, *descriptors: int) -> Iterator[None]:
    """While in this block, the death of this process ends every process listed in `run_dir`.

    The descriptors stay open until the last of them has ended, and so does a lock on them.
    """
    reaper = subprocess.Popen(
        [sys.executable, "-m", "gateway.stack.reaper", str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=descriptors,
    )
    try:
        yield
    finally:
        reaper.communicate(timeout=_SWEPT_WITHIN)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    cleanup.sweep(Path(sys.argv[1]))
