"""Linears that bitsandbytes quantized and transformers saved, checked against config.json.

checkpoint --read--> tensors of nf4 and int8, as bitsandbytes means them

Four bits: `weight` uint8 [out * in / 2, 1], the earlier weight in the high nibble; `weight.absmax`, float32
or, under double quantization, 8-bit codes with `weight.nested_absmax`; what they count in, and the table, in
`weight.quant_state.bitsandbytes__nf4`, JSON as bytes. Eight: `weight` int8 [out, in], `SCB` float32 [out],
the largest magnitude of each row.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from service.errors import CheckpointError
from service.precision.base import Read
from service.precision.linear import LinearSpec
from service.precision.source import read_shaped

METHOD = "bitsandbytes"
AGAIN = "serve the 16-bit checkpoint it was made from"


def bits_of(quantization: Mapping[str, Any]) -> int:
    """4 or 8 for a `quantization_config` of bitsandbytes, else 0."""
    if quantization.get("quant_method") != METHOD:
        return 0
    return 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else 0


def read_codes(part: LinearSpec, dtype: torch.dtype, shape: tuple[int, ...], read: Read) -> Tensor:
    """The linear's `weight`; CheckpointError where it was not quantized so."""
    name = f"{part.path}.weight"
    codes = read(name)
    if codes.dtype != dtype:
        raise CheckpointError(
            f"tensor `{name}` has type {codes.dtype} where its checkpoint's other linears are {dtype} codes",
            hint=f"linears that were left out of quantization are not read: {AGAIN}",
        )
    return read_shaped(name, shape, lambda _: codes)


def read_int8(part: LinearSpec, read: Read) -> tuple[Tensor, Tensor]:
    """-> codes int8 [out, in], scales float32 [out]."""
    codes = read_codes(part, torch.int8, (part.out_features, part.in_features), read)
    return codes, read_shaped(f"{part.path}.SCB", (part.out_features,), read).float()


def read_nf4(
    part: LinearSpec, block: int, nested_block: int, levels: Tensor, nested_levels: Tensor, read: Read
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """-> codes uint8 [out * in / 2], absmax [blocks], and under double quantization nested absmax and offset.

    CheckpointError where blocks or tables are others than these, which the kernels read.
    """
    name, size = f"{part.path}.weight", part.out_features * part.in_features
    codes = read_codes(part, torch.uint8, (size // 2, 1), read).view(-1)
    state_name = f"{name}.quant_state.bitsandbytes__nf4"
    try:
        state = json.loads(bytes(read(state_name).tolist()))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"tensor `{state_name}` is no JSON object", hint=AGAIN)
    is_nested = "nested_offset" in state
    told = {"blocksize": block, "shape": [part.out_features, part.in_features]}
    told |= {"nested_blocksize": nested_block} if is_nested else {}
    for key, expected in told.items():
        if state.get(key) != expected:
            raise CheckpointError(
                f"linear `{part.path}` has `{key}` = `{state.get(key)}`; accepted is {expected}", hint=AGAIN
            )
    check_table(f"{name}.quant_map", levels, read)
    absmax = read_shaped(f"{name}.absmax", (size // block,), read)
    if not is_nested:
        return codes, absmax.float(), None
    check_table(f"{name}.nested_quant_map", nested_levels, read)
    nested = read_shaped(f"{name}.nested_absmax", (-(-absmax.numel() // nested_block),), read)
    return codes, absmax, (nested.float(), torch.tensor(float(state["nested_offset"])))


def check_table(name: str, levels: Tensor, read: Read) -> None:
    found = read_shaped(name, tuple(levels.shape), read)
    if not torch.allclose(found.float(), levels.cpu(), rtol=0, atol=1e-6):
        raise CheckpointError(f"tensor `{name}` is another table than bitsandbytes' own", hint=AGAIN)
