"""A kernel that decodes in one launch and is wrong is seen before anybody is served."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_checkpoint
from torch import Tensor

from service.engine import attention_check
from service.engine.attention_check import check_decode_attention
from service.engine.startup import start
from service.errors import DeviceError
from service.kernels.decode_attention import Variant, plan
from service.kernels.decode_attention.table import TABLE, rows_of
from service.messages import EngineConfig
from service.model.decoder import decode_shape
from service.model.instance import ModelInstance
from service.precision import load_backend
from tests.kernels.decodes import composed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [
        ("qwen3", torch.bfloat16),
        ("smollm3", torch.bfloat16),
        ("mistral", torch.bfloat16),
        ("qwen3", torch.int8),
        ("mistral", torch.float8_e4m3fn),
    ],
)
def test_whoever_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kv_dtype: torch.dtype
) -> None:
    """Right with each variant's sequences; heads confused, K not written, NaN in an output."""
    make_checkpoint(tmp_path, family, head_dim=64)
    model = ModelInstance.load(tmp_path, load_backend("bf16"), CPU, torch.bfloat16, kv_dtype=kv_dtype)
    check_decode_attention(model)
    shape = decode_shape(model.config, torch.bfloat16, kv_dtype)
    rows = rows_of(shape, TABLE)
    assert len(rows) > 3
    monkeypatch.setattr(model, "decodes", lambda: rows)
    asked: list[tuple[Variant, int]] = []

    def right(variant: Variant, qkv: Tensor, *rest: Any, **named: Any) -> Tensor:
        asked.append((variant, len(qkv)))
        return composed(variant, qkv, *rest, **named)

    def confused(*given: Any, **named: Any) -> Tensor:
        return composed(*given, **named).roll(1, 1)

    def forgetful(*given: Any, **named: Any) -> Tensor:
        found, keys = composed(*given, **named), given[7]
        keys.zero_()
        return found

    def broken(variant: Variant, *given: Any, **named: Any) -> Tensor:
        found = composed(variant, *given, **named)
        return found * float("nan") if variant == rows[-1].variant else found

    monkeypatch.setattr(attention_check, "decode_attention", right)
    check_decode_attention(model)
    ends = [0, *(row.max_sequences or 0 for row in rows[:-1])]
    assert asked == [(row.variant, end + 1) for row, end in zip(rows, ends, strict=True)]
    for wrong, told in ((confused, "decode's attention"), (forgetful, "decode's K"), (broken, "nan% off")):
        monkeypatch.setattr(attention_check, "decode_attention", wrong)
        with pytest.raises(DeviceError, match=told):
            check_decode_attention(model)


def test_a_start_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama", torch.bfloat16, head_dim=64)
    types = torch.bfloat16, torch.bfloat16
    monkeypatch.setattr(ModelInstance, "decodes", lambda model: plan(decode_shape(model.config, *types)))

    def zeros(*given: Any, **named: Any) -> Tensor:
        return torch.zeros_like(composed(*given, **named))

    monkeypatch.setattr(attention_check, "decode_attention", zeros)
    config = EngineConfig(model_path=str(tmp_path), device="cpu", precision="bf16")
    with pytest.raises(DeviceError, match=r"100\.0% off with 1 sequences"):
        start(config, lambda _: None, 0.0)
