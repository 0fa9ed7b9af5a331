"""A bfloat16 decoder on our own CPU kernels beside the same one on torch's: both round alike, and stay close.

Both are compared with the float32 decoder too, whose distance says what close means.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.kernels.native import absence, choose, load
from service.model.instance import ModelInstance
from tests.tiny_models import decode_batch, load_instance, make_checkpoint, one_sequence

pytestmark = pytest.mark.skipif(load() is None, reason=absence())

BOUND = 0.02  # relative RMS of logits between the two; either is 0.015 to 0.045 away from float32
OPS = ("attention", "add_rms_norm", "rotary_kv", "gated_silu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "head_dim": 32},
    "qwen3": {"hidden_size": 128, "head_dim": 64},
    "mistral": {"hidden_size": 128, "head_dim": 32, "sliding_window": 20},
    "qwen2": {"hidden_size": 256, "tie_word_embeddings": True},
}


@pytest.fixture
def _auto_afterwards() -> Iterator[None]:
    yield
    choose("auto")


def logits(instance: ModelInstance) -> Tensor:
    """Of two chunks of a prompt and three tokens behind them, then of three sequences side by side."""
    kv = instance.new_kv(16)
    tokens = list(range(7, 67))
    spans = [(0, 40), (40, 57), (57, 58), (58, 59), (59, 60)]
    found = [instance.forward(one_sequence(tokens[:stop], start, kv), kv) for start, stop in spans]
    prompts, tables = (tokens[:5], tokens[3:40], tokens[:16]), ([5, 9, 2], [3, 1, 8], [7, 6, 10])
    for length in range(1, 38):
        live = [i for i, prompt in enumerate(prompts) if length <= len(prompt)]
        batch = decode_batch([prompts[i][:length] for i in live], [tables[i] for i in live])
        found.append(instance.forward(batch, kv))
    return torch.cat(found)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.usefixtures("_auto_afterwards")
@pytest.mark.parametrize("family", FAMILIES)
def test_native_stays_close_to_torch(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, torch.bfloat16, **FAMILIES[family])
    exact = logits(load_instance(tmp_path, "fp32"))
    choose("torch")
    instance = load_instance(tmp_path, "bf16")
    assert not any(instance.kernels()[op].startswith("native.") for op in OPS)
    by_torch = logits(instance)
    choose("native")
    instance = load_instance(tmp_path, "bf16")
    assert all(instance.kernels()[op].startswith("native.") for op in OPS)
    native = logits(instance)
    assert distance(native, by_torch) < BOUND
    assert distance(native, exact) < 1.2 * distance(by_torch, exact)
