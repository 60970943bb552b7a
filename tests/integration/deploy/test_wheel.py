"""The wheel: it holds every file of the packages, and `cwg` runs from it alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.gateway_process import ROOT, environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `pip install .` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    tree = {
        str(path.relative_to(ROOT))
        for package in ("gateway", "policies")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if ".dist-info/" not in name} == tree
        assert any(name.endswith("licenses/LICENSE") for name in packed.namelist())
    assert {Path(name).suffix for name in tree} >= {
        ".py",
        ".jinja",
        ".txt",
        ".html",
        ".css",
        ".js",
        ".svg",
    }  # data is among it


def test_cwg_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(tmp_path), str(wheel)], check=True)
    installed = environment({"PYTHONPATH": str(tmp_path)})  # before the checkout; the dependencies are found as usual

    def run(*argv: str) -> str:
        return subprocess.run(argv, env=installed, cwd="/", check=True, capture_output=True, text=True).stdout

    assert "Usage: cwg" in run(str(tmp_path / "bin/cwg"), "--help")
    for package in ("gateway", "policies"):
        assert run(sys.executable, "-c", f"import {package}; print({package}.__file__)").startswith(str(tmp_path))
