"""`halftone plan`: a table and a sentence that people read, JSON that scripts read, and torch for neither."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.__main__ import run

ROOT = Path(__file__).parents[2]


def told(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["plan", "preset:llama-3.1-8b", *arguments]) == 0
    return capfd.readouterr().out


def test_people_read_a_table_and_what_to_take(capfd: pytest.CaptureFixture[str]) -> None:
    printed = told(capfd, "--gpu", "24GiB", "--bandwidth", "1008GB/s", "--concurrency", "11")
    assert "24.0 GiB, 1,008 GB/s" in printed
    assert "11 requests at once of 8,192 tokens each" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line[:4] in ("bf16", "nf4 ", "int8")}
    assert rows["bf16"].rstrip().endswith("holds 6")
    assert rows["int8"].rstrip().endswith("yes")
    assert "Take `int8`" in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_scripts_read_json(capfd: pytest.CaptureFixture[str]) -> None:
    asked = (
        "--gpu",
        "h100-80gb",
        "--context",
        "4k",
        "--precisions",
        "nf4,fp16",
        "--kv-dtype",
        "int8",
        "--json",
    )
    plan = json.loads(told(capfd, *asked))
    assert [mode["precision"] for mode in plan["modes"]] == ["nf4", "fp16"]
    assert (plan["context_tokens"], plan["take"]) == (4096, "fp16")


def test_settings_of_the_server_count(capfd: pytest.CaptureFixture[str]) -> None:
    def tokens(*more: str) -> int:
        asked = ("--gpu", "h100-80gb", "--precisions", "nf4", "--json", *more)
        return int(json.loads(told(capfd, *asked))["modes"][0]["kv_tokens"])

    assert tokens("--kv-memory-fraction", "0.45") == pytest.approx(tokens() / 2, rel=0.001)
    assert tokens("--max-context-tokens", "8192") > tokens()  # a shorter table of positions


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "`--gpu` is needed"),
        (("--gpu", "h100"), 2, "h100-80gb"),
        (("--gpu", "24GiB", "--context", "many"), 2, "`context` = `many`"),
        (("--gpu", "24GiB", "--precisions", "nf5"), 3, "nf5"),
    ],
)
def test_what_cannot_be_planned(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert run(["plan", "preset:llama-3.1-8b", *arguments]) == code
    printed = capfd.readouterr().err
    assert said in printed
    assert "hint: " in printed


def test_no_torch_is_needed() -> None:
    program = (
        "import sys; from service.__main__ import run\n"
        "assert run(['plan', 'preset:qwen3-8b', '--gpu', 'l4']) == 0\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
