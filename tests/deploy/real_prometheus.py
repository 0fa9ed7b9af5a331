"""Prometheus itself, with our rules, over servers of a test."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest

T = TypeVar("T")
DEADLINE_S = 60
POLL_S = 0.05
SCRAPE_S = 0.5
INSTALL = "`apt-get install prometheus` (Debian, Ubuntu) brings prometheus and promtool"

Labels = dict[str, str]


def program(name: str) -> str:
    """Its path. Where it is missing the test is skipped, but not in CI, which installs it."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"`{name}` is not installed: {INSTALL}")
    if found is None:
        pytest.skip(f"`{name}` is not installed: {INSTALL}")
    return found


@dataclass
class Prometheus:
    http: httpx2.Client

    def query(self, expression: str) -> list[tuple[Labels, float]]:
        """-> (labels, number) of each series, now."""
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        assert answer["data"]["resultType"] == "vector", expression
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Each alerting rule as it was last evaluated."""
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def until(self, found: Callable[["Prometheus"], T]) -> T:
        """What `found` finds, once it is true."""
        end = time.monotonic() + DEADLINE_S
        while not (result := found(self)):
            assert time.monotonic() < end, "Prometheus has not seen it in time"
            time.sleep(POLL_S)  # there is nothing to wait on: scrapes come by the clock
        return result


@contextlib.contextmanager
def scraping(folder: Path, targets: list[str], rules: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes these host:port every SCRAPE_S, ready and with each of them seen once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S * 1e3:.0f}ms", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "halftone", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    log = folder / "prometheus.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx2.Client(base_url=f"http://{address}", timeout=30) as http:
            prometheus = Prometheus(http)

            def is_up(server: Prometheus) -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx2.TransportError):
                    if http.get("/-/ready").status_code == 200:
                        return len(server.query("up == 1")) == len(targets)
                return False

            prometheus.until(is_up)
            yield prometheus
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
