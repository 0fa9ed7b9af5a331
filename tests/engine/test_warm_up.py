"""The first steps of a model, before it is ready."""

from pathlib import Path

import pytest
from tiny_models import load_instance, make_checkpoint

from service import device as devices
from service.engine.runner import Runner
from service.engine.scheduler import Chunk
from service.engine.warm_up import MEETING, touch_kernels, warm_up


@pytest.mark.parametrize("runs_behind", [False, True])
def test_a_device_that_builds_kernels_sees_steps_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_behind: bool
) -> None:
    """Decode alone and beside prompts; a prompt that begins at once and one behind a shared beginning."""
    make_checkpoint(tmp_path, "llama")
    steps: list[list[Chunk]] = []
    launch = Runner.launch

    def watched(runner: Runner, chunks: list[Chunk]) -> object:
        steps.append(chunks)
        return launch(runner, chunks)

    monkeypatch.setattr(Runner, "launch", watched)
    monkeypatch.setattr(devices, "runs_behind", lambda device: runs_behind)
    engine = warm_up(load_instance(tmp_path), 128, 16)
    assert not engine.has_work
    assert [chunk.num_tokens for chunk in steps[0]] == [127]
    kinds = {(chunks[0].is_decode, chunks[-1].is_decode) for chunks in steps}
    assert kinds == {(False, False), (True, True)} | ({(True, False)} if runs_behind else set())
    requests = {chunk.request.id for chunks in steps for chunk in chunks}
    assert len(requests) == 1 + (len(MEETING) if runs_behind else 0)
    assert any(chunk.start for chunks in steps for chunk in chunks if not chunk.is_decode) == runs_behind


def test_a_librarys_kernels_are_launched_for_all_numbers_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, "llama")
    model = load_instance(tmp_path)
    rows: dict[str, list[int]] = {"down_proj": [], "head": []}
    chosen = (("down_proj", model.decoder.layers[0].down_proj), ("head", model.decoder.head))
    for name, linear in chosen:
        monkeypatch.setattr(linear, "chosen_by_rows", True)
        forward = linear.forward
        monkeypatch.setattr(linear, "forward", lambda x, f=forward, n=name: rows[n].append(len(x)) or f(x))
    touch_kernels(model, 1300, 20)
    assert rows["down_proj"] == [*range(8, 1025, 8), 1152, 1280, 1300]
    assert rows["head"] == [8, 16, 20]
    rows["down_proj"].clear()
    touch_kernels(model, 65_536, 20)
    assert rows["down_proj"][-3:] == [3840, 3968, 65_536]
