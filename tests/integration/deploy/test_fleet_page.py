"""What docs/fleet.md tells an operator to do, done."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gateway.settings import Settings, load
from gateway.store.postgres.store import CONNECTIONS
from tests.support import postgres
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import ROOT, Gateway

PAGE = (ROOT / "docs/fleet.md").read_text()


def run(tool: str, folder: Path, url: str) -> None:
    """Run a command of the page with the address of a database."""
    found = postgres.binaries()
    assert found is not None
    if not (found / tool).exists():
        pytest.skip(f"needs {tool} beside the server: apt-get install postgresql-client")
    (line,) = re.findall(rf"`({tool} [^`]*)`", PAGE)
    command, *options = shlex.split(line.replace("DATABASE", url))
    done = subprocess.run([str(found / command), *options], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_backup_is_restored_as_the_page_says(
    engine: FakeEngine, tmp_path: Path, session: str, postgres_url: str
) -> None:
    gateway = Gateway(tmp_path, engine.url, store_url=postgres_url)
    try:
        gateway.start().wait()
        gateway.chat(session, "the word is marmalade")
        assert gateway.freeze(session, "kept").status_code == 201
        run("pg_dump", tmp_path, postgres_url)
        assert gateway.http.delete("/admin/windows/kept").status_code == 200
        assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200
        gateway.stop()
        run("pg_restore", tmp_path, postgres_url)
        gateway.start().wait()
        assert gateway.http.get("/admin/windows/kept").status_code == 200
        assert gateway.http.get("/admin/search", params={"q": "marmalade"}).json()["results"]
        gateway.chat(session, "go on")  # numbers that the database gives continue where they were
        assert len(gateway.turns(session, 2)) == 2
    finally:
        gateway.close()


def test_the_example_is_taken_by_the_gateway(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    file = tmp_path / "gateway.toml"
    file.write_text(example)
    settings = load(file=file, environment={"CWG_API_KEY": "a-key", "CWG_STORE_URL": "postgresql://cwg@db/cwg"})
    assert len(settings.engines) == 2


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"| {CONNECTIONS} for each process: gateways x `workers` x {CONNECTIONS} " in PAGE
    lease_s = Settings.model_fields["gateway_lease_s"].default
    assert f"within `gateway_lease_s` ({lease_s:g} s)" in PAGE
