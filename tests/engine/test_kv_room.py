"""How the KV cache's size is decided where several engines share a device."""

from pathlib import Path

import pytest
import torch
from tiny_models import load_instance, make_checkpoint
from torch import Tensor

from service.engine import kv_room
from service.messages import EngineConfig
from service.model.instance import ModelInstance


def test_a_share_is_left_for_engines_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal parts of what is free, less the weights of those that load later."""
    make_checkpoint(tmp_path, "llama", torch.bfloat16)
    model = load_instance(tmp_path, "bf16")
    free_bytes = 64 << 20
    monkeypatch.setattr(kv_room.devices, "memory_free_bytes", lambda device: free_bytes)
    monkeypatch.setattr(kv_room, "CPU_KV_TOKENS", 1 << 30)

    def kv_bytes(*beside: str) -> int:
        config = EngineConfig(model_path=str(tmp_path), precision="bf16", device="cpu", beside=beside)
        return kv_room.num_kv_blocks(config, model, 0) * model.kv_block_bytes

    fp32_bytes = sum(tensor.numel() * 4 for tensor in tensors_of(load_instance(tmp_path, "fp32")))
    assert kv_bytes() == pytest.approx(0.9 * free_bytes, rel=0.01)
    assert kv_bytes("fp32") == pytest.approx(0.9 * (free_bytes - fp32_bytes) / 2, rel=0.01)
    assert kv_bytes("fp32", "fp32") == pytest.approx(0.9 * (free_bytes - 2 * fp32_bytes) / 3, rel=0.01)


def tensors_of(model: ModelInstance) -> list[Tensor]:
    """All but the rotary tables."""
    named = [*model.decoder.named_buffers(), *model.decoder.named_parameters()]
    return [tensor for name, tensor in named if name not in ("cos", "sin")]
