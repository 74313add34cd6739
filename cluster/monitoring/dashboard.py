"""The dashboard as Grafana imports it; `python -m cluster.monitoring.dashboard FILE.json` writes it."""

import json
import sys
from pathlib import Path
from typing import Any

from cluster.monitoring.panels import ROWS, Panel, Query

_WIDTH, _HEIGHT = 24, 8  # Grafana's grid has 24 columns
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# Dollars a million tokens: DeepSeek's own list for V3.2. Others can be typed into the dashboard.
_PRICES = {"price_hit": "0.028", "price_miss": "0.28", "price_answer": "0.42"}


def dashboard() -> dict[str, Any]:
    """All of it."""
    return {
        "uid": "eightfold",
        "title": "Eightfold",
        "description": "Every metric is explained in docs/metrics.md.",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _job(), *(_price(*pair) for pair in _PRICES.items())]},
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        out.append({"type": "row", "title": row.title, "collapsed": False, "gridPos": _at(0, top, _WIDTH, 1)})
        width = _WIDTH // len(row.panels)
        for column, panel in enumerate(row.panels):
            out.append(_panel(panel) | {"gridPos": _at(column * width, top + 1, width, _HEIGHT)})
        top += 1 + _HEIGHT
    return [panel | {"id": number} for number, panel in enumerate(out, start=1)]


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.question,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [_target(*pair) for pair in zip("ABCD", panel.queries, strict=False)],
    }


def _target(letter: str, query: Query) -> dict[str, Any]:
    return {
        "refId": letter,
        "datasource": _DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _job() -> dict[str, Any]:
    return {
        "name": "job",
        "label": "Cluster",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": "label_values(eightfold_ready, job)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _price(name: str, dollars: str) -> dict[str, Any]:
    label = f"$ a million tokens: {name.removeprefix('price_')}"
    chosen = {"text": dollars, "value": dollars}
    return {"name": name, "label": label, "type": "textbox", "query": dollars, "current": chosen}


def as_json() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(as_json())
