"""Ops of a decode step timed alone: all of them, of every layer, on a cache as a step has it."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from tiny_models import load_instance, make_checkpoint
from torch import Tensor

from service import device as devices
from service.engine.kernel_times import decode_step, kernel_seconds, ops
from service.engine.startup import start
from service.messages import EngineConfig
from service.model.instance import GROUPS

OPS = {*GROUPS, "attention", "lm_head", "sample"}


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_every_layer_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype | None
) -> None:
    make_checkpoint(tmp_path, "llama")
    model = load_instance(tmp_path, "bf16", kv_dtype=kv_dtype)
    kv = model.new_kv(21)
    counts: dict[str, int] = {}
    for layer in model.layers():
        for name in GROUPS:
            linear = getattr(layer, name)

            def counted(
                x: Tensor, name: str = name, forward: Callable[[Tensor], Tensor] = linear.forward
            ) -> Tensor:
                counts[name] = counts.get(name, 0) + len(x)
                return forward(x)

            monkeypatch.setattr(linear, "forward", counted)
    for run in ops(model, kv, 3).values():
        assert run().shape[0] == 3
    assert counts == dict.fromkeys(GROUPS, 3 * 3)
    for (
        keys
    ) in kv.keys:  # three rows have 20 blocks: the second begins behind the first, the third goes round
        written = {block for block in range(21) if keys[block].any()}
        assert written == {16, 12, 8}


def test_as_far_as_the_cache_goes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    model = load_instance(tmp_path)
    assert decode_step(model, model.new_kv(30), 1).batch.context_lengths == [256]
    assert decode_step(model, model.new_kv(3), 2).batch.context_lengths == [32, 32]


def test_a_figure_for_each_op_and_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama")
    model = load_instance(tmp_path)
    said: list[int] = []

    def timed(device: torch.device, run: Callable[[], Tensor], repeats: int, pool: object) -> float:
        said.append(len(run()))
        return len(said) / 1000

    monkeypatch.setattr(devices, "median_s", timed)
    found = kernel_seconds(model, model.new_kv(30), 64)
    assert said == [1] * len(OPS) + [16] * len(OPS)
    assert set(found) == OPS
    assert all(set(by_rows) == {"1", "16"} for by_rows in found.values())
    assert found["qkv_proj"] == {"1": 0.001, "16": 0.008}
    assert set(kernel_seconds(model, model.new_kv(30), 1)["sample"]) == {"1"}


def test_only_who_asks_has_them(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    config = EngineConfig(model_path=str(tmp_path), precision="bf16", device="cpu", kv_tokens=256)
    assert start(config, lambda _: None, 0.0).info.kernel_seconds == {}
    serving = start(msgspec.structs.replace(config, time_kernels=True), lambda _: None, 0.0)
    assert set(serving.info.kernel_seconds) == OPS
    assert set(serving.info.kernel_seconds) - {"sample"} <= set(serving.info.kernels)
    assert all(
        0 < seconds < 60 for times in serving.info.kernel_seconds.values() for seconds in times.values()
    )
