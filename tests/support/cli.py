"""Run `cwg`: in this process, or as users do in one of its own, which takes a third of a second longer."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress

from click.testing import CliRunner

from gateway.cli import main
from tests.support.gateway_process import ROOT, environment

Ended = subprocess.CompletedProcess[str]


def cwg(*arguments: str, **settings: str) -> Ended:
    """Run one command in this process, with these settings in its environment."""
    ours = dict.fromkeys(name for name in os.environ if name.startswith("CWG_"))
    result = CliRunner().invoke(main, arguments, env={**ours, **_variables(settings)}, catch_exceptions=False)
    return Ended(arguments, result.exit_code, result.stdout, result.stderr)


def cwg_process(*arguments: str, **settings: str) -> Ended:
    """Run one command in a process."""
    command = [sys.executable, "-m", "gateway", *arguments]
    given = environment(_variables(settings))
    return subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def cwg_on_terminal(*arguments: str, typed: str = "", **settings: str) -> Ended:
    """Run one command in a process, on a terminal of 80 columns; its whole output is in `stdout`."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    given = environment({**_variables(settings), "TERM": "dumb"})
    for size in ("COLUMNS", "LINES"):
        given.pop(size, None)
    command = [sys.executable, "-m", "gateway", *arguments]
    with subprocess.Popen(command, env=given, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        output = b"".join(_until_closed(ours))
        process.wait(timeout=60)
    os.close(ours)
    return Ended(arguments, process.returncode, output.decode().replace("\r\n", "\n"), "")


def _until_closed(terminal: int) -> Iterator[bytes]:
    with suppress(OSError):  # what Linux raises at the end of a terminal
        while data := os.read(terminal, 65536):
            yield data


def assert_failed(ended: Ended, *says: str) -> None:
    """It failed with 1 and said why in one line."""
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("error: "), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stdout == ""
    for words in says:
        assert words in ended.stderr


def _variables(settings: dict[str, str]) -> dict[str, str]:
    return {f"CWG_{name.upper()}": value for name, value in settings.items()}
