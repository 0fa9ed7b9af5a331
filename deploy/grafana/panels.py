"""Panels of Grafana and the PromQL in them. A query keeps `precision`, so that two modes are two series."""

from typing import Any

Panel = dict[str, Any]
Queries = dict[str, str]  # legend -> expression; a legend may use {{label}}

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = 'model=~"$model", precision=~"$precision", instance=~"$instance"'
WIDTH = 24  # columns of a row
NO_TRAFFIC = "no traffic"

# --- PromQL ------------------------------------------------------------------------------------


def labels(*more: str) -> str:
    return ", ".join((SELECTED, *more))


def gauge(name: str, *more: str, by: str = "precision", how: str = "sum") -> str:
    return f"{how} by ({by}) (halftone_{name}{{{labels(*more)}}})"


def rate(counter: str, *more: str, by: str = "precision", over: str = "$__rate_interval") -> str:
    return f"sum by ({by}) (rate(halftone_{counter}{{{labels(*more)}}}[{over}]))"


def buckets(histogram: str, by: str = "precision", over: str = "$__rate_interval") -> str:
    return rate(f"{histogram}_bucket", by=f"le, {by}", over=over)


def quantile(share: float, histogram: str, by: str = "precision", over: str = "$__rate_interval") -> str:
    return f"histogram_quantile({share}, {buckets(histogram, by, over)})"


def ratio(part: str, whole: str) -> str:
    """Nothing where there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


def share_of(parts: str, whole: str) -> str:
    """As `ratio`, of several series for each precision."""
    return f"{parts} / on (precision) group_left () ({whole} > 0)"


def mean(histogram: str, by: str = "precision", over: str = "$__rate_interval") -> str:
    return ratio(rate(f"{histogram}_sum", by=by, over=over), rate(f"{histogram}_count", by=by, over=over))


def share_below(histogram: str, bound: str) -> str:
    """Of the observations, those at or below a bound; exact, where it is one."""
    return ratio(rate(f"{histogram}_bucket", f'le="{bound}"'), rate(f"{histogram}_count"))


def quantiles(histogram: str, *shares: float, with_mean: bool = False) -> Queries:
    found = {f"{{{{precision}}}} p{share * 100:g}": quantile(share, histogram) for share in shares}
    return found | ({"{{precision}} mean": mean(histogram)} if with_mean else {})


# --- panels ------------------------------------------------------------------------------------


def panel(
    kind: str, title: str, unit: str, queries: Queries, help: str, *, width: int, height: int = 8
) -> Panel:
    return {
        "type": kind,
        "title": title,
        "description": help,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": [
            {"refId": chr(65 + place), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend,
             "instant": kind not in ("timeseries", "heatmap"), "range": kind in ("timeseries", "heatmap")}
            for place, (legend, expression) in enumerate(queries.items())
        ],
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "noValue": NO_TRAFFIC}, "overrides": []},
        "options": {},
    }  # fmt: skip


def lines(
    title: str, unit: str, queries: Queries, help: str = "", *, width: int = 8, stacked: bool = False,
    maximum: float | None = None,
) -> Panel:  # fmt: skip
    """Over time. A series that ends in p95, p99 or `mean` is drawn broken, to stand apart from its median."""
    found = panel("timeseries", title, unit, queries, help, width=width)
    defaults = found["fieldConfig"]["defaults"]
    defaults["color"] = {"mode": "palette-classic-by-name"}
    defaults["custom"] = {"drawStyle": "line", "lineWidth": 1 if stacked else 2,
                          "fillOpacity": 60 if stacked else 0, "showPoints": "auto", "spanNulls": 30000,
                          "stacking": {"group": "A", "mode": "normal" if stacked else "none"}}  # fmt: skip
    if maximum is not None:
        defaults["max"] = maximum
    broken = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}}
    found["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byRegexp", "options": "/ (p95|p99|mean|limit)$/"}, "properties": [broken]}
    ]
    found["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return found


def tile(
    title: str, unit: str, queries: Queries, help: str = "", *, width: int = 3,
    orange: float | None = None, red: float | None = None, empty: str = NO_TRAFFIC,
) -> Panel:  # fmt: skip
    """A number for each precision, coloured from `orange` and from `red` on (or below, where red is less)."""
    found = panel("stat", title, unit, queries, help, width=width, height=4)
    found["fieldConfig"]["defaults"] |= {"noValue": empty, "thresholds": thresholds(orange, red)}
    found["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal", "textMode": "value_and_name", "graphMode": "none",
        "colorMode": "none" if red is None else "value",
    }  # fmt: skip
    return found


def thresholds(orange: float | None, red: float | None) -> dict[str, Any]:
    if orange is None or red is None:
        return {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}
    steps = [("green", None), ("orange", orange), ("red", red)]
    if red < orange:
        steps = [("red", None), ("orange", red), ("green", orange)]
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


def bars(title: str, unit: str, queries: Queries, help: str = "", *, width: int = 6) -> Panel:
    found = panel("bargauge", title, unit, queries, help, width=width)
    found["fieldConfig"]["defaults"]["color"] = {"mode": "palette-classic-by-name"}
    found["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal", "displayMode": "basic", "showUnfilled": False, "namePlacement": "auto",
    }  # fmt: skip
    return found


def heatmap(title: str, histogram: str, help: str = "", *, unit: str = "s", width: int = 8) -> Panel:
    """Observations a second in each bucket: what a percentile hides."""
    found = panel("heatmap", title, unit, {"{{le}}": buckets(histogram)}, help, width=width)
    found["targets"][0]["format"] = "heatmap"
    found["options"] = {
        "calculate": False, "cellGap": 0, "filterValues": {"le": 1e-9}, "rowsFrame": {"layout": "auto"},
        "color": {"mode": "scheme", "scheme": "Blues", "scale": "exponential", "exponent": 0.5, "steps": 64},
        "yAxis": {"unit": unit, "axisPlacement": "left"}, "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": True},
    }  # fmt: skip
    return found


def table(
    title: str, columns: dict[str, tuple[str, str]], help: str = "", *, height: int = 6, by: str = "precision"
) -> Panel:
    """A row for each precision. `columns`: name -> (unit, expression by the same labels)."""
    queries = {name: expression for name, (_, expression) in columns.items()}
    found = panel("table", title, "none", queries, help, width=WIDTH, height=height)
    for target in found["targets"]:
        target["format"] = "table"
    renamed = {label: label.capitalize() for label in by.split(", ")}
    renamed |= {f"Value #{chr(65 + place)}": name for place, name in enumerate(columns)}
    found["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {
            "excludeByName": {"Time": True}, "renameByName": renamed,
            "indexByName": {name: place for place, name in enumerate(renamed)}}},
    ]  # fmt: skip
    found["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, (unit, _) in columns.items()
    ]
    found["options"] = {"showHeader": True, "cellHeight": "sm", "footer": {"show": False}}
    return found


def scatter(
    title: str, x: tuple[str, str, str], y: tuple[str, str, str], help: str = "", *, width: int = 12
) -> Panel:
    """A point for each precision. `x`, `y`: (name, unit, expression by precision)."""
    found = panel("xychart", title, "none", {x[0]: x[2], y[0]: y[2]}, help, width=width)
    for target in found["targets"]:
        target["format"] = "table"
    found["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {
            "excludeByName": {"Time": True}, "indexByName": {"Value #A": 0, "Value #B": 1, "precision": 2},
            "renameByName": {"Value #A": x[0], "Value #B": y[0]}}},
        {"id": "partitionByValues", "options": {
            "fields": ["precision"], "keepFields": False, "naming": {"asLabels": True}}},
    ]  # fmt: skip
    found["fieldConfig"]["defaults"]["custom"] = {"show": "points", "pointSize": {"fixed": 14}}
    # partitioned, a column's name goes on with its precision
    found["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byRegexp", "options": f"/^{name}/"},
            "properties": [{"id": "unit", "value": unit}],
        }
        for name, unit, _ in (x, y)
    ]
    found["options"] = {
        "mapping": "auto", "series": [],
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single"},
    }  # fmt: skip
    return found


def each_precision(found: Panel) -> Panel:
    """The same panel once for each precision that is chosen, beside one another."""
    height = found["gridPos"]["h"]
    repeated = {"repeat": "precision", "repeatDirection": "h", "maxPerRow": 4}
    return found | repeated | {
        "title": f"{found['title']}: $precision", "gridPos": {"w": WIDTH, "h": height}
    }  # fmt: skip


def row(title: str) -> Panel:
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": WIDTH, "h": 1}}


# --- a board -----------------------------------------------------------------------------------


def place(panels: list[Panel]) -> list[Panel]:
    """Left to right, top to bottom."""
    x = y = height = 0
    for number, item in enumerate(panels, start=1):
        size = item["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        item["id"] = number
        size.update(x=x, y=y)
        x, height = x + size["w"], max(height, size["h"])
    return panels


def variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "type": "query", "datasource": DATASOURCE, "query": {"query": query, "refId": name},
        "refresh": 2, "sort": 1, "includeAll": True, "multi": True, "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def choice(name: str, label: str, values: list[str], chosen: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "type": "custom", "query": ",".join(values),
        "options": [{"text": value, "value": value, "selected": value == chosen} for value in values],
        "current": {"text": chosen, "value": chosen},
    }  # fmt: skip


def dashboard(
    uid: str, title: str, help: str, panels: list[Panel], choices: list[dict[str, Any]]
) -> dict[str, Any]:
    chosen_model = 'model=~"$model"'
    return {
        "uid": uid,
        "title": title,
        "description": help,
        "tags": ["halftone"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "title": "Halftone", "tags": ["halftone"], "asDropdown": False,
                   "includeVars": True, "keepTime": True, "targetBlank": False}],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus",
                 "current": {"text": "Prometheus", "value": "prometheus"}},
                variable("model", "label_values(halftone_build_info, model)"),
                variable("precision", f"label_values(halftone_build_info{{{chosen_model}}}, precision)"),
                variable("instance", f"label_values(halftone_build_info{{{chosen_model}}}, instance)"),
                *choices,
            ]
        },
        "panels": place(panels),
    }  # fmt: skip
