"""Disk space that is taken now, so that a later write cannot fail for want of it."""

import os
from pathlib import Path


def allocate(path: Path, size: int) -> None:
    """Create a file of this size whose blocks are allocated, not only promised. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, size)
    finally:
        os.close(file)
