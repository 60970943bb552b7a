"""The limit on open files: each client needs one, and each stream another one to the engine."""

import errno
import logging
import resource
import time

log = logging.getLogger(__name__)

FEW = 4096  # with fewer open files than this a gateway serves noticeably fewer clients than it could
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_OURS = 160  # store, logs, connections of our own to engines, cache and Redis
_PER_CLIENT = 2  # its connection, and one to the engine
_UNLIMITED = 2**20
_LOG_EVERY_S = 60.0


def raise_open_files() -> int:
    """Raise the limit on open files as far as permitted, and return it; a low one is logged."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit on open files could not be raised: %s", error)
    limit = open_files()
    if limit < FEW:
        log.warning(
            "only %d files may be open: %d clients at once; raise the limit (ulimit -Hn, LimitNOFILE=) to %d or more",
            limit, clients(limit), FEW,
        )  # fmt: skip
    return limit


def open_files() -> int:
    """How many files may be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def clients(files: int) -> int:
    """How many clients can be served with this many open files."""
    return max((files - _OURS) // _PER_CLIENT, 1)


class OutOfFiles:
    """Recognises errors caused by the limit on open files: these are not the engine's fault."""

    def __init__(self) -> None:
        self._logged_at = -_LOG_EVERY_S

    def caused(self, error: BaseException | None) -> bool:
        """Whether the limit caused an error; if so it is logged, at most once a minute."""
        while error is not None and not (isinstance(error, OSError) and error.errno in _OUT_OF_FILES):
            error = error.__cause__ or error.__context__
        if error is None:
            return False
        if time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = time.monotonic()
            log.error("too many open files (the limit is %d): connections fail until some are closed", open_files())
        return True
