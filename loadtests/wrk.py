"""Drives wrk, the load generator (Debian package `wrk`)."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("rotate_sessions.lua")
_TIMEOUT_S = 20  # a peer that queues 32 requests may need seconds for one; that is a result, not a failure


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: a body, over how many connections, and under how many session ids."""

    body: Path
    connections: int
    sessions: int
    prefix: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of one run. `failed` counts broken connections, time-outs and statuses of 400 and above."""

    requests: int
    duration_us: int
    p50_us: int
    p99_us: int
    failed: int


def version() -> str:
    """Return the version of wrk. Exits with a message if it is not installed."""
    if shutil.which("wrk") is None:
        raise SystemExit("error: wrk is not installed (Debian, Ubuntu: apt install wrk; macOS: brew install wrk)")
    output = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    return " ".join(output.split()[1:2])


def run(url: str, load: Load, seconds: float) -> LoadResult:
    """POST `load` to `url` for that many seconds."""
    command = [
        "wrk", "-t1", f"-c{load.connections}", f"-d{max(1, round(seconds))}s", f"--timeout={_TIMEOUT_S}s",
        "-s", str(_SCRIPT), url, "--", str(load.body), str(load.sessions), load.prefix,
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 3 * _TIMEOUT_S)
    line = next((line for line in process.stdout.splitlines() if line.startswith("RESULT ")), "")
    if not line:
        raise RuntimeError(f"wrk printed no result: {process.stdout}{process.stderr}")
    return LoadResult(**json.loads(line.removeprefix("RESULT ")))
