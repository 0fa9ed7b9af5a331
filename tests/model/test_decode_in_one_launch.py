"""A decoder whose rotary embedding and attention of a decode are one kernel: the same tokens."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import greedy, load_instance, make_checkpoint
from torch import Tensor

from service.kernels import decode_attention
from service.kernels.decode_attention import Shape, Variant
from service.kernels.decode_attention.table import Settings, variant_of
from service.kernels.paged_attention import AttentionPlan
from tests.kernels.decodes import composed


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),  # norms of q and k
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("mistral", {"sliding_window": 7}),
    ],
)
def test_it_is_told_what_the_two_kernels_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    make_checkpoint(tmp_path, family, **changes)
    model = load_instance(tmp_path)
    wanted = greedy(model, [5, 6, 7], 20)
    asked: list[bool] = []

    def serving(shape: Shape, step: AttentionPlan) -> Variant | None:
        assert (shape.head_dim, shape.is_normed) == (model.config.head_dim, model.config.qk_norm)
        is_decode = step.num_decode == step.num_sequences
        return variant_of(shape, Settings(4, 2, 1)) if is_decode else None

    def in_one(variant: Variant, qkv: Tensor, *rest: Any) -> Tensor:
        asked.append(True)
        return composed(variant, qkv, *rest)

    monkeypatch.setattr(decode_attention, "serving", serving)
    monkeypatch.setattr(decode_attention, "decode_attention", in_one)
    assert greedy(model, [5, 6, 7], 20) == wanted
    assert len(asked) == 19 * model.config.num_layers


def test_whoever_serves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama", head_dim=64)
    model = load_instance(tmp_path)
    plain = model.kernels()
    monkeypatch.setattr(decode_attention, "plan_on", lambda *_, **__: ("a row",))
    for name in ("attention", "rotary_kv"):
        assert model.kernels()[name] == f"cuda.decode_attention of decodes, {plain[name]}"
