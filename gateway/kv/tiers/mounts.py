"""The file system below a directory, as `/proc/self/mountinfo` has it (proc_pid_mountinfo(5))."""

import re
from pathlib import Path
from typing import NamedTuple

MOUNTINFO = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_SAFE = ("lookupcache=none", "lookupcache=pos", "lookupcache=positive")


class Mount(NamedTuple):
    """Where a file system is mounted, its type, and its options."""

    point: Path
    kind: str
    options: frozenset[str]


def mount_of(folder: Path, mountinfo: str) -> Mount | None:
    """The mount that a directory lies on, of several at one point the last; None if there is none."""
    found = [mount for mount in map(_parse, mountinfo.splitlines()) if mount and folder.is_relative_to(mount.point)]
    return max(enumerate(found), key=lambda one: (len(one[1].point.parts), one[0]))[1] if found else None


def nfs_risk(mount: Mount | None) -> str:
    """What may go wrong with KV on this mount, and the remedy; empty if nothing is known.

    An NFS client remembers that a name did not exist (nfs(5), `lookupcache`): LMCache then misses for up to a minute
    what another machine has just written, and so does the gateway.
    """
    if mount is None or not mount.kind.startswith("nfs") or mount.options & frozenset(_SAFE):
        return ""
    return f"{mount.point} is {mount.kind} and remembers missing files; mount it with lookupcache=none or =positive"


def _parse(line: str) -> Mount | None:
    before, separator, after = line.partition(" - ")
    fields, more = before.split(), after.split()
    if not separator or len(fields) < 6 or len(more) < 3:
        return None
    point = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), fields[4])
    return Mount(Path(point), more[0], frozenset([*fields[5].split(","), *more[2].split(",")]))
