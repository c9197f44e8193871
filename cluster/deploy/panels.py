"""Panels and dashboards in Grafana's JSON.

The data source is a variable of the dashboard, so that it can be provisioned and imported alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from cluster.deploy.promql import series
from contracts.telemetry import CONSUMER_LAG

SCHEMA_VERSION: Final = 41
"""Grafana 12's; later ones bring it up to date when they load it."""
_SOURCE: Final = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
_HEIGHT: Final = 8
_SOURCE_VARIABLE: Final = {"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One panel.

    Attributes:
        title, description: for people.
        queries: (expression, legend) each.
        unit: Grafana's id of a unit.
        kind: Grafana's type of panel.
        width: of 24.
        limit: a line that should not be crossed.
        span: the time shown, where it is not the dashboard's, e.g. ``24h``.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    limit: float | None = None
    span: str = ""


def dashboard(uid: str, title: str, rows: Mapping[str, Sequence[Panel]], *variables: str) -> dict[str, Any]:
    """A dashboard in Grafana's JSON.

    Args:
        uid: as in its address.
        rows: panels under each heading, from left to right.
        variables: labels of `CONSUMER_LAG` that can be chosen from.
    """
    panels: list[dict[str, Any]] = []
    y = 0
    for name, members in rows.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": name, "collapsed": False, "panels": []})
        panels[-1]["gridPos"] = {"x": 0, "y": y, "w": 24, "h": 1}
        x, y = 0, y + 1
        for panel in members:
            if x + panel.width > 24:
                x, y = 0, y + _HEIGHT
            place = {"x": x, "y": y, "w": panel.width, "h": _HEIGHT}
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": place})
            x += panel.width
        y += _HEIGHT
    return {
        "uid": uid,
        "title": title,
        "tags": ["fi"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_SOURCE_VARIABLE, *map(_variable, variables)]},
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "title": "fi", "tags": ["fi"], "asDropdown": False, "keepTime": True}],
        "panels": panels,
    }


def _variable(name: str) -> dict[str, Any]:
    query = f"label_values({series(CONSUMER_LAG)}, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 3,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        defaults["min"] = 0
    if panel.limit is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.limit}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        if panel.kind == "timeseries":
            defaults["custom"] = {"thresholdsStyle": {"mode": "dashed"}}
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
                "range": panel.kind != "stat",
                "instant": panel.kind == "stat",
            }
            for number, (expression, legend) in enumerate(panel.queries)
        ],
    }
    if panel.kind == "heatmap":
        # The buckets come from Prometheus.
        made["options"] = {"calculate": False, "yAxis": {"unit": panel.unit}}
    if panel.span:
        made["timeFrom"] = panel.span
    return made
