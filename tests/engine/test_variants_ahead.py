"""Which variants of our kernels in CUDA C++ are compiled ahead of a start on an H100."""

from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.graphs import batch_sizes
from service.engine.kernel_shapes import shapes_of
from service.engine.kernels_ahead import META, cuda_loads, walk
from service.kernels.dense_linear import Variant
from service.kernels.dense_linear.few_rows import Entry
from service.messages import EngineConfig
from service.model.random_weights import Draw, RandomWeights
from service.precision import load_backend
from service.quantize import packing
from tests.kernels.absent_gpu import recorded

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here is no GPU to bring them to."""
    for kernels in ("decode_attention", "dense_linear", "gated_linear", "w4_linear", "w8_linear"):
        monkeypatch.setattr(f"service.engine.kernels_ahead.{kernels}.load", lambda variant: None)


@pytest.mark.parametrize(
    ("precision", "kind"), [("awq", "affine"), ("nf4", "nf4"), ("int3", "int3"), ("fp16", None)]
)
def test_on_an_h100_every_variant_of_the_w4_kernels_is_compiled(
    precision: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no Triton kernel for linears that they serve."""
    monkeypatch.setattr("service.engine.kernel_shapes.absence", lambda: "")
    loaded: list[Any] = []
    monkeypatch.setattr("service.engine.kernels_ahead.w4_linear.load", loaded.append)
    folder = Path(__file__).parents[2] / "service" / "model" / "presets" / "llama-3.1-8b"
    source = RandomWeights(folder, META, Draw())
    backend = load_backend(precision)
    if backend.quantizer:
        source = source.quantized(packing(source.config, backend))
    config = EngineConfig(model_path="", precision=precision)
    shapes = shapes_of(source, backend, config, torch.float16, 8)
    assert shapes.w4_kind == kind
    with recorded() as ahead:
        walk(shapes, batch_sizes(8))
    assert not {"awq_linear_kernel", "int3_linear_kernel"} & {launched[0] for launched in ahead}
    for load in cuda_loads(shapes):
        load()
    assert {variant.kind for variant in loaded} == ({kind} if kind else set())
    assert {variant.kernel for variant in loaded} == ({"w4_few", "w4_tile"} if kind else set())
    fixed = EngineConfig(model_path="", precision=precision, deterministic=True)
    assert shapes_of(source, backend, fixed, torch.float16, 8).w4_kind is None


@pytest.mark.parametrize(("precision", "num_variants"), [("fp16", 2), ("nf4", 2), ("fp32", 0)])
def test_so_is_every_variant_of_the_16_bit_kernel(
    precision: str, num_variants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the table has: for all linears, or for the head alone."""
    table = (Entry(8, 0, Variant(8, 1, 1, 2, 3)), Entry(64, 0, Variant(64, 1, 2, 1, 3)))
    monkeypatch.setattr("service.kernels.dense_linear.few_rows.TABLE", table)
    monkeypatch.setattr("service.engine.kernel_shapes.absence", lambda: "")
    loaded: list[Any] = []
    monkeypatch.setattr("service.engine.kernels_ahead.dense_linear.load", loaded.append)
    folder = Path(__file__).parents[2] / "service" / "model" / "presets" / "llama-3.1-8b"
    source, backend = RandomWeights(folder, META, Draw()), load_backend(precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for deterministic in (False, True):
        loaded.clear()
        config = EngineConfig(model_path="", precision=precision, deterministic=deterministic)
        shapes = shapes_of(source, backend, config, dtype, 8)
        with recorded() as ahead:
            walk(shapes, [8])
        for load in cuda_loads(shapes):
            load()
        assert "stream_kernel" not in {launched[0] for launched in ahead}
        assert len(loaded) == (0 if deterministic else num_variants)
        assert all(variant.bf16 for variant in loaded)


@pytest.mark.parametrize(
    ("precision", "num_loaded"), [("fp16", 1), ("int8:skip=gate_up_proj", 1), ("nf4", 0)]
)
def test_so_is_the_one_that_computes_gate_up_and_the_gate(
    precision: str, num_loaded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.kernel_shapes.absence", lambda: "")
    loaded: list[Any] = []
    monkeypatch.setattr("service.engine.kernels_ahead.gated_linear.load", loaded.append)
    folder = Path(__file__).parents[2] / "service" / "model" / "presets" / "llama-3.1-8b"
    source, backend = RandomWeights(folder, META, Draw()), load_backend(precision)
    for deterministic in (False, True):
        loaded.clear()
        config = EngineConfig(model_path="", precision=precision, deterministic=deterministic)
        for load in cuda_loads(shapes_of(source, backend, config, torch.bfloat16, 8)):
            load()
        assert [variant.bf16 for variant in loaded] == [1] * (0 if deterministic else num_loaded)


@pytest.mark.parametrize(
    ("precision", "kv_dtype", "splits"),
    [("nf4", None, [16, 8, 4, 2, 1]), ("fp16", torch.int8, [16, 8, 4, 2, 1]), ("fp16", torch.float32, [])],
)
def test_of_decodes_every_variant_of_the_cache_s_table_is(
    precision: str, kv_dtype: torch.dtype | None, splits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None in deterministic order."""
    monkeypatch.setattr("service.engine.kernel_shapes.absence", lambda: "")
    loaded: list[Any] = []
    monkeypatch.setattr("service.engine.kernels_ahead.decode_attention.load", loaded.append)
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
