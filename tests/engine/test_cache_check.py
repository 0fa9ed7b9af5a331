"""A kernel that writes or reads 8-bit K and V wrongly is seen before anybody is served."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_checkpoint
from torch import Tensor

from service.engine import cache_check
from service.engine.cache_check import check_coded_cache
from service.engine.startup import start
from service.errors import DeviceError
from service.kernels.coded_attention import coded_attention
from service.messages import EngineConfig
from service.model.instance import ModelInstance
from service.precision import load_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_whoever_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kv_dtype: torch.dtype, deterministic: bool
) -> None:
    """Right as built; K's and V's scales confused, a code's sign lost, a decode of the wrong rows."""
    make_checkpoint(tmp_path, family)
    model = ModelInstance.load(
        tmp_path, load_backend("fp32"), CPU, kv_dtype=kv_dtype, deterministic=deterministic
    )
    check_coded_cache(model)
    right = coded_attention

    def confused(q: Tensor, keys: Tensor, values: Tensor, scales: Tensor, plan: Any, scale: float) -> Tensor:
        return right(q, keys, values, scales.flip(-1), plan, scale)

    def unsigned(q: Tensor, keys: Tensor, values: Tensor, scales: Tensor, plan: Any, scale: float) -> Tensor:
        return right(q, keys.float().abs().to(keys.dtype), values, scales, plan, scale)

    def decoding(q: Tensor, keys: Tensor, values: Tensor, scales: Tensor, plan: Any, scale: float) -> Tensor:
        found = right(q, keys, values, scales, plan, scale)
        return found.roll(1, 1) if plan.num_decode else found

    for wrong, told in ((confused, "a prompt's K"), (unsigned, "a prompt's K"), (decoding, "a decode's K")):
        monkeypatch.setattr(cache_check, "coded_attention", wrong)
        with pytest.raises(DeviceError, match=told) as error:
            check_coded_cache(model)
        assert model.kernels()["attention"] in error.value.message


def test_a_start_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama", torch.bfloat16)
    monkeypatch.setattr(cache_check, "coded_attention", lambda q, *_: torch.zeros_like(q))
    config = EngineConfig(model_path=str(tmp_path), device="cpu", precision="bf16", kv_dtype="int8")
    with pytest.raises(DeviceError, match="in 8 bits on `cpu`: 100"):
        start(config, lambda _: None, 0.0)
