"""What is deployed is checked with the real tools: hadolint, Compose, a PromQL parser, promtool."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from service import __version__
from service.cli.serve import check_calibration
from service.config import Settings, load_settings
from service.metrics import catalogue
from tests.deploy.panels_of import ALERTS, alerts, dashboards, panels
from tests.deploy.real_prometheus import program

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=DEPLOY, env={**os.environ, **environment}, timeout=60
    )


def compose(*arguments: str, **environment: str) -> dict[str, Any]:
    result = run(str(BIN / "docker-compose"), *arguments, "config", "--format", "json", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_dockerfile_passes_hadolint() -> None:
    result = run(str(BIN / "hadolint"), str(ROOT / "Dockerfile"))
    assert result.returncode == 0, result.stdout


def test_torchs_index_stands_beside_pypi() -> None:
    """Alone it lacks versions that constraints.txt pins, so the CPU image could not be built."""
    options = re.findall(r"--(?:extra-)?index-url", (ROOT / "Dockerfile").read_text())
    assert options == ["--extra-index-url"]


def test_compose_reserves_a_gpu_and_the_cpu_overlay_does_not() -> None:
    files = ("-f", "compose.yaml")
    with_gpu = compose(*files, "--profile", "*")["services"]
    assert set(with_gpu) == {"server", "compare", "pair-a", "pair-b", "prometheus", "grafana"}
    for name in ("server", "compare", "pair-a", "pair-b"):
        devices = with_gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["driver"] == "nvidia"
        assert devices[0]["capabilities"] == ["gpu"]
    without = compose(*files, "-f", "compose.cpu.yaml", "--profile", "*")["services"]
    for name in ("server", "compare", "pair-a", "pair-b"):
        assert not without[name]["deploy"]["resources"]["reservations"].get("devices")


def test_default_profile_is_one_server_with_its_dashboards() -> None:
    services = compose("-f", "compose.yaml")["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    published = [port["host_ip"] for service in services.values() for port in service["ports"]]
    assert set(published) == {"127.0.0.1"}
    assert services["server"]["image"] == f"halftone:{__version__}"


def test_every_variable_of_compose_is_in_the_example_and_every_setting_exists() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    example = (DEPLOY / ".env.example").read_text()
    documented = set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
    used = set(re.findall(r"\$\{([A-Z_]+)", text)) - {"TORCH_INDEX"}
    assert used == documented
    settings = {f"HALFTONE_{name.upper()}" for name in Settings.model_fields}
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name in re.findall(r"HALFTONE_[A-Z_]+", text + example + dockerfile):
        assert name in settings, name


def test_a_pair_of_servers_starts_whatever_one_server_is_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.env` reaches every container whole, and a precision that is not calibrated refuses a text."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.")
    shutil.copy(DEPLOY / "compose.yaml", tmp_path)
    example = (DEPLOY / ".env.example").read_text()
    lines = re.sub(r"^((?:HALFTONE|PAIR_B)_CALIBRATION=)$", rf"\1{text}", example, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(lines)
    services = compose("--project-directory", str(tmp_path), "-f", str(tmp_path / "compose.yaml"),
                       "--profile", "*")["services"]  # fmt: skip
    for name, calibration in (("server", str(text)), ("pair-a", ""), ("pair-b", str(text))):
        for variable, setting in services[name]["environment"].items():
            monkeypatch.setenv(variable, setting)
        settings = load_settings()
        assert settings.calibration == calibration
        if name != "server":
            check_calibration(settings.calibration, [settings.precision])


def test_dashboards_are_what_the_generator_writes() -> None:
    result = run(sys.executable, str(DEPLOY / "grafana" / "generate.py"), "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_boards_have_the_form_that_grafana_reads() -> None:
    """What a wrong one shows as an empty page: ids once, panels side by side without overlap, known kinds."""
    kinds = {"row", "timeseries", "stat", "bargauge", "heatmap", "table", "xychart"}
    for title, board in dashboards().items():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids)), title
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            assert panel["type"] in kinds
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells
            for target in panel.get("targets", ()):
                assert target["datasource"]["uid"] == "${datasource}"
        used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(board["panels"]))) - {
            "__rate_interval",
            "__range",
        }
        assert used <= {variable["name"] for variable in board["templating"]["list"]}


def test_tables_name_the_columns_that_they_show() -> None:
    """Grafana names the value of query A `Value #A` until it is renamed."""
    for board in dashboards().values():
        for panel in board["panels"]:
            for change in panel.get("transformations", ()):
                for name in change["options"].get("renameByName", {}):
                    queries = {f"Value #{target['refId']}" for target in panel["targets"]}
                    assert name in queries | {"model", "precision"}
                if panel["type"] == "table" and change["id"] == "organize":
                    columns = change["options"]["indexByName"]
                    assert list(columns.values()) == list(range(len(columns)))
                    assert next(iter(columns)) in ("model", "precision")  # what a row is of comes first


@pytest.mark.parametrize(("name", "expression"), [*panels(), *alerts().items()], ids=lambda text: text[:60])
def test_what_is_asked_for_is_ours(name: str, expression: str) -> None:
    promql_parser.parse(expression)
    labels = {
        family.name + suffix: {*family.labels, "instance", "le"}
        for family in catalogue()
        for suffix in SUFFIXES[family.type]
    } | {"up": {"job", "instance"}}
    names = re.findall(r"\b(halftone_[a-z0-9_]+|up)\b", expression)
    assert names, name
    for metric in names:
        assert metric in labels, f"{name}: `{metric}` is not exported"
        used = re.findall(r'([a-z_]+)[!=]=?~?"', expression)
        grouped = re.findall(r"(?:by|on) \(([^)]*)\)", expression)
        used += [part.strip() for group in grouped for part in group.split(",")]
        known = set().union(*(labels[other] for other in names if other in labels))
        assert set(used) <= known, f"{name}: {set(used) - known} are not labels of `{metric}`"


def test_alerts_say_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 6
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


def test_alerts_pass_their_unit_tests() -> None:
    """Each fires for a server that is bad in its way, and not for its neighbour."""
    tested = yaml.safe_load((ALERTS.parent / "alerts.test.yml").read_text())["tests"]
    expected = {
        re.search(r'alertname="(\w+)"', sample["labels"])[1]  # type: ignore[index]
        for test in tested
        for question in test["promql_expr_test"]
        for sample in question["exp_samples"]
    }
    assert expected == set(alerts())
    result = run(program("promtool"), "test", "rules", "prometheus/alerts.test.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_scrapes_every_service_of_ours() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    scraped = config["scrape_configs"][0]["dns_sd_configs"][0]
    services = compose("-f", "compose.yaml", "--profile", "*")["services"]
    ours = {name for name, service in services.items() if service["image"].startswith("halftone")}
    assert set(scraped["names"]) == ours
    for name in ours:
        assert services[name]["environment"]["HALFTONE_METRICS_PORT"] == str(scraped["port"])


def test_prometheus_configuration_passes_promtool() -> None:
    result = run(program("promtool"), "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 rule files found" in result.stdout


def test_compose_gives_prometheus_its_rules_and_grafana_its_dashboards() -> None:
    services = compose("-f", "compose.yaml")["services"]
    mounted = {
        name: {volume["target"]: Path(volume["source"]) for volume in services[name]["volumes"]}
        for name in ("prometheus", "grafana")
    }
    rules = mounted["prometheus"]["/etc/prometheus"]
    assert (rules / "prometheus.yml").is_file()
    for name in yaml.safe_load((rules / "prometheus.yml").read_text())["rule_files"]:
        assert (rules / name).is_file()
    folder = mounted["grafana"]["/var/lib/grafana/dashboards"]
    assert {path.name for path in folder.iterdir()} == {"precision.json", "operations.json"}
    provisioned = mounted["grafana"]["/etc/grafana/provisioning"] / "dashboards" / "halftone.yaml"
    assert "/var/lib/grafana/dashboards" in provisioned.read_text()
