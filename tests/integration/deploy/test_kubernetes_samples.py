"""The samples for Kubernetes: valid, closed to whom they should be, and the same stack as `cwg up`."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import __version__
from gateway.stack.transfers import CHECKED
from tests.support.gateway_process import ROOT
from tests.support.kubernetes import NEWEST, OLDEST, Document, containers, documents, named, pod_of, selects, validate
from tests.support.launch_options import Options, of_cwg_up, options

SAMPLES = ROOT / "deploy/kubernetes"
FOLDERS = ("engine", "lmcache-operator", "production-stack")
GATEWAY = {"app.kubernetes.io/name": "context-window-gateway"}
STACK_POD = {"model": "qwen3-8b", "helm-release-name": "stack"}  # the labels that production-stack gives to it
OPERATOR_POD = {  # those of the operator: operator/internal/resources/helpers.go
    "app.kubernetes.io/name": "lmcache",
    "app.kubernetes.io/instance": "cache",
    "app.kubernetes.io/managed-by": "lmcache-operator",
}
_IN_A_FLEET = {"--revision", "--shutdown-timeout"}


def sample(folder: str) -> list[Document]:
    """Every document of a folder, but for the values of somebody else's chart."""
    files = [f for f in sorted((SAMPLES / folder).glob("*.yaml")) if f.name != "values.yaml"]
    return [document for file in files for document in documents(file.read_text())]


def stack_values() -> dict[str, Any]:
    """The values for production-stack's chart."""
    found = yaml.safe_load((SAMPLES / "production-stack/values.yaml").read_text())
    assert isinstance(found, dict)
    return found


def container(folder: str, name: str) -> Document:
    (found,) = [c for c in containers(named(sample(folder), "Deployment")) if c["name"] == name]
    return found


def engine_options(folder: str) -> Options:
    """What a sample gives to vLLM."""
    if folder != "production-stack":
        return options(container(folder, "engine")["args"])
    (spec,) = stack_values()["servingEngineSpec"]["modelSpec"]
    chart = [f"--model={spec['modelURL']}", f"--revision={spec['modelRevision']}", "--host=0.0.0.0", "--port=8000"]
    chart += ["--enable-prefix-caching"] if spec["vllmConfig"]["enablePrefixCaching"] else []
    return options([*chart, *spec["vllmConfig"]["extraArgs"]])


def pod_labels(folder: str) -> list[dict[str, str]]:
    """The labels of every pod that a sample leads to."""
    if folder == "production-stack":
        return [STACK_POD, OPERATOR_POD]
    own = [d["spec"]["template"]["metadata"]["labels"] for d in sample(folder) if d["kind"] == "Deployment"]
    return [*own, OPERATOR_POD] if folder == "lmcache-operator" else own


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubernetes_takes_every_document(folder: str, version: str) -> None:
    found = sample(folder)
    assert len(found) >= 4
    for document in found:
        validate(document, version)


@pytest.mark.parametrize("folder", ["engine", "lmcache-operator"])
def test_kustomize_builds_all_of_a_folder(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl: apt-get install kubernetes-client")
    command = ["kubectl", "kustomize", str(SAMPLES / folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    assert {d["metadata"]["namespace"] for d in documents(built.stdout)} == {"llm"}
    assert "image: context-window-gateway-engine" not in built.stdout


@pytest.mark.parametrize("folder", ["engine", "lmcache-operator"])
def test_kustomization_lists_every_file(folder: str) -> None:
    listed = set(named(sample(folder), "Kustomization")["resources"])
    assert listed == {f.name for f in (SAMPLES / folder).glob("*.yaml")} - {"kustomization.yaml"}


# --- the same stack as `cwg up`


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_engine_gets_the_options_of_cwg_up(folder: str, tmp_path: Path) -> None:
    launched, _ = of_cwg_up(tmp_path)
    given = engine_options(folder)
    assert given.keys() == launched.keys() | _IN_A_FLEET
    (ours,), (theirs,) = given["--kv-transfer-config"], launched["--kv-transfer-config"]
    host = "tcp://127.0.0.1" if folder == "engine" else "tcp://cache"
    expected = json.loads(theirs)
    expected["kv_connector_extra_config"] |= {"lmcache.mp.host": host, "lmcache.mp.port": 5555}
    assert json.loads(ours) == expected


def test_the_sidecar_gets_the_options_of_cwg_up(tmp_path: Path) -> None:
    _, launched = of_cwg_up(tmp_path)
    given = options(container("engine", "cache")["args"])
    assert given.keys() == launched.keys() | {"--l2-prefetch-policy"}
    for same in ("--host", "--eviction-policy", "--supported-transfer-mode"):
        assert given[same] == launched[same]
    (ours,), (_, theirs) = ([json.loads(text) for text in of["--l2-adapter"]] for of in (given, launched))
    assert ours | {"host": "", "num_workers": 0} == theirs | {"host": "", "num_workers": 0}


def test_the_operators_server_gets_what_the_sidecar_gets() -> None:
    sidecar = options(container("engine", "cache")["args"])
    spec = named(sample("lmcache-operator"), "LMCacheEngine")["spec"]
    server, l2, extra = spec["server"], spec["l2Backend"], options(spec["extraArgs"])
    assert sidecar["--port"] == [str(server["port"])]
    assert sidecar["--http-port"] == [str(server["httpPort"])]
    assert sidecar["--chunk-size"] == [str(server["chunkSize"])]
    assert sidecar["--eviction-policy"] == [spec["eviction"]["policy"]]
    assert sidecar["--l2-prefetch-policy"] == [l2["prefetchPolicy"]]
    for same in extra:
        assert sidecar[same] == extra[same]
    assert spec["image"]["tag"] == f"v{CHECKED['lmcache']}"


def test_the_connector_finds_the_operators_service() -> None:
    """The operator names the Service that leads to the server of one's own node as the LMCacheEngine."""
    documents_ = sample("lmcache-operator")
    (transfer,) = engine_options("lmcache-operator")["--kv-transfer-config"]
    assert json.loads(transfer)["kv_connector_extra_config"]["lmcache.mp.host"] == (
        f"tcp://{named(documents_, 'LMCacheEngine')['metadata']['name']}"
    )
    assert "lmcache.ai/lmcache-inject" not in json.dumps(documents_)  # the webhook would replace our connector


@pytest.mark.parametrize("folder", FOLDERS)
def test_both_sides_of_cuda_ipc_have_one_shared_memory(folder: str) -> None:
    if folder == "production-stack":
        (pod,) = stack_values()["servingEngineSpec"]["modelSpec"]
        mounts, volumes = [pod["extraVolumeMounts"]], pod["extraVolumes"]
        assert "tensorParallelSize" not in pod["vllmConfig"]  # the chart would mount a volume of its own
    else:
        deployment = named(sample(folder), "Deployment")
        mounts, volumes = [c["volumeMounts"] for c in containers(deployment)], pod_of(deployment)["volumes"]
    shared = {mount["name"] for of in mounts for mount in of if mount["mountPath"] == "/dev/shm"}
    (volume,) = [v for v in volumes if v["name"] in shared]
    assert all(any(m["mountPath"] == "/dev/shm" for m in of) for of in mounts)
    if folder == "engine":
        assert volume["emptyDir"]["medium"] == "Memory"
    else:  # the server is in a pod of its own
        assert volume["hostPath"]["path"] == "/dev/shm"


def test_the_sidecar_starts_before_the_engine_and_ends_after_it() -> None:
    assert container("engine", "cache")["restartPolicy"] == "Always"
    assert container("engine", "cache")["startupProbe"]["httpGet"]["path"] == "/healthcheck"


@pytest.mark.parametrize("folder", ["engine", "lmcache-operator"])
def test_an_engine_that_ends_is_given_the_time_it_may_take(folder: str) -> None:
    (within,) = engine_options(folder)["--shutdown-timeout"]
    before = container(folder, "engine")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_of(named(sample(folder), "Deployment"))["terminationGracePeriodSeconds"] >= before + int(within) + 30


# --- who reaches whom


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_selector_takes_pods(folder: str) -> None:
    selectors = [
        d["spec"]["selector"] if d["kind"] == "Service" else d["spec"]["podSelector"]["matchLabels"]
        for d in sample(folder)
        if d["kind"] in {"Service", "NetworkPolicy"}
    ]
    assert len(selectors) >= 2
    assert all(any(selects(selector, labels) for labels in pod_labels(folder)) for selector in selectors)


@pytest.mark.parametrize("folder", FOLDERS)
def test_services_are_headless_and_their_ports_are_those_in_the_readme(folder: str) -> None:
    (row,) = re.findall(rf"^\| \[{folder}\].*$", (SAMPLES / "README.md").read_text(), re.MULTILINE)
    if "the same" in row.rpartition("|")[0].rpartition("|")[2]:
        (row,) = re.findall(r"^\| \[lmcache-operator\].*$", (SAMPLES / "README.md").read_text(), re.MULTILINE)
    services = {d["metadata"]["name"]: d["spec"] for d in sample(folder) if d["kind"] == "Service"}
    assert {spec["clusterIP"] for spec in services.values()} == {"None"}
    addresses = re.findall(r"\b(\w+)\.llm\.svc:(\d+)", row)
    assert {name for name, _ in addresses} == services.keys()
    for name, port in addresses:
        assert int(port) in {p["port"] for p in services[name]["ports"]}
    for port in re.findall(r"cache_port: (\d+)", row):
        assert int(port) in {p["port"] for p in services["engines"]["ports"]}


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_gateways_and_engines_reach_what_asks_for_no_key(folder: str) -> None:
    """LMCache's port for engines is on loopback where it is in the same pod, and open to engines alone elsewhere."""
    opened: dict[int, list[dict[str, str]]] = {}
    for policy in [d["spec"] for d in sample(folder) if d["kind"] == "NetworkPolicy"]:
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
            assert peers
            opened |= {port["port"]: peers for port in rule["ports"]}
    engine = pod_labels(folder)[0]
    assert opened.pop(8000) == opened.pop(8080) == [GATEWAY]
    assert options(container("engine", "cache")["args"])["--host"] == ["127.0.0.1"]
    if folder == "engine":
        assert opened == {}
    else:
        assert selects(opened.pop(5555)[0], engine)
        assert opened == {}


# --- production-stack


def test_production_stack_has_its_router_and_its_connector_off() -> None:
    values = stack_values()
    assert values["routerSpec"] == {"enableRouter": False}
    assert values["cacheserverSpec"] == {"enabled": False}
    (spec,) = values["servingEngineSpec"]["modelSpec"]
    assert spec["lmcacheConfig"] == {"enabled": False}
    assert "LMCacheConnectorV1" not in json.dumps(values)


def test_images_and_models_are_the_same_everywhere() -> None:
    (spec,) = stack_values()["servingEngineSpec"]["modelSpec"]
    images = {c["image"] for f in FOLDERS[:2] for c in containers(named(sample(f), "Deployment"))}
    assert images == {f"context-window-gateway-engine:{__version__}"}
    assert spec["tag"] == __version__
    replaced = [i for f in FOLDERS[:2] for i in named(sample(f), "Kustomization")["images"]]
    assert {i["newName"] for i in replaced} == {spec["repository"]}
    assert {i["newTag"] for i in replaced} == {__version__}
    for same in ("--model", "--revision", "--served-model-name"):
        assert len({engine_options(folder)[same][0] for folder in FOLDERS}) == 1
