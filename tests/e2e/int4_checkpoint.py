"""The demo checkpoint rounded to INT4 without AWQ's search: the same layout and kernels in seconds."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from service.model.checkpoint import Checkpoint
from service.model.layout import layer_groups
from service.quantize.awq import Grid, round_weight
from service.quantize.awq_checkpoint import gemm_layout, quantization_config

GRID = Grid(bits=4, group_size=64)


def round_to_int4(folder: Path, out: Path) -> dict[str, Tensor]:
    """Writes AutoAWQ's layout to `out` -> what its codes mean, by tensor name: float32 [out, in]."""
    checkpoint = Checkpoint(folder)
    meaning: dict[str, Tensor] = {}
    tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    for layer in range(checkpoint.config.num_layers):
        for parts in layer_groups(checkpoint.config, layer).values():
            for part in parts:
                rounded = round_weight(tensors.pop(f"{part.path}.weight").float(), None, GRID)
                meaning[f"{part.path}.weight"] = rounded.dequantize()
                for kind, tensor in gemm_layout(rounded).items():
                    tensors[f"{part.path}.{kind}"] = tensor.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(GRID)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return meaning


def load_meaning(model: torch.nn.Module, meaning: dict[str, Tensor]) -> None:
    """Puts dequantized weights into a model that has them under these names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in meaning.items():
            parameters[name].copy_(weight)
