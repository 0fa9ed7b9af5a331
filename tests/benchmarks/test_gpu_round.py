"""Steps end once, wait for a call that has the time, and go on where they can."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.gpu_round import STEPS, Step, run_all

ROOT = Path(__file__).parents[2]
COUNTS = "import sys; open(sys.argv[1] + '/ran', 'a').write(sys.argv[2]); print('said', sys.argv[2])"
WAITS = """
import sys
with open(sys.argv[1] + "/ran", "a") as ran:
    ran.write(sys.argv[2])
print("at work", flush=True)
while True:
    pass
"""


def step(name: str, code: str = COUNTS, seconds: int = 1, resumes: bool = False) -> Step:
    return Step(name, seconds, ("-c", code, "OUT", name), resumes)


def ran(out: Path) -> str:
    return (out / "ran").read_text()


def test_each_step_runs_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [step("a"), step("b", "import sys; sys.exit(3)"), step("c")]
    for _ in range(2):
        run_all(steps, tmp_path, {"OUT": str(tmp_path)}, limit_s=60)
    assert ran(tmp_path) == "ac"
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert {name: one["status"] for name, one in ended.items()} == {"a": 0, "b": 3, "c": 0}
    assert "said c" in capfd.readouterr().out
    assert (tmp_path / "c.log").read_text() == "said c\n"


def test_what_does_not_fit_is_left_for_the_next_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = [step("long", seconds=300), step("short")]
    run_all(steps, tmp_path, {"OUT": str(tmp_path)}, limit_s=60)
    assert ran(tmp_path) == "short"
    assert "long: left, 300 s do not fit" in capfd.readouterr().out
    run_all(steps, tmp_path, {"OUT": str(tmp_path)}, limit_s=600)
    assert ran(tmp_path) == "shortlong"


MEETS = """
import os, sys
out, name, other = sys.argv[1:4]
open(f"{out}/{name}.here", "w").close()
while not os.path.exists(f"{out}/{other}.here"):
    pass
"""


def test_what_times_nothing_runs_beside_its_kind(tmp_path: Path) -> None:
    """Each of the two ends when the other has begun; what is timed comes before and behind them."""
    meeting = [Step(name, 1, ("-c", MEETS, "OUT", name, other), beside=True) for name, other in ("xy", "yx")]
    run_all([step("a"), meeting[0], step("b"), meeting[1]], tmp_path, {"OUT": str(tmp_path)}, limit_s=60)
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert list(ended) == ["a", "x", "y", "b"]
    assert {one["status"] for one in ended.values()} == {0}


class NeverInTime(subprocess.Popen[bytes]):
    """A process that is still at work when it should have ended: the limit comes as soon as it has begun."""

    waited = False

    def wait(self, timeout: float | None = None) -> int:
        if self.waited:
            return super().wait(timeout)
        self.waited = True
        assert self.stdout is not None
        with self.stdout:
            self.stdout.readline()
        raise subprocess.TimeoutExpired(self.args, timeout or 0)


@pytest.mark.parametrize("resumes", [True, False])
def test_one_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    """And is called again only if it goes on from there."""

    def late(command: list[str], **options: Any) -> NeverInTime:
        return NeverInTime(command, **{**options, "stdout": subprocess.PIPE})

    folders = {"OUT": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", late)
        run_all([step("slow", WAITS, resumes=resumes)], tmp_path, folders, limit_s=60)
    ended = tmp_path / "ended.json"
    assert ended.is_file() is not resumes
    assert resumes or json.loads(ended.read_text())["slow"]["status"] == -signal.SIGTERM
    run_all([step("slow", resumes=resumes)], tmp_path, folders, limit_s=60)
    assert ran(tmp_path) == ("slowslow" if resumes else "slow")


def test_steps_are_commands_of_this_repository() -> None:
    assert len({one.name for one in STEPS}) == len(STEPS)
    for one in STEPS:
        for argument in one.arguments:
            if argument.endswith(".py"):
                assert (ROOT / argument).is_file(), one
            if argument.startswith("tests.benchmarks."):
                assert (ROOT / (argument.replace(".", "/") + ".py")).is_file(), one
