"""Values for the Helm chart: of one gateway, of a team, and with everything switched on."""

from typing import Any

_SECRETS = {"apiKey": {"name": "clients"}, "salts": {"name": "salts"}, "storeUrl": {"name": "store"}}
ONE: dict[str, Any] = {
    "replicaCount": 1,
    "secrets": {"apiKey": {"name": "clients"}},
    "settings": {"engine_urls": ["http://10.0.0.1:8000"], "cache_url": "http://10.0.0.1:8080"},
}
TEAM: dict[str, Any] = {"secrets": _SECRETS, "engines": [{"discover": "engines.llm.svc:8000", "cache_port": 8081}]}
EVERYTHING: dict[str, Any] = {
    "nameOverride": "gateway",
    "secrets": {
        **_SECRETS,
        "apiKey": {"name": "clients", "key": "other"},
        "engineApiKey": {"name": "vllm"},
        "redisUrl": {"name": "valkey", "key": "address"},
        "s3": {"name": "buckets"},
    },
    "engines": [
        {"url": "http://10.0.0.1:8000", "cache_url": "http://10.0.0.1:9000/"},
        {"discover": "engines.llm.svc:8001", "cache_discover": "caches.llm.svc:8082"},
    ],
    "settings": {
        "model_fingerprint": 'Qwen3 "8B" <å> \\ @b968826d',
        "auto_freeze_share": 0.5,
        "auto_freeze_at_shutdown": True,
        "auto_freeze_tags": ["auto", "team"],
        "disk_budget_bytes": 2_000_000_000_000,
        "shutdown_freeze_s": 30,
    },
    "env": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.observability:4318"},
    "shutdown": {"graceSeconds": 900, "preStopSeconds": 15},
    "scratch": {"sizeLimit": "20Gi"},
    "ingress": {"enabled": True, "hosts": ["llm.example"], "tls": [{"hosts": ["llm.example"], "secretName": "tls"}]},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example"]},
    "autoscaling": {"enabled": True, "turnsInFlight": 16},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "serviceAccount": {"annotations": {"role": "may-read-the-buckets"}},
    "podLabels": {"team": "llm"},
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "priorityClassName": "high",
    "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}]},
    "extraVolumes": [{"name": "kv", "persistentVolumeClaim": {"claimName": "kv"}}],
    "extraVolumeMounts": [{"name": "kv", "mountPath": "/kv"}],
}
SETS = {"one": ONE, "team": TEAM, "everything": EVERYTHING}
