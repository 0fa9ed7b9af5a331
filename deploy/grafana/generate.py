"""Writes the dashboards. `python deploy/grafana/generate.py`, then commit; a test fails when they differ.

Every expression is written once here, split by `precision`, so that two modes are two lines of one panel.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
SELECTED = 'model=~"$model", precision=~"$precision"'
WIDTH = 24  # columns of a Grafana row


def quantile(share: float, histogram: str) -> str:
    buckets = f"rate(halftone_{histogram}_bucket{{{SELECTED}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, precision) ({buckets}))"


def rate(counter: str, more: str = "", by: str = "precision") -> str:
    labels = f"{SELECTED}, {more}" if more else SELECTED
    return f"sum by ({by}) (rate(halftone_{counter}{{{labels}}}[$__rate_interval]))"


def gauge(name: str, more: str = "", by: str = "precision") -> str:
    labels = f"{SELECTED}, {more}" if more else SELECTED
    return f"sum by ({by}) (halftone_{name}{{{labels}}})"


def panel(
    title: str, unit: str, queries: dict[str, str], *, width: int = 8, height: int = 8,
    kind: str = "timeseries", help: str = "", stacked: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`queries`: legend -> expression; a legend may use {{label}}."""
    custom = {"drawStyle": "line", "lineWidth": 2, "fillOpacity": 60 if stacked else 0, "showPoints": "auto",
              "spanNulls": 30000, "stacking": {"mode": "normal" if stacked else "none"}}  # fmt: skip
    result: dict[str, Any] = {
        "type": kind,
        "title": title,
        "description": help,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": [
            {"refId": chr(65 + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend,
             "instant": kind != "timeseries", "range": kind == "timeseries"}
            for i, (legend, expr) in enumerate(queries.items())
        ],
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }  # fmt: skip
    if kind == "timeseries":
        result["fieldConfig"]["defaults"]["custom"] = custom
    else:
        result["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal",
                             "displayMode": "basic", "textMode": "value_and_name"}  # fmt: skip
    return result


def row(title: str) -> dict[str, Any]:
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": WIDTH, "h": 1}}


def by_reason(counter: str, label: str) -> dict[str, str]:
    expression = f"sum by (precision, {label}) (rate(halftone_{counter}{{{SELECTED}}}[$__rate_interval]))"
    return {f"{{{{precision}}}} {{{{{label}}}}}": expression}


def both(histogram: str) -> dict[str, str]:
    return {"p50 {{precision}}": quantile(0.5, histogram), "p95 {{precision}}": quantile(0.95, histogram)}


def precision_side_by_side() -> list[dict[str, Any]]:
    computed = rate("tokens_total", 'kind="prompt"')
    cached = rate("tokens_total", 'kind="cached"')
    return [
        row("Speed"),
        panel("Time to first token", "s", both("time_to_first_token_seconds")),
        panel("Inter-token latency", "s", both("inter_token_latency_seconds")),
        panel(
            "Time per output token",
            "s",
            both("time_per_output_token_seconds"),
            help="Mean of a request after its first token.",
        ),
        panel(
            "Generated tokens per second",
            "short",
            {"{{precision}}": rate("tokens_total", 'kind="generated"')},
        ),
        panel(
            "Prompt tokens per second",
            "short",
            {"computed {{precision}}": computed, "cached {{precision}}": cached},
        ),
        panel("Engine step", "s", both("step_seconds"), help="One forward pass with sampling."),
        panel(
            "Time in the queue",
            "s",
            both("queue_seconds"),
            help="From arrival at the engine to the first step.",
        ),
        panel(
            "Time in prefill", "s", both("prefill_seconds"), help="From the first step to the first token."
        ),
        panel("Time in decode", "s", both("decode_seconds"), help="From the first token to the end."),
        row("Memory"),
        panel(
            "Memory by part",
            "bytes",
            {"{{precision}} {{part}}": gauge("memory_bytes", by="precision, part")},
            width=12,
            stacked=True,
        ),
        panel(
            "Weights",
            "bytes",
            {"{{precision}}": gauge("memory_bytes", 'part=~"weights.*"')},
            width=6,
            kind="bargauge",
        ),
        panel(
            "Peak by phase",
            "bytes",
            {"{{precision}} {{phase}}": gauge("memory_peak_bytes", by="precision, phase")},
            width=6,
            kind="bargauge",
        ),
        row("Load"),
        panel(
            "Requests running and waiting",
            "short",
            {
                "running {{precision}}": gauge("requests_running"),
                "waiting {{precision}}": gauge("requests_waiting"),
            },
        ),
        panel("KV cache in use", "percentunit", {"{{precision}}": gauge("kv_cache_usage_ratio")}),
        panel("Batch size", "short", both("batch_size")),
        panel("Requests ended by reason", "reqps", by_reason("requests_total", "finish_reason")),
        panel("Requests refused by reason", "reqps", by_reason("requests_rejected_total", "reason")),
        panel("Preemptions", "ops", {"{{precision}}": rate("preemptions_total")}),
        panel(
            "Activations in 16 bits, by layer class (int8)",
            "percentunit",
            {
                "{{precision}} {{layer}}": f"{rate('int8_outliers_total', by='precision, layer')} / "
                f"{rate('int8_activations_total', by='precision, layer')}"
            },
        ),
        row("Engine"),
        panel("Ready", "short", {"{{precision}}": gauge("engine_up")}, width=6, kind="stat"),
        panel("Restarts", "short", {"{{precision}}": gauge("engine_restarts_total")}, width=6, kind="stat"),
        panel(
            "Seconds to load, by stage",
            "s",
            {"{{precision}} {{stage}}": gauge("model_load_seconds", by="precision, stage")},
            width=12,
            kind="bargauge",
        ),
    ]


def place(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
        "refresh": 2, "includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def dashboard(uid: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                variable("model", "label_values(halftone_build_info, model)"),
                variable("precision", 'label_values(halftone_build_info{model=~"$model"}, precision)'),
            ]
        },
        "panels": place(panels),
    }


def render() -> dict[str, str]:
    """File name -> content."""
    boards = {
        "precision.json": dashboard("halftone-precision", "Precision side by side", precision_side_by_side())
    }
    return {name: json.dumps(board, indent=1) + "\n" for name, board in boards.items()}


if __name__ == "__main__":
    for name, content in render().items():
        (HERE / "dashboards" / name).write_text(content)
