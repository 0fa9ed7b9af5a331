"""Ops of a decode step timed alone beside the captured step itself, on a GPU. `pytest -m gpu`."""

import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import service
from service import device as devices
from service.engine.startup import start
from service.messages import EngineConfig

pytestmark = pytest.mark.gpu
PRESET = Path(service.__file__).parent / "model/presets/llama-3.2-1b"


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4", "awq"])
def test_the_ops_of_a_step(precision: str, record_property: Callable[[str, object], None]) -> None:
    config = EngineConfig(
        model_path=str(PRESET), precision=precision, device="cuda", load_format="random", kv_tokens=8192,
        max_batch_requests=16, time_kernels=True,
    )  # fmt: skip
    serving = start(config, lambda _: None, time.monotonic())
    found = serving.info.kernel_seconds
    graphs = serving.engine.runner.graphs
    assert graphs is not None
    for rows in ("1", "16"):
        assert all(times[rows] > 0 for times in found.values())
        replay = graphs.step(int(rows), "greedy").replay
        step_s = devices.median_s(torch.device("cuda", torch.cuda.current_device()), replay, 15)
        told = ", ".join(f"{op} {times[rows] * 1e6:.0f}" for op, times in found.items())
        record_property(
            "figure",
            f"{precision}, {rows} rows: {told}; sum {sum(t[rows] for t in found.values()) * 1e6:.0f} us, "
            f"captured step on padding {step_s * 1e6:.0f} us; all of it took "
            f"{serving.info.load_seconds['warm']:.1f} s of a start with the first steps",
        )
    del serving, graphs, replay
    gc.collect()
    torch.cuda.empty_cache()
