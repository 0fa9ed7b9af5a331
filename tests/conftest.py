"""Settings of the whole suite: one thread, no network, no settings of the person who runs it."""

import os
from pathlib import Path

import pytest

from service.config import load_settings
from service.model.demo import ensure_demo

# none of the imports above loads torch, which reads these once: its threads spin against each other
os.environ.update({"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1"})
for name in [name for name in os.environ if name.startswith("HALFTONE_") and name != "HALFTONE_CACHE_DIR"]:
    del os.environ[name]
os.environ["HALFTONE_CONFIG"] = os.devnull


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Figures that tests tell with `record_property("figure", ...)`: they are to be read, not bounded."""
    figures = [
        str(text)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, text in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
    for line in figures:
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo checkpoint's folder, fetched on a machine's first run: tests that use it are marked `demo`."""
    return ensure_demo(load_settings().cache_dir, lambda *_: None)
