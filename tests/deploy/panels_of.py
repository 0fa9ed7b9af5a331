"""The expressions that are deployed: of every panel, and of every alert."""

import json
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "5m",
    "$ttft_slo": "0.5",
    "$tpot_slo": "0.05",
    "$model": ".*",
    "$precision": ".*",
    "$instance": ".*",
}


def dashboards() -> dict[str, dict[str, Any]]:
    """Title -> dashboard."""
    found = [
        json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    ]
    return {board["title"]: board for board in found}


def panels() -> list[tuple[str, str]]:
    """(dashboard: panel, legend; its expression with Grafana's variables filled in)."""
    return [
        (f"{title}: {panel['title']}, {target['legendFormat']}", filled(target["expr"]))
        for title, board in dashboards().items()
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def alerts() -> dict[str, str]:
    """Name -> expression."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
