"""A decoder whose rotary embedding and attention of a decode are one kernel: the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import greedy, load_instance, make_checkpoint
from torch import Tensor

from service.kernels import decode_attention
from service.kernels.decode_attention import Shape, Variant
from service.kernels.decode_attention.table import Settings, variant_of
from service.kernels.paged_attention import AttentionPlan
from service.model.batch import StepBatch
from tests.kernels.decodes import composed


@pytest.mark.parametrize(
    ("family", "changes", "kv_dtype"),
    [
        ("qwen3", {}, None),  # norms of q and k
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, None),
        ("mistral", {"sliding_window": 7}, None),
        ("qwen3", {}, torch.int8),
        ("mistral", {"sliding_window": 7}, torch.float8_e4m3fn),
    ],
)
def test_it_is_told_what_the_two_kernels_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
    kv_dtype: torch.dtype | None,
) -> None:
    make_checkpoint(tmp_path, family, **changes)
    model = load_instance(tmp_path, kv_dtype=kv_dtype)
    wanted = greedy(model, [5, 6, 7], 20)
    asked: list[bool] = []

    def serving(shape: Shape, step: AttentionPlan) -> Variant | None:
        assert (shape.head_dim, shape.is_normed) == (model.config.head_dim, model.config.qk_norm)
        return variant_of(shape, Settings(4, 2, 1)) if step.num_decode else None

    def in_one(variant: Variant, qkv: Tensor, *rest: Any, **named: Any) -> Tensor:
        asked.append(True)
        return composed(variant, qkv, *rest, **named)

    monkeypatch.setattr(decode_attention, "serving", serving)
    monkeypatch.setattr(decode_attention, "decode_attention", in_one)
    assert greedy(model, [5, 6, 7], 20) == wanted
    assert len(asked) == 19 * model.config.num_layers


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("wants_all", [True, False])
def test_beside_prompts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wants_all: bool, kv_dtype: torch.dtype | None
) -> None:
    """Two sequences decode, one begins and one goes on: their rows of one step, and what it leaves behind."""
    make_checkpoint(tmp_path, "llama")
    model = load_instance(tmp_path, kv_dtype=kv_dtype)
    rows = torch.arange(13) if wants_all else torch.tensor([0, 1, 12])

    def mixed() -> tuple[Tensor, list[Tensor]]:
        kv = model.new_kv(8)
        for number, tensor in enumerate(kv.tensors):
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number)) * 100)
        batch = StepBatch(
            token_ids=torch.arange(5, 18),
            positions=torch.tensor([20, 3, *range(4), *range(14, 21)]),
            slots=torch.tensor([36, 51, *range(64, 68), *range(94, 101)]),
            query_starts=[0, 1, 2, 6, 13],
            context_lengths=[21, 4, 4, 21],
            block_tables=torch.tensor([[1, 2], [3, 0], [4, 0], [5, 6]], dtype=torch.int32),
            num_decode=2,
            logit_rows=rows,
        )
        return model.forward(batch, kv), kv.tensors

    wanted, left = mixed()
    monkeypatch.setattr(decode_attention, "serving", lambda shape, step: variant_of(shape, Settings(4, 2, 1)))
    monkeypatch.setattr(decode_attention, "decode_attention", composed)
    got, found = mixed()
    assert torch.allclose(got, wanted, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(found, left, strict=True))


def test_whoever_serves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama", head_dim=64)
    model = load_instance(tmp_path)
    plain = model.kernels()
    monkeypatch.setattr(decode_attention, "plan_on", lambda *_, **__: ("a row",))
    for name in ("attention", "rotary_kv"):
        assert model.kernels()[name] == f"cuda.decode_attention of decodes, {plain[name]}"
