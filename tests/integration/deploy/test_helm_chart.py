"""The Helm chart: rendered by Helm itself, valid for Kubernetes, and meant for the gateway that is in this tree."""

import json
import re
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from gateway import __version__
from gateway.api.admin.routes import OPERATIONS
from gateway.settings import Settings, load
from tests.support.gateway_process import ROOT
from tests.support.helm_values import EVERYTHING, ONE, SETS, TEAM
from tests.support.kubernetes import NEWEST, OLDEST, Document, documents, named, pod_of, secrets, selects, validate

CHART = ROOT / "deploy/helm/context-window-gateway"
SECRET_VALUES = {
    "CWG_API_KEY": "a-key",
    "CWG_STORE_URL": "postgresql://cwg:word@postgres:5432/cwg",
    "CWG_KV_REDIS_URL": "redis://valkey:6379",
}


def render(values: dict[str, Any]) -> list[Document]:
    """Every document of the chart, as `helm install cwg --namespace llm` would apply it."""
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="cwg", namespace="llm")
    return [found for file, text in rendered.items() if not file.endswith(".txt") for found in documents(text)]


@pytest.fixture(params=SETS, scope="module")
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETS[request.param]


@pytest.fixture(scope="module")
def rendered(values: dict[str, Any]) -> list[Document]:
    return render(values)


@pytest.fixture(scope="module")
def deployment(rendered: list[Document]) -> Document:
    return named(rendered, "Deployment")


@pytest.fixture(scope="module")
def container(deployment: Document) -> Document:
    (found,) = pod_of(deployment)["containers"]
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def settings(rendered: list[Document], container: Document, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """What `cwg serve` reads in the pod: the image's environment, the container's and gateway.toml."""
    file = tmp_path_factory.mktemp("config") / "gateway.toml"
    file.write_text(named(rendered, "ConfigMap")["data"]["gateway.toml"])
    given = {v["name"]: v["value"] if "value" in v else SECRET_VALUES.get(v["name"], "x") for v in container["env"]}
    return load(file=file, environment=image_environment() | given)


def image_environment() -> dict[str, str]:
    """The settings that the image itself makes."""
    target = (ROOT / "Dockerfile").read_text().rpartition(" AS gateway\n")[2]
    return dict(re.findall(r"\b(CWG_\w+)=(\S+)", target))


# --- valid


def test_helm_finds_nothing_to_complain_of(values: dict[str, Any]) -> None:
    report = helm.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert {m["error"] for m in report["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_takes_every_document(rendered: list[Document], version: str) -> None:
    assert rendered
    for document in rendered:
        validate(document, version)


def test_names_are_unique_and_labels_are_the_charts(rendered: list[Document]) -> None:
    names = [(d["kind"], d["metadata"]["name"]) for d in rendered]
    assert len(set(names)) == len(names)
    assert {d["metadata"]["labels"]["app.kubernetes.io/instance"] for d in rendered} == {"cwg"}


def test_version_is_the_gateways() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == about["version"] == __version__
    assert about["kubeVersion"] == f">={OLDEST}.0-0"


@pytest.mark.parametrize(
    ("extra", "named_in_error"),
    [
        ({"replicas": 3}, "replicas"),
        ({"image": {"name": "x"}}, "name"),
        ({"secrets": {"apiKey": {"value": "s3cret"}}}, "value"),
        ({"secrets": {"storeUrl": {"name": "postgresql://cwg:word@postgres/cwg"}}}, "storeUrl/name"),
        ({"engines": [{"discover": "engines:8000", "cache_ports": 8080}]}, "cache_ports"),
        ({"engines": [{"url": "http://user:word@engine:8000"}]}, "engines/0"),
        ({"settings": {"api key": "s3cret"}}, "api key"),
        ({"replicaCount": 0}, "replicaCount"),
        ({"replicaCount": "2"}, "replicaCount"),
        ({"networkPolicy": {"from": [{}]}}, "networkPolicy/from/0"),
        ({"shutdown": {"preStopSeconds": 0}}, "preStopSeconds"),
    ],
)
def test_unknown_and_wrong_values_are_refused(extra: dict[str, Any], named_in_error: str) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmValuesError, match=re.escape(named_in_error)):
        chart.validate_schema({**TEAM, **extra})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"secrets": {"storeUrl": {"name": ""}}}, "replicaCount is 2, but secrets.storeUrl.name is empty"),
        (
            {"replicaCount": 1, "autoscaling": {"enabled": True}, "secrets": {"storeUrl": {"name": ""}}},
            "autoscaling.maxReplicas is 6, but secrets.storeUrl.name is empty",
        ),
        ({"secrets": {"apiKey": {"name": ""}}}, "secrets.apiKey.name is empty"),
        ({"secrets": {"salts": {"name": ""}}}, "secrets.salts.name is empty"),
        ({"engines": []}, "there is no engine"),
        ({"settings": {"engine_urls": ["http://a:8000"]}}, "engines and settings.engine_urls are both set"),
        ({"settings": {"cache_url": "http://a:8080"}}, "engines and settings.cache_url are both set"),
        ({"settings": {"api_key": "s3cret"}}, "settings.api_key is set by the chart: use secrets.apiKey"),
        ({"settings": {"port": 80}}, "settings.port is set by the chart: use service.port"),
        (
            {"settings": {"shutdown_grace_s": 1}},
            "settings.shutdown_grace_s is set by the chart: use shutdown.graceSeconds",
        ),
        ({"env": {"CWG_API_KEY": "s3cret"}}, "env.CWG_API_KEY is a setting"),
        ({"autoscaling": {"enabled": True, "minReplicas": 7}}, "autoscaling.minReplicas is 7"),
        ({"ingress": {"enabled": True}}, "ingress.hosts is empty"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty"),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_remedy(changed: dict[str, Any], says: str) -> None:
    names = {**TEAM["secrets"], **changed.get("secrets", {})}
    with pytest.raises(helm.HelmRenderError, match=re.escape(says)):
        render({**TEAM, **changed, "secrets": names})


# --- the settings


def test_the_gateway_takes_its_settings(values: dict[str, Any], settings: Settings) -> None:
    for name, given in values.get("settings", {}).items():
        found = getattr(settings, name)
        assert found == (tuple(given) if isinstance(given, list) else given), name
    assert [e.model_dump(exclude_defaults=True) for e in settings.engines] == values.get("engines", [])
    assert settings.shutdown_grace_s == values.get("shutdown", {}).get("graceSeconds", 300)


def test_every_variable_of_the_gateway_is_a_setting() -> None:
    variables = set(re.findall(r"\bCWG_(\w+)", "".join(f.read_text() for f in CHART.rglob("*") if f.is_file())))
    assert variables
    assert {name.lower() for name in variables} <= Settings.model_fields.keys()


def test_every_secret_setting_is_refused_in_the_config_map() -> None:
    hidden = {name for name, field in Settings.model_fields.items() if not field.repr}
    assert hidden
    for name in hidden:
        with pytest.raises(helm.HelmRenderError, match=f"settings.{name} is set by the chart"):
            render({**TEAM, "settings": {name: "x"}})


def test_a_new_setting_restarts_the_pods() -> None:
    def checksum(values: dict[str, Any]) -> str:
        annotations = named(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    assert checksum(TEAM) == checksum(TEAM)
    assert checksum(TEAM) != checksum({**TEAM, "settings": {"log_level": "debug"}})


def test_no_secret_is_in_the_release_and_every_reference_is_a_value(
    values: dict[str, Any], rendered: list[Document]
) -> None:
    with helm.Chart.load(CHART) as chart:
        merged = chart.merge_values(values)["secrets"]
    used = [(given.pop("name"), given) for given in merged.values() if given["name"]]
    expected = {(name, key) for name, keys in used for key in keys.values()}
    assert secrets(rendered) == expected
    assert not [d for d in rendered if d["kind"] == "Secret"]


def test_settings_and_salts_are_where_the_gateway_looks(
    deployment: Document, container: Document, settings: Settings
) -> None:
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod_of(deployment)["volumes"]}
    assert container["args"] == ["serve", "--config", f"{mounts['config']}/gateway.toml"]
    assert str(settings.data_path) == mounts["data"]
    if "salts" in volumes:
        (item,) = volumes["salts"]["secret"]["items"]
        assert str(settings.secret_path) == f"{mounts['salts']}/{item['path']}"
        assert volumes["salts"]["secret"]["defaultMode"] == 0o440
    else:
        assert settings.secret_path.parent == settings.data_path
        assert volumes["data"].keys() == {"name", "persistentVolumeClaim"}


# --- life and death of a pod


def test_probes_ask_what_exists_and_leave_time_to_start(container: Document, settings: Settings) -> None:
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": settings.port}
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")}
    asked = {kind: probe["httpGet"] for kind, probe in probes.items()}
    assert asked == {
        "startup": {"path": "/healthz", "port": "http"},
        "liveness": {"path": "/healthz", "port": "http"},  # not /readyz: a dead engine is no reason to restart
        "readiness": {"path": "/readyz", "port": "http"},
    }
    assert {probe["path"] for probe in asked.values()} <= {o.path for o in OPERATIONS if o.probe}
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 300


def test_a_pod_that_ends_is_given_the_time_it_may_take(
    deployment: Document, container: Document, settings: Settings
) -> None:
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= 5
    needed = before + settings.shutdown_grace_s + settings.shutdown_freeze_s
    assert needed + 10 <= pod_of(deployment)["terminationGracePeriodSeconds"] <= needed + 60


def test_updates_keep_gateways_serving_where_there_are_several(
    values: dict[str, Any], rendered: list[Document], deployment: Document
) -> None:
    kinds = {d["kind"] for d in rendered}
    strategy = deployment["spec"]["strategy"]
    if values is ONE:
        assert strategy == {"type": "Recreate"}
        assert "PersistentVolumeClaim" in kinds
        assert "PodDisruptionBudget" not in kinds
        assert named(rendered, "PersistentVolumeClaim")["metadata"]["annotations"] == {
            "helm.sh/resource-policy": "keep"
        }
    else:
        assert strategy == {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        assert "PersistentVolumeClaim" not in kinds
        assert named(rendered, "PodDisruptionBudget")["spec"]["minAvailable"] == 1


def test_a_single_gateway_does_not_block_the_draining_of_its_node() -> None:
    down_to_one = {**TEAM, "autoscaling": {"enabled": True, "minReplicas": 1}}
    assert "PodDisruptionBudget" not in {d["kind"] for d in render(down_to_one)}


def test_replicas_are_the_autoscalers_where_there_is_one(rendered: list[Document], deployment: Document) -> None:
    scalers = [d["spec"] for d in rendered if d["kind"] == "HorizontalPodAutoscaler"]
    assert ("replicas" in deployment["spec"]) == (not scalers)
    for spec in scalers:
        assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        by = {m["type"]: m for m in spec["metrics"]}
        assert by["Pods"]["pods"]["metric"]["name"] == "cwg_turns_in_flight"
        assert "cpu" in pod_of(deployment)["containers"][0]["resources"]["requests"]  # utilisation is a share of it


def test_the_pod_may_do_as_little_as_the_image_needs(deployment: Document, container: Document) -> None:
    pod = pod_of(deployment)
    (user,) = set(re.findall(r"^USER (\d+):\1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {pod["securityContext"][who] for who in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
    assert written - {"/kv"} == {"/data", "/tmp"}


# --- who reaches whom


def test_every_selector_takes_the_gateways_pods(rendered: list[Document], deployment: Document) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], named(rendered, "Service")["spec"]["selector"]]
    selectors += [named(rendered, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    selectors += [d["spec"]["selector"]["matchLabels"] for d in rendered if d["kind"] == "PodDisruptionBudget"]
    selectors += [c["labelSelector"]["matchLabels"] for c in pod_of(deployment)["topologySpreadConstraints"]]
    assert len(selectors) >= 5
    assert all(selects(selector, labels) for selector in selectors)


def test_the_network_policy_opens_the_ports_in_use_and_no_other(
    values: dict[str, Any], rendered: list[Document], settings: Settings
) -> None:
    policy = named(rendered, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"protocol": "TCP", "port": "http"}]]
    opened = {p["port"] for rule in policy["egress"] for p in rule["ports"] if p["protocol"] == "TCP"}
    addresses = [x for e in settings.nodes for x in (e.url, e.cache_url, e.discover, e.cache_discover) if x]
    used = {int(re.findall(r":(\d+)/?$", address)[0]) for address in addresses}
    used |= {e.cache_port for e in settings.nodes if e.cache_port}
    given = {name for name, secret in values["secrets"].items() if secret["name"]}
    used |= {5432} if "storeUrl" in given else set()
    used |= {6379} if "redisUrl" in given else set()
    used |= {4318} if "env" in values else set()
    assert opened == used | {53}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [({}, 443), ({"s3_endpoint": "http://minio.s3:9000"}, 9000), ({"s3_endpoint": "http://s"}, 80)],
)
def test_an_s3_tier_opens_the_way_to_it(endpoint: dict[str, str], port: int) -> None:
    settings = {"s3_bucket": "kv", "s3_pins_bucket": "pins", **endpoint}
    egress = named(render({**TEAM, "settings": settings}), "NetworkPolicy")["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": port}]} in egress


def test_the_ways_in_lead_to_the_service_and_do_not_buffer() -> None:
    rendered = render(EVERYTHING)
    service = named(rendered, "Service")
    (port,) = service["spec"]["ports"]
    (container,) = pod_of(named(rendered, "Deployment"))["containers"]
    assert port["targetPort"] in {p["name"] for p in container["ports"]}
    (rule,) = named(rendered, "Ingress")["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    (rule,) = named(rendered, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": port["port"]}]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    prefix = "nginx.ingress.kubernetes.io/proxy-"
    told = named(rendered, "Ingress")["metadata"]["annotations"]
    assert told[f"{prefix}buffering"] == told[f"{prefix}request-buffering"] == "off"
    assert told[f"{prefix}body-size"] == "0"
    silent_s = Settings.model_fields["engine_timeout_s"].default
    assert min(int(told[f"{prefix}read-timeout"]), int(told[f"{prefix}send-timeout"])) > silent_s


# --- Prometheus


def test_alerts_are_those_of_the_repository(tmp_path: Path) -> None:
    """The chart has a link to them, in whose place a packaged chart has the file."""
    ours = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    assert named(render(EVERYTHING), "PrometheusRule")["spec"] == ours
    with tarfile.open(helm.package(CHART, destination=tmp_path)) as packaged:
        (file,) = [member for member in packaged.getmembers() if member.name.endswith("files/alerts.yaml")]
        assert file.isfile()


def test_prometheus_scrapes_under_the_job_that_alerts_name() -> None:
    rendered = render(EVERYTHING)
    spec = named(rendered, "ServiceMonitor")["spec"]
    service = named(rendered, "Service")
    (endpoint,) = spec["endpoints"]
    labels = service["metadata"]["labels"]
    assert selects(spec["selector"]["matchLabels"], labels)
    assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    alerts = json.dumps(yaml.safe_load((CHART / "files/alerts.yaml").read_text()))
    (job,) = set(re.findall(r'job=\\"([\w-]+)', alerts))
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job}]


# --- the texts


def test_the_readmes_example_renders_and_its_commands_make_the_secrets() -> None:
    text = (CHART / "README.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    made = set(re.findall(r"create secret generic (\S+) --from-literal=([\w-]+)=", text))
    rendered = render(yaml.safe_load(example))
    assert secrets(rendered) == made
    assert tomllib.loads(named(rendered, "ConfigMap")["data"]["gateway.toml"])["engines"]


def test_the_notes_say_where_clients_connect() -> None:
    with helm.Chart.load(CHART) as chart:
        notes = {
            name: chart.render(values, name="cwg", namespace="llm")[f"{chart.name}/templates/NOTES.txt"]
            for name, values in SETS.items()
        }
    assert "http://cwg-context-window-gateway.llm.svc:8700/v1" in notes["team"]
    assert "https://llm.example/v1" in notes["everything"]
    assert "over SQLite" in notes["one"]
    assert "helm uninstall" in notes["one"]
