"""`halftone bench` against our own front, as a user runs it: real sockets, real client processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_rig import Server, serving

from service.__main__ import run

FLAGS = ("--input-tokens", "20", "--output-tokens", "12", "--requests", "8", "--warmup", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("bench"), {"FAKE_CONTEXT": "64"}, api_key="k1") as running:
        yield running


def test_both_loops_are_measured(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    load = ("--concurrency", "1,4", "--rate", "200", "--clients", "2", "--continuous-usage")
    command = ["bench", "--url", server.url, "--api-key", "k1", *load, *FLAGS, "--json", str(out)]
    assert run(command) in (0, 4)  # 4: a latency of milliseconds differs from the server's, here by chance
    result = json.loads(out.read_bytes())
    assert result["server"]["kind"] == "halftone"
    assert result["workload"]["model"] == "tiny"
    assert result["workload"]["vocab_size"] == result["server"]["version"]["engine"]["vocab_size"]
    assert [level["label"] for level in result["levels"]] == ["1 stream", "4 streams", "200 requests/s"]
    for level in result["levels"]:
        figures = level["figures"]
        assert (figures["num_ok"], figures["num_errors"], figures["num_short"]) == (8, 0, 0)
        assert (figures["output_tokens"], figures["prompt_tokens"]) == (8 * 12, 8 * 20)
        assert figures["itl_s"]["n"] == 8 * 11
        assert figures["counted_by"] == ["server"]
        (run_of_level,) = level["runs"]
        check = run_of_level["server_check"]
        assert check["not_checked"] == {}
        for name in ("answered requests", "output tokens", "prompt tokens"):
            assert check["figures"][name]["difference"] == 0
    printed = capfd.readouterr().out
    assert "4 streams" in printed
    assert "TPOT = (E2E - TTFT) / (n - 1)" in printed


def test_one_precision_of_several_is_measured_and_told(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with serving(tmp_path / "server", {"FAKE_CONTEXT": "64"}, resident="bf16,nf4") as server:
        run(
            [
                "bench",
                "--url",
                server.url,
                "--model",
                "tiny@nf4",
                *FLAGS,
                "--concurrency",
                "1",
                "--json",
                str(out),
            ]
        )
    result = json.loads(out.read_bytes())
    assert result["server"]["version"]["engine"]["precision"] == "nf4"
    (level,) = result["levels"]
    (run_of_level,) = level["runs"]
    for name in ("answered requests", "output tokens", "prompt tokens"):
        assert run_of_level["server_check"]["figures"][name]["difference"] == 0


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (("--api-key", "other"), "refuses the key (HTTP 401)", "--api-key"),
        (("--api-key", "k1", "--input-tokens", "60"), "a request of 72 tokens is too long", "window"),
        (("--api-key", "k1", "--vocab-size", "99999"), "the first request failed: HTTP 400", "vocabulary"),
        (("--speed",), "--speed", "halftone bench --help"),
    ],
)
def test_a_refusal_is_one_line_and_its_fix(
    server: Server, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str, hint: str
) -> None:
    assert run(["bench", "--url", server.url, *FLAGS, *flags]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert hint in said


def test_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["bench", "--help"])
    assert caught.value.code == 0
    assert "usage: halftone bench" in capsys.readouterr().out
