"""The command from flags to tables: good servers, plain ones, and every way to be refused."""

import asyncio
import math
import socket
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ABOUT, VOCAB_SIZE, WINDOW, event, full_answer, refusal, run_against, sse, usage_of

from loadtest import bench
from loadtest.__main__ import main, make_parser, parse_options
from loadtest.bench import FORMAT, Level
from loadtest.fleet import Fleet
from loadtest.prompts import DEFAULT_PROMPTS
from loadtest.statistics import FORMULAS

SMALL = ("--output-tokens", "5", "--input-tokens", "4", "--clients", "1")
TEXTS = ("--prompts", str(DEFAULT_PROMPTS))


def test_levels_and_repeats_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict[str, Any]] = []

    def reply(request: dict[str, Any]) -> bytes:
        asked.append(request)
        return full_answer(request)

    flags = ["--concurrency", "1,3", "--rate", "2000", "--requests", "6", "--warmup", "2", "--repeats", "2"]
    status, result = run_against(reply, tmp_path / "out.json", *flags, *SMALL[:4], "--clients", "2")
    assert status == 0
    assert result["format"] == FORMAT
    assert [level["label"] for level in result["levels"]] == ["1 stream", "3 streams", "2000 requests/s"]
    assert [level["num_clients"] for level in result["levels"]] == [1, 2, 2]
    for level in result["levels"]:
        figures = level["figures"]
        assert (figures["num_ok"], figures["num_errors"], figures["output_tokens"]) == (12, 0, 60)
        assert figures["counted_by"] == ["usage"]
        assert figures["itl_s"]["p99.9"] >= figures["itl_s"]["p50"]
        rates = figures["output_tokens_per_s"]
        assert rates["min"] <= rates["median"] <= rates["max"]
        for run in level["runs"]:
            assert sum(not record["warmup"] for record in run["requests"]) == 6
            assert min(record["scheduled_s"] for record in run["requests"]) == 0
            assert run["client"]["cpu_share"] > 0
    closed, opened = result["levels"][1], result["levels"][2]
    assert [len(run["requests"]) for run in closed["runs"]] == [8, 6]  # warmed up once
    assert [len(run["requests"]) for run in opened["runs"]] == [8, 8]  # under load each time
    assert opened["figures"]["all_busy_tokens_per_s"] is None
    prompts = [tuple(request["prompt"]) for request in asked]
    assert len(prompts) == 1 + (2 + 12) * 2 + 16
    assert len(set(prompts)) == len(prompts)  # no request is answered out of another's prefix cache
    assert {len(prompt) for prompt in prompts} == {4}
    assert max(map(max, prompts)) < VOCAB_SIZE
    assert all(request["ignore_eos"] and request["temperature"] == 0 for request in asked)
    assert result["server"]["version"] == ABOUT["/version"][1]
    assert result["machine"]["usable_cores"] >= 1
    printed = capsys.readouterr()
    for formula in FORMULAS.values():
        assert formula in printed.out
    assert "version 9" in printed.out
    assert "3 streams" in printed.out
    assert " after due (p99)" in " ".join(printed.out.split())
    assert printed.err.count("run 2 of 2") == 3


def test_nothing_is_asked_before_the_runs_of_a_server_that_is_known(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def reply(request: dict[str, Any]) -> bytes:
        asked.append(request)
        return full_answer(request)

    flags = ["--concurrency", "2", "--requests", "4", "--warmup", "1", "--no-first-answer"]
    status, result = run_against(reply, tmp_path / "out.json", *flags, *SMALL)
    assert status == 0
    assert len(asked) == 5
    assert result["first_answer"] is None
    assert result["levels"][0]["figures"]["num_ok"] == 4


def test_texts_go_to_either_endpoint_with_the_key(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def reply(request: dict[str, Any]) -> bytes:
        asked.append(request)
        return full_answer(request)

    flags = ["--concurrency", "1", "--requests", "2", "--warmup", "0", *SMALL, *TEXTS, "--seed", "5"]
    for endpoint in ("chat", "completions"):
        status, result = run_against(
            reply, tmp_path / "o", *flags, "--endpoint", endpoint, "--api-key", "s3cret", "--continuous-usage"
        )
        assert status == 0
        assert result["levels"][0]["figures"]["counted_by"] == ["server"]
        assert "s3cret" not in (tmp_path / "o").read_text()
    assert {request["path"] for request in asked} == {"/v1/chat/completions", "/v1/completions"}
    assert {request["authorization"] for request in asked} == {"bearer s3cret"}
    assert asked[1]["messages"][0]["content"].startswith("(5-0) ")


def test_a_plain_server_is_measured_and_what_it_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that knows OpenAI's own fields only, tells nothing of itself, and ends its answers early."""

    def reply(request: dict[str, Any]) -> bytes:
        for field in ("ignore_eos", "stream_options"):
            if field in request:
                return refusal(400, f"unknown field {field}")
        return sse(event("a"), event("b", finish="stop"))

    nothing = {"/ready": (404, None), "/version": (404, None)}
    flags = ["--concurrency", "1", "--requests", "2", *SMALL, "--vocab-size", "9"]
    status, _ = run_against(reply, tmp_path / "o", *flags, "--ignore-eos", about=nothing)
    assert status == 2
    assert "hint: `--no-ignore-eos`" in capsys.readouterr().err
    status, result = run_against(reply, tmp_path / "o", *flags, about=nothing)
    assert status == 0
    assert result["levels"][0]["figures"]["num_short"] == 2
    assert result["server"]["version"] is None
    assert result["server"]["lacks"] == ["ignore_eos", "stream_options"]
    assert result["levels"][0]["runs"][0]["server_check"]["agrees"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert "2 answers are shorter than what was asked for" in said
    assert "sends no usage" in said
    assert "does not take `ignore_eos`, `stream_options`" in said
    assert "not checked against the server: everything (`/metrics` says HTTP 404)" in said


def test_errors_are_counted_shown_and_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def sometimes(request: dict[str, Any]) -> bytes:
        seen.append(request)
        if len(seen) in (4, 6):
            return refusal(503, "the engine is gone")
        return full_answer(request)[:-40] if len(seen) == 5 else full_answer(request)

    flags = ["--concurrency", "1", "--requests", "5", "--warmup", "1", *SMALL]
    status, result = run_against(sometimes, tmp_path / "out.json", *flags)
    assert status == 3
    figures = result["levels"][0]["figures"]
    assert figures["num_errors"] == 3
    assert figures["errors"]["HTTP 503: the engine is gone"] == 2
    assert any("middle of the answer" in error for error in figures["errors"])
    assert "2 x HTTP 503: the engine is gone" in capsys.readouterr().out


def test_a_server_that_dies_ends_the_bench_with_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def dying(request: dict[str, Any]) -> bytes:
        seen.append(request)
        return full_answer(request) if len(seen) <= 3 else b""

    flags = ["--concurrency", "1,2,3", "--requests", "2", "--warmup", "0", *SMALL]
    status, result = run_against(dying, tmp_path / "o", *flags)
    assert status == 3
    assert [level["figures"]["num_ok"] for level in result["levels"]] == [2, 0]
    assert "the levels after it are left out" in capsys.readouterr().err


def test_a_prefix_cache_is_not_taken_for_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cached(request: dict[str, Any]) -> bytes:
        return sse(event("a", finish="length"), {"choices": [], "usage": usage_of(5, prompt=4, cached=3)})

    run_against(cached, tmp_path / "o", "--concurrency", "1", "--requests", "2", *SMALL)
    assert "75 % of the prompts' tokens" in capsys.readouterr().out


NO_TOKENIZER = {"/version": (200, {"version": "0.24"})}


@pytest.mark.parametrize(
    ("about", "flags", "message", "hint"),
    [
        ({}, ("--model", "x"), "`--model` x is not served there; it has m", ""),
        ({"/v1/models": (401, {})}, (), "refuses the key (HTTP 401)", "`--api-key KEY`"),
        ({"/v1/models": (404, {})}, (), "/v1/models` lists no model (HTTP 404)", "root of a server"),
        ({"/v1/models": (200, [1])}, (), "/v1/models` lists no model (HTTP 200)", "root of a server"),
        ({"/ready": (503, None)}, (), "is not ready: HTTP 503", "`/ready` says 200"),
        ({"/ready": (503, {"state": "down", "loading": None})}, (), "is not ready: down", "`/ready`"),
        (
            {"/ready": (503, {"loading": {"stage": "load", "done": 3, "total": 9, "unit": "layers"}})},
            (),
            "is not ready: load, 3 of 9 layers",
            "`/ready`",
        ),
        (NO_TOKENIZER, (), "the size of its vocabulary", "`--vocab-size N`"),
        ({}, ("--input-tokens", f"{WINDOW}"), f"of {WINDOW + 5} tokens is too long", "`--input-tokens`"),
        (
            NO_TOKENIZER | {"/v1/models": (200, {"data": [{"id": "m", "max_model_len": 8}]})},
            ("--vocab-size", "9"),
            "of 9 tokens is too long: the window of `m` is 8",
            "`--input-tokens`",
        ),
    ],
)
def test_a_server_that_cannot_be_measured_is_one_line_and_its_fix(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    about: dict[str, Any],
    flags: tuple[str, ...],
    message: str,
    hint: str,
) -> None:
    status, result = run_against(full_answer, tmp_path / "o", *SMALL, *flags, about=about)
    assert (status, result) == (2, {})
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert hint in said
    assert said.count("\n") <= 2


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (401, "no such key", "`--api-key KEY`"),
        (400, "the prompt has 4 tokens, the window 3", "window"),
        (400, "unknown continuous_usage_stats", "`--continuous-usage`"),
    ],
)
def test_the_first_request_tells_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, message: str, hint: str
) -> None:
    assert run_against(lambda _: refusal(status, message), tmp_path / "o", *SMALL)[0] == 2
    said = capsys.readouterr().err
    assert f"the first request failed: HTTP {status}: {message}" in said
    assert hint in said


def test_an_answer_that_ends_at_once_is_no_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that passes over `ignore_eos` without a word."""
    assert run_against(lambda _: sse(event(finish="stop")), tmp_path / "o", *SMALL) == (2, {})
    said = capsys.readouterr().err
    assert "the first request failed: no token came" in said
    assert "`--endpoint chat`" in said


def test_nobody_at_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["--url", url]) == 2
    said = capsys.readouterr().err
    assert f"`{url}` does not answer" in said
    assert "halftone serve" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0"], "less than 1"),
        (["--concurrency", "1,x"], "`x` is not a number"),
        (["--rate", "0"], "not a positive number"),
        (["--rate", "nan"], "not a positive number"),
        (["--clients", "some"], "`some` is not a number"),
        (["--speed"], "--speed"),
        (["--endpoint", "chat"], "takes texts"),
        (["--records"], "`--json`"),
        (["--json", "/nowhere/at/all.json"], "no such folder"),
        (["--prompts", "/nowhere.jsonl"], "`--prompts` cannot be used"),
        (["--trace", "/nowhere.jsonl"], "`--trace` cannot be used"),
        (["--trace", "t", "--rate", "2"], "`--trace` is a load of its own"),
        (["--trace-speed", "2"], "`--trace-speed` is of a trace"),
        (["--arrivals", "constant"], "`--arrivals` is of an open loop"),
        (["--slo", "ttft=soon"], "`--slo` ttft=soon"),
        (["--metrics-url", "http://x:1/metrics", "--no-check"], "is for the check"),
    ],
)
def test_a_wrong_flag_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_defaults_of_a_level() -> None:
    def levels(*flags: str) -> list[Level]:
        return list(parse_options(make_parser("halftone bench").parse_args(flags)).levels)

    assert levels() == [Level("closed", concurrency=1), Level("closed", concurrency=16)]
    assert levels("--rate", "2,0.5") == [Level("poisson", rate_per_s=2), Level("poisson", rate_per_s=0.5)]
    assert levels("--rate", "2", "--arrivals", "constant") == [Level("constant", rate_per_s=2)]
    assert levels("--trace", "t") == []


def test_two_benches_ask_different_things() -> None:
    """The second would be answered from the prefix cache that the first one filled."""
    seeds = {parse_options(make_parser("x").parse_args([])).seed for _ in range(4)}
    assert len(seeds) > 1
    assert parse_options(make_parser("x").parse_args(["--seed", "7"])).seed == 7


def test_a_client_process_that_dies_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleets: list[Fleet] = []

    class Watched(Fleet):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            fleets.append(self)

    def deadly(request: dict[str, Any]) -> bytes:
        if fleets:
            fleets[0]._processes[0].kill()
        return full_answer(request)

    monkeypatch.setattr(bench, "Fleet", Watched)
    assert run_against(deadly, tmp_path / "o", "--concurrency", "1", *SMALL) == (2, {})
    assert "a client process ended by itself, with exit code -9" in capsys.readouterr().err


def test_processes_end_with_the_bench() -> None:
    async def start_and_leave() -> list[asyncio.subprocess.Process]:
        async with Fleet(2) as fleet:
            processes = fleet._processes
            assert all(process.returncode is None for process in processes)
        return processes

    assert all(process.returncode is not None for process in asyncio.run(start_and_leave()))


def test_machine_says_where_the_clients_ran() -> None:
    said = bench.machine()
    assert said["python"].startswith("3.")
    assert math.isfinite(said["load_average_1min"])
