"""A reference for which the device has no room, streamed through it by layers. `pytest -m gpu`, by hand."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from service.engine.evaluate import Evaluation
from service.engine.sources import open_model
from service.engine.startup import Serving, load, start
from service.errors import DeviceError
from service.messages import EngineConfig, Evaluate, Evaluated
from service.model.hub import PRESETS

pytestmark = pytest.mark.gpu
WINDOWS = [[(7919 * i + 104729 * w) % 128_000 for i in range(257)] for w in range(3)]
ROOM_BYTES = 1_800_000_000  # bf16 takes 2.47 GB as a whole; embedding or head with their logits about 1.2


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def serve(precision: str) -> tuple[Serving, EngineConfig]:
    config = EngineConfig(
        model_path=str(PRESETS / "llama-3.2-1b"),
        precision=precision,
        device="cuda",
        load_format="random",
        kv_tokens=4096,
        cuda_graphs="off",
    )
    return start(config, lambda _: None, 0.0), config


def evaluate(serving: Serving, config: EngineConfig, **asked: Any) -> Evaluated:
    sent: list[Evaluated] = []
    Evaluation(Evaluate(1, WINDOWS, ["prefill"], **asked), serving, config, sent.append).run()
    assert sent[-1].error == ""
    return sent[-1]


def test_a_reference_beyond_the_budget_is_asked_all_the_same() -> None:
    """The whole model does not fit what is left, and says so; its layers do."""
    serving, config = serve("nf4")
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ROOM_BYTES) / total)
    found = evaluate(serving, config, reference="bf16")
    assert found.kl_mean > 0
    assert found.windows is not None
    assert len(found.windows.reference_nll) == len(WINDOWS)
    device, untold = serving.model.device, lambda *_: None
    with pytest.raises(DeviceError, match="no room"):
        load(config, *open_model(config, "bf16", device, untold), device, untold, None)


def test_a_model_streamed_is_the_model_served() -> None:
    serving, config = serve("bf16")
    prompts = [window[:40] for window in WINDOWS]
    found = evaluate(serving, config, reference="bf16", prompts=prompts, greedy_tokens=16)
    assert found.kl_mean == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.greedy is not None
    assert sum(found.greedy.generated) > 0
