"""Every figure and label that deploy/ asks Prometheus for is one that the server has, and the dashboard shows each."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.engine.serve.client import Client, settings, with_server
from tests.models import REPOSITORY

_DEPLOY = REPOSITORY / "deploy"
_OF_PROMETHEUS = {"job", "instance", "le", "__name__"}
_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",), "gauge": ("",)}
_SELECTOR = re.compile(r"(pipeload_\w+)\{([^}]*)\}")


def _shown() -> list[str]:
    """The expressions of all panels."""
    dashboard = json.loads((_DEPLOY / "grafana.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def _queries() -> list[str]:
    """All expressions of PromQL in deploy/."""
    dashboard = json.loads((_DEPLOY / "grafana.json").read_text())
    found = _shown()
    found += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return found + re.findall(r"^ *query: (.*)$", (_DEPLOY / "keda.yaml").read_text(), re.M)


def test_queries_name_figures_and_labels_of_the_server(chat_model: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    async def ask(client: Client) -> str:
        made = await client.post("/v1/completions", {"model": "chat", "prompt": "the cat", "max_tokens": 4})
        assert made.status == 200, made.body
        return (await client.get("/metrics")).body.decode()

    names: set[str] = set()
    labels: dict[str, set[str]] = {}
    # `serve` itself leaves out when each figure began.
    families = [
        family
        for family in text_string_to_metric_families(with_server(settings(chat_model), ask))
        if not family.name.endswith("_created")
    ]
    shown = {name for query in _shown() for name in re.findall(r"\bpipeload_\w+", query)}
    for family in families:
        own = {family.name + suffix for suffix in _SUFFIXES[family.type]}
        assert own & shown, f"No panel shows {family.name}."
    for family in families:
        for suffix in _SUFFIXES[family.type]:
            names.add(name := family.name + suffix)
            if family.samples:
                labels[name] = {label for sample in family.samples for label in sample.labels}
    for query in _queries():
        assert set(re.findall(r"\bpipeload_\w+", query)) <= names, query
        for name, selector in _SELECTOR.findall(query):
            # A figure of sweeps that read has no sample here.
            known = labels.get(name, {"model"}) | _OF_PROMETHEUS
            assert {part.split("=")[0].strip("~! ") for part in selector.split(",")} <= known, query
            for grouped in re.findall(r"\bby \(([^)]*)\)", query):
                assert {label.strip() for label in grouped.split(",")} <= known, query


def test_panels_lie_beside_each_other() -> None:
    panels = json.loads((_DEPLOY / "grafana.json").read_text())["panels"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        cells |= taken
    assert len({panel["id"] for panel in panels}) == len(panels)
