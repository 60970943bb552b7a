"""A managed process, with real processes and real shared memory: whatever dies leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.stack import cleanup, local
from gateway.stack.process import Launch, ManagedProcess
from tests.support.local_stack import wait_ready

WITHIN = 30.0
SHM = Path("/dev/shm")

# Listens, and has a child as vLLM has: one that lives on when its parent is killed, and a segment nobody unlinks.
ENGINE = """
import os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(segment._name, "shared_memory")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("serving", os.environ.get("TMPDIR"), segment.name, child.pid, os.environ.get("SECRET_KEY"), flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""

OWNER = """
import sys, time
from pathlib import Path
from gateway.stack.process import Launch, ManagedProcess
from gateway.stack.reaper import reaping
engine, directory, port = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
part = ManagedProcess(Launch("engine", (sys.executable, "-c", engine, port), f"http://127.0.0.1:{port}/health",
                   directory / "engine.log", directory / "engine.json", owns_shared_memory=True))
with reaping(directory):
    part.start()
    while not part.is_ready():
        time.sleep(0.02)
    part.note()
    print(part.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def port() -> int:
    return local.free_ports(1)[0]


@pytest.fixture
def part(tmp_path: Path, port: int) -> Iterator[ManagedProcess]:
    launch = _launch(tmp_path, (sys.executable, "-c", ENGINE, str(port)), port)
    part = ManagedProcess(launch)
    yield part
    part.stop()


def _launch(directory: Path, argv: tuple[str, ...], port: int) -> Launch:
    return Launch(
        name="engine",
        argv=argv,
        ready_url=f"http://127.0.0.1:{port}/health",
        log=directory / "logs" / "engine.log",
        ledger=directory / "engine.json",
        without_env="SECRET_",
        stop_within=2.0,
        owns_shared_memory=True,
    )


def eventually(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < end, f"not within {WITHIN:g} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    stat = Path("/proc", str(pid), "stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def said(log: Path) -> tuple[Path, Path, int, str]:
    _, temporary, segment, child, secret = log.read_text().splitlines()[0].split()
    return Path(temporary), SHM / segment, int(child), secret


def test_it_is_ready_when_it_answers_and_leaves_nothing(part: ManagedProcess) -> None:
    part.start()
    wait_ready(part, WITHIN)
    temporary, segment, child, _ = said(part.log)
    assert part.exit_code is None
    assert segment.exists()
    assert temporary.is_dir()
    part.stop()
    assert part.exit_reason() == "engine was killed by SIGTERM"
    assert not is_alive(child)
    assert not segment.exists()
    assert not temporary.exists()


def test_child_that_outlives_its_killed_parent_is_cleared(part: ManagedProcess) -> None:
    part.start()
    wait_ready(part, WITHIN)
    _, segment, child, _ = said(part.log)
    os.kill(part.pid, signal.SIGKILL)
    eventually(lambda: part.exit_code is not None, "the parent is dead")
    assert is_alive(child)
    part.clear()
    assert part.exit_reason() == "engine was killed by SIGKILL"
    assert not is_alive(child)
    assert not segment.exists()


def test_it_can_be_restarted_and_appends_to_its_log(part: ManagedProcess) -> None:
    for _ in range(2):
        part.start()
        wait_ready(part, WITHIN)
        part.stop()
    assert part.log.read_text().count("serving") == 2


def test_new_process_rotates_the_log(part: ManagedProcess, tmp_path: Path) -> None:
    part.log.parent.mkdir()
    part.log.write_text("of the day before")
    part.start()
    wait_ready(part, WITHIN)
    assert (tmp_path / "logs" / "engine.log.1").read_text() == "of the day before"


def test_only_its_owner_can_read_what_it_writes(tmp_path: Path, port: int) -> None:
    script = f"open({str(tmp_path / 'object')!r}, 'w').close(); print('done')"
    part = ManagedProcess(_launch(tmp_path, (sys.executable, "-c", script), port))
    part.start()
    eventually(lambda: part.exit_code is not None, "it has ended")
    part.stop()
    modes = [path.stat().st_mode & 0o777 for path in (part.log.parent, part.log, tmp_path / "object")]
    assert modes == [0o700, 0o600, 0o600]


def test_it_does_not_get_withheld_variables(part: ManagedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    part.start()
    wait_ready(part, WITHIN)
    assert said(part.log)[3] == "None"


def test_process_that_ends_early_shows_the_end_of_its_log(tmp_path: Path, port: int) -> None:
    script = "print('\\x1b[31mno\\x1b[0m such model\\n'); raise SystemExit(3)"
    part = ManagedProcess(_launch(tmp_path, (sys.executable, "-c", script), port))
    part.start()
    eventually(lambda: part.exit_code is not None, "it has ended")
    assert (part.exit_reason(), part.last_lines()) == ("engine ended with exit code 3", "no such model")
    part.stop()


def test_cause_is_shown_even_if_much_was_logged_after_it(tmp_path: Path, port: int) -> None:
    script = "print('(Core) ValueError: too little KV\\n' + 'at a line\\n' * 50); raise SystemExit('see above')"
    part = ManagedProcess(_launch(tmp_path, (sys.executable, "-c", script), port))
    part.start()
    eventually(lambda: part.exit_code is not None, "it has ended")
    assert re.fullmatch(r".*ValueError: too little KV\n(at a line\n)+see above", part.last_lines())
    part.stop()


def test_process_that_ignores_sigterm_is_killed(tmp_path: Path, port: int) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(9)"
    )
    part = ManagedProcess(_launch(tmp_path, (sys.executable, "-c", script), port))
    part.start()
    eventually(lambda: "deaf" in part.log.read_text(), "it ignores the signal")
    part.stop()
    assert part.exit_reason() == "engine was killed by SIGKILL"


def test_death_of_the_supervisor_ends_its_processes(tmp_path: Path, port: int) -> None:
    argv = [sys.executable, "-c", OWNER, ENGINE, str(tmp_path), str(port)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        leader = int(owner.stdout.readline())
        _, segment, child, _ = said(tmp_path / "engine.log")
        owner.kill()
    eventually(lambda: not is_alive(leader) and not is_alive(child), "no process is left")
    eventually(lambda: not segment.exists(), "no segment is left")
    eventually(lambda: not (tmp_path / "engine.json").exists(), "the ledger is closed")


def test_leftovers_of_a_killed_run_are_swept(part: ManagedProcess, tmp_path: Path) -> None:
    part.start()
    wait_ready(part, WITHIN)
    temporary, segment, child, _ = said(part.log)
    os.killpg(part.pid, signal.SIGKILL)
    eventually(lambda: not is_alive(child) and part.exit_code is not None, "all of it is dead")
    assert segment.exists()
    cleanup.sweep(tmp_path)
    assert not segment.exists()
    assert not temporary.exists()


def test_processes_not_in_the_ledger_yet_are_swept(part: ManagedProcess, tmp_path: Path) -> None:
    part.start()
    eventually(part.is_ready, "it has its segment and its child, and nobody has noted them")
    _, segment, child, _ = said(part.log)
    assert segment.name not in (tmp_path / "engine.json").read_text()
    cleanup.sweep(tmp_path)
    assert not is_alive(child)
    assert not segment.exists()


def test_process_with_a_reused_pid_is_not_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        ledger = cleanup.Ledger(tmp_path / "engine.json")
        ledger.write(stranger.pid, tmp_path / "t", owns_segments=False)
        noted = {"processes": [[stranger.pid, 1]], "segments": [], "temporary": ""}
        _change(tmp_path / "engine.json", noted)
        ledger.sweep()
        assert stranger.poll() is None
        stranger.kill()


def test_segment_with_a_reused_name_is_not_removed(tmp_path: Path) -> None:
    segment = SHM / f"cwg-test-{os.getpid()}"
    segment.touch()
    try:
        ledger = cleanup.Ledger(tmp_path / "engine.json")
        ledger.write(os.getpid(), tmp_path / "t", owns_segments=False)
        noted = {"processes": [], "segments": [[segment.name, segment.stat().st_ino + 1]], "temporary": ""}
        _change(tmp_path / "engine.json", noted)
        ledger.sweep()
        assert segment.exists()
    finally:
        segment.unlink()


def test_ledger_from_before_the_last_boot_kills_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as stranger:
        ledger = cleanup.Ledger(tmp_path / "engine.json")
        ledger.write(stranger.pid, tmp_path / "t", owns_segments=False)
        _change(tmp_path / "engine.json", {"boot": "another"})
        ledger.sweep()
        assert stranger.poll() is None
        assert not (tmp_path / "engine.json").exists()
        stranger.kill()


def _change(path: Path, noted: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | noted))
