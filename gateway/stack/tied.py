"""Run a command that the kernel kills when the process that started it ends, however that ends.

`preexec_fn` could do the same, but is unsafe with threads, and `cwg up` has one for its spinner.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tied(argv: Sequence[str]) -> list[str]:
    """The command line under which `argv`, which begins with a path, ends with this process.

    Its own children need it too.
    """
    return [sys.executable, "-m", "gateway.stack.tied", str(os.getpid()), *argv]


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(sys.argv[1]):  # else that process has ended already
        os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - the point of it
