"""Dashboard and alerts: valid, and every metric and label in their expressions exists."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import promql_parser as promql
import pytest
import yaml

from gateway.errors import CODES
from gateway.records import Outcome
from gateway.sessions.misses import Reason
from gateway.telemetry.metrics import METRICS
from tests.support.gateway_process import ROOT

DEPLOY = ROOT / "deploy"
BY_PROMETHEUS = {"up", "ALERTS"}
TARGET_LABELS = {"instance", "job", "le"}
_VARIABLES = {"$__rate_interval": "5m", "$__range": "3h", "$instance": ".*"}
_SUFFIX = re.compile(r"_(total|bucket|sum|count)\Z")


def alerts() -> list[dict[str, Any]]:
    """Every rule of every group."""
    file = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    return [rule for group in file["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    content = json.loads((DEPLOY / "grafana/context-window-gateway.json").read_text())
    assert isinstance(content, dict)
    return content


def expressions() -> dict[str, str]:
    """Every expression by its alert or panel, Grafana's variables filled in."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in alerts()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for name, value in _VARIABLES.items():
                text = text.replace(name, value)
            found[f"panel {panel['title']} {target['refId']}"] = text
    return found


EXPRESSIONS = expressions()


def selectors(expression: str) -> list[Any]:
    """The selectors of an expression; it has to be PromQL."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)

    promql.walk(promql.parse(expression), visit)
    return found


def grouped_by(expression: str) -> Iterator[str]:
    """The labels that its aggregations keep."""
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        yield from (label.strip() for label in labels.split(","))


def series() -> dict[str, set[str]]:
    """The labels of every series that the gateway exports."""
    return {
        name: set(metric.labels) | TARGET_LABELS
        for metric in METRICS
        for name in (
            [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
            if metric.kind == "histogram"
            else [metric.name]
        )
    }


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_metric_and_label_of_an_expression_exists(where: str) -> None:
    used = selectors(EXPRESSIONS[where])
    assert used
    ours = {s.name for s in used if not s.name.startswith("vllm:")} - BY_PROMETHEUS
    assert ours <= series().keys()
    known = TARGET_LABELS.union(*(series()[name] for name in ours))
    assert {matcher.name for s in used for matcher in s.matchers.matchers} <= known
    assert set(grouped_by(EXPRESSIONS[where])) <= known


def test_the_outcomes_and_results_that_alerts_select_are_ones_that_exist() -> None:
    possible = {
        "outcome": set(get_args(Outcome)),
        "reason": set(get_args(Reason)),
        "result": {"ok", "failed", "cancelled", "dropped", *CODES},
    }
    for expression in EXPRESSIONS.values():
        for selector in selectors(expression):
            for matcher in selector.matchers.matchers:
                if matcher.name in possible:
                    assert set(matcher.value.split("|")) <= possible[matcher.name]


@pytest.mark.local
def test_every_metric_of_vllm_exists() -> None:
    used = {s.name for expression in EXPRESSIONS.values() for s in selectors(expression) if ":" in s.name}
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()
    ours = (ROOT / "gateway/stack/connector.py").read_text()
    defined = set(re.findall(r'"(vllm:\w+)"', source + ours))
    assert used
    assert {_SUFFIX.sub("", name) for name in used} <= defined


def test_every_alert_says_for_how_long_how_bad_and_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
        if "for" in rule:
            promql.parse_duration(rule["for"])
        assert "for" in rule or "increase(" in rule["expr"]  # an increase over minutes needs no second delay


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    used = {_SUFFIX.sub("", s.name) for expression in EXPRESSIONS.values() for s in selectors(expression)}
    unused = {metric.name for metric in METRICS if _SUFFIX.sub("", metric.name) not in used}
    assert unused == set()


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_prometheus_is_told_to_read_the_alerts_and_to_send_the_key() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert "authorization" in jobs["context-window-gateway"]
    assert 'up{job="context-window-gateway"}' in EXPRESSIONS["alert GatewayDown"]
