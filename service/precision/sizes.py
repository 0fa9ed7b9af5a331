"""Bytes of one layer class's linears in each precision, by part, before any tensor exists. No torch.

a row of the table --(options, name, parts, width)--> {part: bytes} --> model/sizes, plan/

The parts are those of `QuantLinear.bytes`, and the bytes those of our own kernels' layouts; where a library's
serve instead, it may round up to its blocks. A test holds every row to what its backend has built. Raises
PrecisionError for shapes that the layout has no place for, as building the layer would.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from service.errors import PrecisionError
from service.precision.linear import LinearSpec
from service.precision.options import (
    AWQ_GROUPS,
    INT3_GROUPS,
    AWQOptions,
    INT3Options,
    Int8Options,
    NF4Options,
)

NF4_BLOCK = 64  # weights under one absmax
NESTED_BLOCK = 256  # absmax values under one nested scale
NF4_LEVELS, NESTED_LEVELS = 16, 256  # float32 entries of its two tables
INT3_TOGETHER = 32  # codes in three words
FLOAT_BYTES, HALF_BYTES = 4, 2

# options, layer class, the linears built into it, bytes of an activation -> part -> bytes
Sizes = Callable[[Any, str, Sequence[LinearSpec], int], dict[str, int]]


def weights(parts: Iterable[LinearSpec]) -> int:
    return sum(part.in_features * part.out_features for part in parts)


def outputs(parts: Iterable[LinearSpec]) -> int:
    return sum(part.out_features for part in parts)


def bias_bytes(parts: Sequence[LinearSpec], width: int) -> int:
    """One vector for all parts where any has a bias."""
    return width * outputs(parts) if any(part.bias for part in parts) else 0


def full(options: Any, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
    return {"linear16": width * weights(parts) + bias_bytes(parts, width)}


def int8(options: Int8Options, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
    if name in options.skip.split("+"):
        return full(options, name, parts, width)
    return {
        "codes": weights(parts),
        "scales": FLOAT_BYTES * outputs(parts),
        "linear16": bias_bytes(parts, width),
    }


def fp8(options: Any, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
    return {
        "codes": weights(parts),
        "scales": FLOAT_BYTES * outputs(parts),
        "linear16": bias_bytes(parts, width),
    }


def nf4(options: NF4Options, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
    check_nf4(parts)
    blocks = [weights([part]) // NF4_BLOCK for part in parts]
    scales = FLOAT_BYTES * sum(blocks)
    if options.double_quant:  # a code for each, nested scales, and each part's mean
        nested = sum(-(-count // NESTED_BLOCK) for count in blocks)
        scales = sum(blocks) + FLOAT_BYTES * (nested + len(parts))
    return {"codes": weights(parts) // 2, "scales": scales, "linear16": bias_bytes(parts, width)}


def nf4_codebooks(options: NF4Options) -> int:
    return FLOAT_BYTES * (NF4_LEVELS + (NESTED_LEVELS if options.double_quant else 0))


def check_nf4(parts: Sequence[LinearSpec]) -> None:
    if parts[0].in_features % NF4_BLOCK:
        raise PrecisionError(
            f"precision `nf4` needs in_features divisible by {NF4_BLOCK}; `{parts[0].path}` has "
            f"{parts[0].in_features}",
            hint="serve this checkpoint with `--precision int8` or `bf16`",
        )


def awq(options: AWQOptions, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
    """`options.group` as `choose_awq_group` has found it. Three bits lie in containers of four."""
    assert options.group, "chosen for the whole model"
    groups = parts[0].in_features // options.group * outputs(parts)
    return {
        "codes": weights(parts) // 2,
        "scales": HALF_BYTES * groups,
        "zeros": groups // 2,
        "linear16": bias_bytes(parts, width),
    }


def choose_awq_group(parts: Sequence[LinearSpec], asked: int) -> int:
    """The group size of a checkpoint with these linears; `asked` 0: the largest that divides all inputs."""
    features = sorted({part.in_features for part in parts})
    fitting = [size for size in AWQ_GROUPS if all(count % size == 0 for count in features)]
    if not fitting or (asked and asked not in fitting):
        told = f"group size {asked}" if asked else "no group size"
        raise PrecisionError(
            f"precision `awq`: {told} divides the input features of the linears, "
            f"{', '.join(map(str, features))}",
            hint=f"leave `group` out, or take {' or '.join(map(str, fitting))}"
            if fitting
            else "serve this model with `--precision nf4`",
        )
    narrow = next((part for part in parts if part.out_features % 8), None)
    if narrow:
        raise PrecisionError(
            f"precision `awq`: `{narrow.path}` has {narrow.out_features} output features; "
            "the layout packs them by eight",
            hint="serve this model with `--precision nf4`",
        )
    return asked or fitting[0]


def int3(options: INT3Options, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
    check_int3(parts, options.group)
    groups = parts[0].in_features // options.group * outputs(parts)
    return {
        "codes": weights(parts) * 3 // 8,
        "scales": HALF_BYTES * groups,
        "zeros": groups // 2,
        "linear16": bias_bytes(parts, width),
    }


def check_int3(parts: Sequence[LinearSpec], group_size: int) -> None:
    """Raises PrecisionError for what the layout has no place for."""
    if parts[0].in_features % group_size:
        hint = "serve this checkpoint with `--precision int8` or `bf16`"
        if group_size != INT3_GROUPS[0] and parts[0].in_features % INT3_GROUPS[0] == 0:
            hint = f"serve it with `--precision int3:group={INT3_GROUPS[0]}`"
        raise PrecisionError(
            f"precision `int3` needs in_features divisible by its group of {group_size}; "
            f"`{parts[0].path}` has {parts[0].in_features}",
            hint=hint,
        )
    for part in parts:
        if part.out_features % INT3_TOGETHER:
            raise PrecisionError(
                f"precision `int3` needs out_features divisible by {INT3_TOGETHER}; `{part.path}` has "
                f"{part.out_features}",
                hint="serve this checkpoint with `--precision int8` or `bf16`",
            )
