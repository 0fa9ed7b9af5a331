"""The 16-bit tensors of a group's parts, shape-checked: what every backend that quantizes reads.

checkpoint --read_weight, read_bias--> full, int8, nf4
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from service.errors import CheckpointError, PrecisionError
from service.precision.base import LinearGroup, Read
from service.precision.linear import LinearSpec


class InFlight:
    """What the backends share that read a 16-bit checkpoint and make of it what they need while it loads."""

    quantizer: str | None = None
    codebook_bytes = 0
    decodes_weights = False

    @classmethod
    def written_as(cls, quantization: Mapping[str, Any]) -> str | None:
        return None

    def accepts(self, quantization: Mapping[str, Any] | None) -> bool:
        return quantization is None

    def reading(self, quantization: Mapping[str, Any] | None) -> Self:
        return self

    def activation_dtype(self, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
        return quantized_activation_dtype(device, checkpoint)


def read_shaped(name: str, shape: tuple[int, ...], read: Read) -> Tensor:
    """One tensor of the checkpoint; CheckpointError when its shape is not what config.json implies."""
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor `{name}` has shape {list(tensor.shape)}, config.json implies {list(shape)}",
            hint="config.json and the weights are not of one model; fetch the checkpoint again",
        )
    return tensor


def read_weight(part: LinearSpec, read: Read, dtype: torch.dtype | None = None) -> Tensor:
    """[out_features, in_features] of one part in `dtype` (None: as stored); CheckpointError if no float.

    PrecisionError when a value does not fit into float16 and float16 was asked for.
    """
    name = f"{part.path}.weight"
    weight = read_shaped(name, (part.out_features, part.in_features), read)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"tensor `{name}` has type {weight.dtype}; accepted are float32, bfloat16, float16",
            hint="serve a checkpoint with 16-bit weights",
        )
    if dtype == torch.float16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise PrecisionError(
            f"tensor `{name}` holds values beyond float16's 65504, which this precision computes with",
            hint="serve this checkpoint with `--precision bf16`",
        )
    return weight.to(dtype)


def read_bias(group: LinearGroup, read: Read) -> Tensor | None:
    """[out_features of all parts] in the activations' dtype: zeros for a part without, None if all are."""
    if not any(part.bias for part in group.parts):
        return None
    bias = torch.zeros(group.out_features, dtype=group.dtype)
    for number, part in enumerate(group.parts):
        if part.bias:
            bias[part_rows(group, number)] = read_shaped(f"{part.path}.bias", (part.out_features,), read)
    return bias.to(group.device)


def merged_weight(group: LinearGroup, read: Read, dtype: torch.dtype) -> Tensor:
    """[out_features of all parts, in_features] on the group's device."""
    weight = torch.empty(group.out_features, group.in_features, dtype=dtype, device=group.device)
    for number, part in enumerate(group.parts):
        weight[part_rows(group, number)] = read_weight(part, read, dtype)
    return weight


def part_rows(group: LinearGroup, part: int) -> slice:
    """Rows of the merged layer that belong to part number `part`."""
    start = sum(p.out_features for p in group.parts[:part])
    return slice(start, start + group.parts[part].out_features)


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def quantized_activation_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """What `auto` means in the quantized modes: the checkpoint's own 16-bit type, never fp16 on a CPU."""
    if device.type == "cpu" or checkpoint == torch.float32:
        return torch.bfloat16
    return checkpoint
