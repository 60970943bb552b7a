"""Documents for Kubernetes: read, and validated as strictly as an API server would."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Document = dict[str, Any]
OLDEST, NEWEST = "1.30", "1.37"  # the oldest that the chart takes, the newest that the validator knows

_STRING = {"type": "string"}
_STRINGS = {"type": "array", "items": _STRING, "minItems": 1}
_LABELS = {"type": "object", "additionalProperties": _STRING}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def _of(required: Iterable[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": [*required], "properties": properties}


# What we use of custom resources, which no schema of Kubernetes has. The sources are the projects' own definitions.
_SPECS: dict[tuple[str, str], Any] = {
    # prometheus-operator, api.md
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _of(
        ["selector", "endpoints"],
        selector=_of(["matchLabels"], matchLabels=_LABELS),
        endpoints={
            "type": "array",
            "items": _of(
                ["port"],
                port=_STRING,
                path=_STRING,
                interval=_STRING,
                authorization=_of(["credentials"], credentials=_of(["name", "key"], name=_STRING, key=_STRING)),
                relabelings={"type": "array", "items": _of([], targetLabel=_STRING, replacement=_STRING)},
            ),
        },
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _of(
        ["groups"],
        groups={
            "type": "array",
            "items": _of(
                ["name", "rules"],
                name=_STRING,
                rules={
                    "type": "array",
                    "items": _of(
                        ["alert", "expr"],
                        **{
                            "alert": _STRING,
                            "expr": _STRING,
                            "for": _STRING,
                            "labels": _LABELS,
                            "annotations": _LABELS,
                        },
                    ),
                },
            ),
        },
    ),
    # Gateway API 1.2, standard channel
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _of(
        ["parentRefs", "rules"],
        parentRefs={"type": "array", "minItems": 1, "items": _of(["name"], name=_STRING, namespace=_STRING)},
        hostnames=_STRINGS,
        rules={
            "type": "array",
            "items": _of(
                ["backendRefs"],
                matches={
                    "type": "array",
                    "items": _of(["path"], path=_of(["type", "value"], type={"const": "PathPrefix"}, value=_STRING)),
                },
                backendRefs={"type": "array", "items": _of(["name", "port"], name=_STRING, port=_PORT)},
                timeouts=_of([], request=_STRING, backendRequest=_STRING),
            ),
        },
    ),
    # LMCache, operator/api/v1alpha1/lmcacheengine_types.go
    ("lmcache.lmcache.ai/v1alpha1", "LMCacheEngine"): _of(
        ["l1"],
        image=_of([], repository=_STRING, tag=_STRING, pullPolicy=_STRING),
        nodeSelector=_LABELS,
        server=_of([], port=_PORT, httpPort=_PORT, chunkSize={"type": "integer"}, hashAlgorithm={"const": "blake3"}),
        l1=_of(["sizeGB"], sizeGB={"type": "number", "exclusiveMinimum": 0}),
        eviction=_of([], policy={"enum": ["LRU", "noop"]}),
        l2Backend={
            "oneOf": [{"required": ["resp"]}, {"required": ["raw"]}],
            **_of(
                [],
                resp=_of(
                    ["host", "port"],
                    host=_STRING,
                    port=_PORT,
                    numWorkers={"type": "integer", "minimum": 1},
                    authSecretRef=_of(["name"], name=_STRING),
                ),
                raw=_of(["type"], type=_STRING, config={"type": "object"}),
                prefetchPolicy={"enum": ["default", "retain"]},
            ),
        },
        extraArgs=_STRINGS,
        env={"type": "array", "items": _of(["name", "value"], name=_STRING, value=_STRING)},
    ),
}
_KUSTOMIZATION = _of(
    ["apiVersion", "kind", "resources"],
    apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
    kind={"const": "Kustomization"},
    namespace=_STRING,
    resources=_STRINGS,
    images={"type": "array", "items": _of(["name"], name=_STRING, newName=_STRING, newTag=_STRING)},
)


def documents(text: str) -> list[Document]:
    """The documents of a stream of YAML, without empty ones."""
    return [found for found in yaml.safe_load_all(text) if found]


def validate(document: Document, version: str = NEWEST) -> None:
    """Raise a ValidationError of jsonschema unless Kubernetes of this version, or the custom resource, takes it."""
    if document["kind"] == "Kustomization":
        jsonschema.validate(document, _KUSTOMIZATION)
    elif (document["apiVersion"], document["kind"]) in _SPECS:
        jsonschema.validate(document, _custom(document["apiVersion"], document["kind"]))
    else:
        kubernetes_validate.validate(document, version, strict=True)


@cache
def _custom(api_version: str, kind: str) -> dict[str, Any]:
    metadata = _of(["name"], name=_STRING, namespace=_STRING, labels=_LABELS, annotations=_LABELS)
    return _of(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=metadata,
        spec=_SPECS[api_version, kind],
    )


def pod_of(document: Document) -> Document:
    """The pod's specification of a workload."""
    found = document["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


def containers(document: Document) -> Iterator[Document]:
    """The containers of a workload, sidecars first."""
    pod = pod_of(document)
    yield from pod.get("initContainers", ())
    yield from pod["containers"]


def secrets(node: Any) -> set[tuple[str, str]]:
    """Each (Secret, key) that a document refers to, by a variable, a volume or a field `credentials`."""
    found: set[tuple[str, str]] = set()
    if isinstance(node, dict):
        for reference in (node.get("secretKeyRef"), node.get("credentials")):
            if reference:
                found.add((reference["name"], reference["key"]))
        if "secretName" in node and "items" in node:
            found |= {(node["secretName"], item["key"]) for item in node["items"]}
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return found.union(*map(secrets, children))


def named(documents_: Iterable[Document], kind: str, name: str = "") -> Document:
    """The one document of a kind, and of this name if it is given."""
    (found,) = [d for d in documents_ if d["kind"] == kind and (not name or d["metadata"]["name"] == name)]
    return found


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a selector of labels takes these."""
    return selector.items() <= labels.items()
