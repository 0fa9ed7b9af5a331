"""`halftone compare --diff` as a CI runs it: exit codes, and a command line that asks for nothing else."""

from pathlib import Path

import msgspec
import pytest

from service.__main__ import run
from tests.compare.made_up import MODES, made_up


@pytest.fixture
def reports(tmp_path: Path) -> tuple[str, str]:
    """One with five modes, one in which a mode is missing."""
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, modes in zip(paths, (MODES, MODES[:4]), strict=True):
        path.write_bytes(msgspec.json.encode(made_up(modes)))
    return str(paths[0]), str(paths[1])


def test_nothing_worse_is_success(reports: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    first, second = reports
    assert run(["compare", "--diff", second, first]) == 0
    assert "tokens/s, 64" in capfd.readouterr().out


def test_what_is_lost_fails_and_is_named(reports: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "--diff", *reports]) == 1
    printed = capfd.readouterr()
    assert "Lost: fp8: not measured in the second report" in printed.out
    assert "1 mode lost" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["demo", "--diff", "A", "B"], 2, "`MODEL` was given too"),
        (["--diff", "A", "B", "--seed", "1", "--kv-dtype", "int8"], 2, "`--seed, --kv-dtype` was given too"),
        (["--tolerance", "0.1"], 2, "without `--diff`"),
        (["--diff", "A"], 2, "requires 2 arguments"),
        (["--diff", "/nowhere", "B"], 4, "`/nowhere` cannot be read back"),
    ],
)
def test_a_wrong_command_line(
    reports: tuple[str, str], capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    paths = {"A": reports[0], "B": reports[1]}
    assert run(["compare", *(paths.get(argument, argument) for argument in arguments)]) == code
    assert said in capfd.readouterr().err
