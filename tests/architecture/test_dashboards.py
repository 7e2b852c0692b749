"""Dashboards and alert rules ask for metrics and labels that endpoints tell, and code names none that is not listed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lmray.metrics.names import METRICS, SERVE
from lmray.serve.metrics import Metrics
from lmray.serve.replica_metrics import READ
from tests.architecture.source import ROOT, docstrings, name_of, python_files, tree_of

BOARD = json.loads((ROOT / "dashboards" / "serve.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "dashboards" / "alerts.yaml").read_text(encoding="utf-8"))
NAME = re.compile(r"\blmray_serve_\w+")
ELSEWHERE = {"replica", "version", "measure", "evaluation", "target", "le"}
"""Labels of metrics that the gateway does not count itself."""
LABELS_OF = {"model", "key", "path", "status", "filter", "on", "kind", "action", *ELSEWHERE}
HISTOGRAM = ("_bucket", "_sum", "_count")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Everything that is asked of Prometheus."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    asked += [one["query"]["query"] for one in BOARD["templating"]["list"] if one["type"] == "query"]
    return asked + [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]


def labels_of(expression: str) -> set[str]:
    """Labels that are matched, grouped by, or listed."""
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = [one for group in re.findall(r"\bby \(([^)]*)\)", expression) for one in re.split(r",\s*", group)]
    return {*matched, *grouped, *re.findall(r"label_values\(\w+, (\w+)\)", expression)}


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_exists(expression):
    names = set(NAME.findall(expression))
    assert names
    for name in names:
        plain = next((name.removesuffix(end) for end in HISTOGRAM if name.endswith(end)), name)
        assert plain in SERVE, f"{name} is not in lmray/metrics/names.py"
        assert (plain != name) == (SERVE[plain].unit == "s"), f"{name}: histograms are told as buckets, sum and count"
        asks_change = any(one in expression for one in ("rate(", "increase(", "label_values("))
        assert asks_change or not name.endswith("_total"), f"{name}: a counter, of which only the change says something"
    assert labels_of(expression) <= LABELS_OF
    assert all(expression.count(one) == expression.count(other) for one, other in ("()", "{}", "[]"))


def test_every_metric_is_shown_somewhere():
    asked = "\n".join(expressions())
    assert [name for name in SERVE if name not in asked] == []


def test_the_board_is_one_that_grafana_can_load():
    assert {"title", "uid", "panels", "templating", "schemaVersion", "time"} <= set(BOARD)
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFG"[: len(panel["targets"])])
    variables = set(re.findall(r"\$(\w+)|\$\{(\w+)\}", json.dumps(BOARD)))
    known = {one["name"] for one in BOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    assert {one or other for one, other in variables} <= known


def test_every_rule_says_what_is_wrong():
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = labels_of(rule["expr"])
        assert "by (" not in rule["expr"] or used <= grouped


def told(tree: ast.Module) -> Iterator[str]:
    """Names of an endpoint's metrics in code."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield from NAME.findall(node.value)


def test_code_tells_exactly_the_metrics_of_the_list():
    files = [path for path in python_files("lmray") if name_of(path) != "lmray/metrics/names.py"]
    found = {name for path in files for name in told(tree_of(path))}
    assert found == set(SERVE)
    assert set(READ) < found and not set(SERVE) & set(METRICS)


def test_every_metric_of_an_endpoint_says_what_it_is():
    for name, metric in SERVE.items():
        assert NAME.fullmatch(name) and metric.help.endswith(".") and metric.better in ("", "min", "max"), name


def test_labels_are_those_that_metrics_have():
    labels = {label for one in vars(Metrics()).values() for label in getattr(one, "_labelnames", ())}
    assert labels | ELSEWHERE == LABELS_OF


def test_the_rule_sees_a_label_and_a_metric_that_are_not_there():
    expression = 'sum by (modell) (rate(lmray_serve_request_total{stat="200"}[5m]))'
    assert labels_of(expression) == {"modell", "stat"}
    assert [name for name in NAME.findall(expression) if name not in SERVE] == ["lmray_serve_request_total"]
