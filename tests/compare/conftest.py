"""A model folder that the fake engine and the real front can serve, and runs of compare over it."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service.api.app import create_app
from service.compare.job import run_compare
from service.compare.modes import parse_modes, parse_server
from service.compare.options import CompareOptions, parse_levels
from service.compare.report import Report
from service.config import load_settings
from tests.tiny_tokenizers import write_bare_model

FAKE_ENGINE = (sys.executable, str(Path(__file__).resolve().parent.parent / "fake_engine.py"))

Compare = Callable[..., Report]


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_bare_model(tmp_path / "tiny-model")


@pytest.fixture
def options(tmp_path: Path) -> CompareOptions:
    """Next to nothing of everything."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return CompareOptions(
        precisions="bf16,int8",
        levels=parse_levels("1,2,40/s,50/s"),
        output_tokens=4,
        open_s=0.0,
        minutes=0.0,
        kv_tokens=1024,
        requests_per_stream=2,
        repeats=2,
        max_repeats=2,
        window_tokens=33,
        agreement_tokens=128,
        text=str(text),
    )


@pytest.fixture
def compare(
    model_path: Path, options: CompareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Compare:
    """`run_compare` against the fake engine into `tmp_path / "report"`; arguments as of run_compare, and
    `given` settings."""
    monkeypatch.setenv("FAKE_STEP_MS", "1")

    terminal = tmp_path / "terminal.txt"

    def run(
        precisions: str,
        given: dict[str, Any] | None = None,
        servers: Sequence[str] = (),
        **changes: object,
    ) -> Report:
        arguments: dict[str, object] = {
            "out": tmp_path / "report",
            "options": options,
            "app_factory": create_app,
            "console": Console(file=io.StringIO(), width=100, record=True),
            "command": FAKE_ENGINE,
        }
        settings = load_settings(model=str(model_path), cache_dir=tmp_path / "cache", **(given or {}))
        try:
            modes = [*parse_modes(precisions), *(parse_server(server) for server in servers)]
            return run_compare(settings, model_path, modes, **(arguments | changes))  # type: ignore[arg-type]
        finally:
            terminal.write_text(arguments["console"].export_text())  # type: ignore[attr-defined]

    return run
