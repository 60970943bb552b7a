"""Run `cwg`: in this process, or as users do in one of its own, which takes a third of a second longer."""

import os
import subprocess
import sys

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
    return subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


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
