"""What a bench can be asked for besides streams and rates: traces, service levels, the server's account."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_server import event, full_answer, run_against, sse, usage_of

SMALL = ("--output-tokens", "5", "--input-tokens", "4", "--clients", "1")


class Counting:
    """A server that counts what it answers, times `factor`, and shows it where `about` is asked."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.asked: list[dict[str, Any]] = []
        self.tokens = 0

    def reply(self, request: dict[str, Any]) -> bytes:
        self.asked.append(request)
        self.tokens += request["max_tokens"]
        return full_answer(request)

    def metrics(self) -> str:
        return (
            f'vllm:request_success_total{{model_name="m",finished_reason="length"}} {len(self.asked)}\n'
            f'vllm:generation_tokens_total{{model_name="m"}} {self.factor * self.tokens}\n'
        )


def test_a_server_that_counts_the_same_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Counting()
    flags = ["--concurrency", "2", "--rate", "500", "--requests", "4", "--warmup", "2", "--repeats", "2"]
    status, result = run_against(
        server.reply, tmp_path / "o", *flags, *SMALL, "--label", "theirs", about={"/metrics": server.metrics}
    )
    assert status == 0
    assert (result["label"], result["server"]["kind"]) == ("theirs", "vllm")
    checks = [run["server_check"] for level in result["levels"] for run in level["runs"]]
    assert [check["agrees"] for check in checks] == [True] * 4
    # a closed loop's warm-up is over before; an open loop's is a part of the run
    assert [check["figures"]["answered requests"]["server"] for check in checks] == [4, 4, 6, 6]
    assert checks[0]["not_checked"]["sum of TTFT, s"] == "the server does not count it"
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "the server's own counts, less the clients': answered requests +0.0 %, output tokens +0.0 %" in said
    )


def test_two_accounts_that_differ_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, expected in (((), 4), (("--no-check",), 0)):
        server = Counting(factor=1.06)
        status, result = run_against(
            server.reply,
            tmp_path / "o",
            *("--concurrency", "1", "--requests", "4", *SMALL, *flags),
            about={"/metrics": server.metrics},
        )
        assert status == expected
        said = " ".join(capsys.readouterr().out.split())
        warned = "output tokens: 20 by the clients, 21.2 by the server (+5.7 %)" in said
        assert warned == (expected == 4)
    assert result["levels"][0]["runs"][0]["server_check"]["not_checked"] == {"everything": "not asked for"}


def test_metrics_may_be_elsewhere(tmp_path: Path) -> None:
    server = Counting()
    about = {"/metrics": (404, None), "/inside/numbers": server.metrics}
    flags = ["--concurrency", "1", "--requests", "2", *SMALL]
    _, result = run_against(server.reply, tmp_path / "o", *flags, about=about)
    assert result["server"]["kind"] == ""
    _, result = run_against(
        server.reply,
        tmp_path / "o",
        *flags,
        "--metrics-url",
        "http://127.0.0.1:{port}/inside/numbers",
        about=about,
    )
    assert result["levels"][0]["runs"][0]["server_check"]["agrees"] is True


def test_a_service_level_gives_goodput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--concurrency", "1", "--requests", "4", "--repeats", "2", *SMALL]
    for slo, share in (("e2e=100s", 1.0), ("ttft=0.000001ms,itl=9s", 0.0)):
        status, result = run_against(full_answer, tmp_path / "o", *flags, "--slo", slo)
        assert status == 0
        level = result["levels"][0]
        good = level["figures"]["goodput"]
        assert good["good_share"] == share
        assert good["requests_per_s"]["median"] == pytest.approx(
            share * level["figures"]["requests_per_s"]["median"]
        )
        assert [run["summary"]["goodput"]["num_good"] for run in level["runs"]] == [4 * share] * 2
    said = " ".join(capsys.readouterr().out.split())
    assert "requests that met ttft=1e-06ms,itl=9000ms" in said
    assert "TTFT 8" in said


def traced(folder: Path, *requests: tuple[float, int, int]) -> str:
    lines = [
        json.dumps({"timestamp": at_ms, "input_length": size, "output_length": length})
        for at_ms, size, length in requests
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_a_trace_is_replayed_with_its_lengths_and_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Counting()
    trace = traced(tmp_path, (1000, 3, 2), (1100, 9, 4), (1300, 5, 1), (1400, 4096, 5))
    status, result = run_against(
        server.reply,
        tmp_path / "o",
        "--trace",
        trace,
        "--trace-speed",
        "10",
        "--clients",
        "2",
        "--warmup",
        "1",
    )
    assert status == 0
    (level,) = result["levels"]
    (run,) = level["runs"]
    assert [record["scheduled_s"] for record in run["requests"]] == pytest.approx([0, 0.01, 0.03])
    assert [record["asked_tokens"] for record in run["requests"]] == [2, 4, 1]
    assert [len(request["prompt"]) for request in server.asked[1:]] == [3, 9, 5]
    assert level["figures"]["output_tokens"] == 5
    assert level["figures"]["num_short"] == 0
    assert result["workload"]["trace"]["num_too_long"] == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of the trace's 4 requests are longer than the model's window" in said


def test_what_a_trace_shares_is_no_reason_to_doubt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reuse of its beginnings is what the trace asks for; elsewhere it is a prompt that came before."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 4, "output_length": 5, "hash_ids": [1]}\n' * 2)

    def cached(request: dict[str, Any]) -> bytes:
        return sse(event("a", finish="length"), {"choices": [], "usage": usage_of(5, prompt=4, cached=3)})

    flags = ["--trace", str(path), "--warmup", "0"]
    assert run_against(cached, tmp_path / "o", *flags)[0] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "begin alike as in the trace; 75 % of the prompts' tokens came from" in said
    assert "another `--seed`" not in said


@pytest.mark.parametrize(
    ("request_ms", "flags", "message"),
    [
        ((0, 9000, 2), (), "no request of `--trace` fits the window of `m`, 4096 tokens"),
        ((0, 9, 2), ("--requests", "2"), "2 requests and 0 of warm-up before them are asked for"),
        ((0, 9, 2), ("--endpoint", "chat"), "`--endpoint chat` takes texts, and `--trace` has lengths alone"),
    ],
)
def test_a_trace_that_cannot_be_replayed_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request_ms: tuple[float, int, int],
    flags: tuple[str, ...],
    message: str,
) -> None:
    trace = traced(tmp_path, request_ms)
    assert run_against(full_answer, tmp_path / "o", "--trace", trace, *flags) == (2, {})
    assert message in capsys.readouterr().err


def test_prompts_of_ones_own_as_ids_with_lengths(tmp_path: Path) -> None:
    server = Counting()
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": [7, 8], "output_tokens": 2}\n')
    flags = ["--concurrency", "1", "--requests", "2", *SMALL, "--prompts", str(path)]
    status, _ = run_against(server.reply, tmp_path / "o", *flags)
    assert status == 0
    assert {(tuple(request["prompt"]), request["max_tokens"]) for request in server.asked} == {((7, 8), 2)}
    assert run_against(server.reply, tmp_path / "x", *flags, "--endpoint", "chat") == (2, {})


def test_our_own_prompts_by_name_and_no_more_than_are_asked(tmp_path: Path) -> None:
    server = Counting()
    flags = ["--concurrency", "1", "--requests", "3", "--warmup", "0", "--repeats", "2", *SMALL]
    status, result = run_against(server.reply, tmp_path / "o", *flags, "--prompts", "builtin", "--seed", "1")
    assert status == 0
    assert result["workload"]["prompts"].endswith("prompts.jsonl")
    texts = {request["prompt"].partition(" ")[2] for request in server.asked}
    assert len(texts) == 3  # every run asks the same ones
