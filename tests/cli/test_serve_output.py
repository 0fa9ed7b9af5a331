"""What `serve` prints is true, and the line it ends with works as pasted."""

import asyncio
import io
import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
from rich.console import Console
from tiny_tokenizers import write_checkpoint

from service.api.app import create_app
from service.cli.display import Display, amount, show_loading
from service.cli.serve import curl_line, ready_lines
from service.config import load_settings
from service.front.engine_client import EngineClient
from service.front.host import Host, run_loop
from service.messages import Loading
from service.metrics import Metrics

FAKE_ENGINE = (sys.executable, str(Path(__file__).parents[1] / "fake_engine.py"))


@pytest.mark.parametrize("key", ["", "secret"])
def test_the_printed_line_gets_a_streamed_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    write_checkpoint(tmp_path, "byte_level")
    monkeypatch.setenv("FAKE_VOCAB", "300")
    settings = load_settings(model=str(tmp_path), served_model_name="it's demo", port=0, api_key=key)

    async def ask() -> tuple[str, httpx2.Response]:
        async with Host(settings, tmp_path, create_app, command=FAKE_ENGINE) as host:
            lines = ready_lines(host, await host.ready())
            words = shlex.split(lines.splitlines()[-1])
            headers = [
                word.replace("$HALFTONE_API_KEY", key).split(": ", 1)
                for flag, word in pairwise(words)
                if flag == "-H"
            ]
            async with httpx2.AsyncClient(trust_env=False) as client:
                return lines, await client.post(words[2], content=words[-1], headers=dict(headers))

    lines, response = run_loop(ask())
    assert response.status_code == 200, response.text
    events = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["model"] == "it's demo"
    for word in ("http://127.0.0.1:", "it's demo", "weights", "KV cache", "precision"):
        assert word in lines
    assert "secret" not in lines


def test_a_server_of_several_precisions_says_what_each_holds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "byte_level")
    settings = load_settings(model=str(tmp_path), port=0, served_model_name="tiny", resident="bf16,nf4")

    async def told() -> str:
        async with Host(settings, tmp_path, create_app, command=FAKE_ENGINE) as host:
            return ready_lines(host, await host.ready())

    lines = run_loop(told()).splitlines()
    for precision in ("bf16", "nf4"):
        at = lines.index(f"  name       tiny@{precision}")
        assert lines[at + 1].startswith(f"  precision  {precision} on cpu")
        assert lines[at + 3].startswith("  KV cache   1.5 GB, 65,536 tokens in bf16")


@pytest.mark.parametrize(
    ("given", "is_open"),
    [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "secret"}, False), ({}, False)],
)
def test_a_server_that_is_open_to_others_says_so(
    tmp_path: Path, given: dict[str, str], is_open: bool
) -> None:
    write_checkpoint(tmp_path, "byte_level")
    settings = load_settings(model=str(tmp_path), port=0, **given)

    async def told() -> str:
        async with Host(settings, tmp_path, create_app, command=FAKE_ENGINE) as host:
            return ready_lines(host, await host.ready())

    assert ("everyone who can reach `0.0.0.0`" in run_loop(told())) == is_open


def test_a_base_model_is_asked_to_complete() -> None:
    words = shlex.split(curl_line("http://h:1", "m", has_chat=False, has_key=False))
    assert words[:3] == ["curl", "-N", "http://h:1/v1/completions"]
    assert json.loads(words[-1])["prompt"]


def shown(terminal: bool) -> str:
    screen = io.StringIO()
    with Display(Console(file=screen, force_terminal=terminal, width=100)) as display:
        display("download", 0, 93_000_000, "bytes")
        display("download", 93_000_000, 93_000_000, "bytes")
        display("load", 30, 30, "layers")
    return screen.getvalue()


def test_stages_are_lines_where_there_is_no_terminal() -> None:
    printed = shown(terminal=False)
    assert "\n\n" not in printed
    lines = printed.splitlines()
    assert lines[0] == "Downloading (93 MB) ..."
    assert lines[1].startswith("Downloading: 93 MB, ")
    assert lines[3].startswith("Loading: 30 layers, ")
    assert "\x1b" not in "".join(lines)


def test_stages_are_bars_on_a_terminal() -> None:
    assert "0 MB of 93 MB" in shown(terminal=True)


def test_a_stage_that_fails_is_not_told_as_done() -> None:
    screen = io.StringIO()
    display = Display(Console(file=screen))
    display("convert", 1, 30, "tensors")
    display.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "30 tensors" not in screen.getvalue()


def test_amounts() -> None:
    assert amount(3, 30, "layers") == "3 of 30 layers"
    assert amount(1_500_000_000, 2_000_000_000, "bytes") == "1.5 GB of 2.0 GB"


def test_what_the_engine_says_while_loading_is_shown() -> None:
    client = EngineClient(1, Metrics("demo", "awq"))
    client.loading = Loading("quantize", 3, 30, "layers")
    screen = io.StringIO()

    async def show() -> None:
        with Display(Console(file=screen)) as display:
            showing = asyncio.create_task(show_loading([client], display))
            await asyncio.sleep(0)
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)

    run_loop(show())
    assert screen.getvalue().startswith("Quantizing ...")
