"""What is deployed is checked with the real tools: hadolint, Compose, a PromQL parser."""

import json
import os
import re
import runpy
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

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
VARIABLE = {"$__rate_interval": "1m", "$model": ".*", "$precision": ".*"}
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=DEPLOY, env={**os.environ, **environment}, timeout=60
    )


def compose(*arguments: str, **environment: str) -> dict[str, Any]:
    result = run(str(BIN / "docker-compose"), *arguments, "config", "--format", "json", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def expressions() -> list[tuple[str, str]]:
    """(panel title, expression with Grafana's variables filled in) of every dashboard."""
    found = []
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                text = target["expr"]
                for name, value in VARIABLE.items():
                    text = text.replace(name, value)
                found.append((panel["title"], text))
    return found


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
    render = runpy.run_path(str(DEPLOY / "grafana" / "generate.py"))["render"]
    for name, content in render().items():
        assert (DEPLOY / "grafana" / "dashboards" / name).read_text() == content, (
            "run deploy/grafana/generate.py"
        )


@pytest.mark.parametrize(("title", "expression"), expressions(), ids=lambda text: text[:40])
def test_panel_is_valid_and_its_metrics_are_ours(title: str, expression: str) -> None:
    promql_parser.parse(expression)
    labels = {
        family.name + suffix: {*family.labels, "le"}
        for family in catalogue()
        for suffix in SUFFIXES[family.type]
    }
    names = re.findall(r"halftone_[a-z0-9_]+", expression)
    assert names, title
    for name in names:
        assert name in labels, f"{title}: `{name}` is not exported"
        used = re.findall(r'([a-z_]+)=~?"', expression)
        used += [part.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for part in by.split(",")]
        assert set(used) <= labels[name], f"{title}: {set(used) - labels[name]} are not labels of `{name}`"


def test_prometheus_scrapes_every_service_of_ours() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    scraped = config["scrape_configs"][0]["dns_sd_configs"][0]
    services = compose("-f", "compose.yaml", "--profile", "*")["services"]
    ours = {name for name, service in services.items() if service["image"].startswith("halftone")}
    assert set(scraped["names"]) == ours
    for name in ours:
        assert services[name]["environment"]["HALFTONE_METRICS_PORT"] == str(scraped["port"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_configuration_passes_promtool() -> None:
    result = run("promtool", "check", "config", str(DEPLOY / "prometheus.yml"))
    assert result.returncode == 0, result.stdout + result.stderr
