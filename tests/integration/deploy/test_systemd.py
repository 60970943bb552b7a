"""The units: systemd accepts them, and they run what `cwg up` runs."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.gateway_process import ROOT
from tests.support.launch_options import Options, of_cwg_up, options

UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))


def started(unit: str) -> Options:
    """The options of what a unit starts; systemd puts a space in place of an escaped end of line."""
    text = (ROOT / "deploy/systemd" / unit).read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    return options(shlex.split(command))


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    for unit in UNITS:  # it looks for the programs too
        (tmp_path / unit.name).write_text(
            re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.M)
        )
    verified = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (verified.returncode, verified.stderr) == (0, "")


def test_vllm_gets_the_options_of_cwg_up(tmp_path: Path) -> None:
    launched, _ = of_cwg_up(tmp_path)
    given = started("vllm.service")
    assert given.keys() == launched.keys() - {"--model"}
    (ours,), (theirs,) = given["--kv-transfer-config"][:1], launched["--kv-transfer-config"]
    expected = json.loads(theirs)
    expected["kv_connector_extra_config"]["lmcache.mp.port"] = int(started("lmcache.service")["--port"][0])
    assert json.loads(ours) == expected


def test_lmcache_gets_the_options_of_cwg_up(tmp_path: Path) -> None:
    _, launched = of_cwg_up(tmp_path)
    given = started("lmcache.service")
    assert given.keys() == launched.keys()
    for same in ("--host", "--http-host", "--eviction-policy", "--supported-transfer-mode"):
        assert given[same] == launched[same]


def test_what_shares_files_and_memory_runs_as_one_user_in_one_directory() -> None:
    assert len(UNITS) == 3
    for line in ("User=vllm", "StateDirectory=cwg", "UMask=0077"):
        wanted = [unit.name for unit in UNITS if unit.name != "vllm.service" or line.startswith("User")]
        assert [unit.name for unit in UNITS if f"\n{line}\n" in unit.read_text()] == wanted
    # It would remove the shared memory of the others when this unit stops.
    assert not any("RemoveIPC=yes" in unit.read_text() for unit in UNITS)
