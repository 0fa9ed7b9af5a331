"""Which variants of the kernel that decodes in one launch are compiled ahead of a start."""

from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.kernel_shapes import shapes_of
from service.engine.kernels_ahead import META, cuda_loads
from service.messages import EngineConfig
from service.model.random_weights import Draw, RandomWeights
from service.precision import load_backend


@pytest.mark.parametrize(
    ("precision", "kv_dtype", "splits"),
    [("nf4", None, [16, 8, 4, 2, 1]), ("fp16", torch.int8, [16, 8, 4, 2, 1]), ("fp16", torch.float32, [])],
)
def test_every_variant_of_the_cache_s_table_is(
    precision: str, kv_dtype: torch.dtype | None, splits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None in deterministic order."""
    monkeypatch.setattr("service.engine.kernel_shapes.absence", lambda: "")
    loaded: list[Any] = []
    monkeypatch.setattr("service.engine.kernels_ahead.decode_attention.load", loaded.append)
    for linear in ("dense_linear", "gated_linear", "w4_linear"):
        monkeypatch.setattr(f"service.engine.kernels_ahead.{linear}.load", lambda variant: None)
    folder = Path(__file__).parents[2] / "service" / "model" / "presets" / "llama-3.1-8b"
    source, backend = RandomWeights(folder, META, Draw()), load_backend(precision)
    for deterministic in (False, True):
        config = EngineConfig(model_path="", precision=precision, deterministic=deterministic)
        shapes = shapes_of(source, backend, config, torch.float16, 8, kv_dtype)
        for load in cuda_loads(shapes):
            load()
    assert [variant.splits for variant in loaded] == splits
    codes = int(kv_dtype is torch.int8)
    assert {(each.dim, each.group, each.normed, each.codes) for each in loaded} <= {(128, 4, 0, codes)}
