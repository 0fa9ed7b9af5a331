"""8-bit linears in CUDA C++ for Hopper: LLM.int8() of many rows, its outliers in the same pass, E4M3 of few.

precision/int8 --bind_int8--> Tiles; kernels/int8_linear --rows as int8_rows marks them--> y [tokens, out]
precision/fp8 --bind_fp8--> FewRows; kernels/fp8_linear --codes of rows--> y

On an H100 `w8_tile.cu` by the tables in plan.py; elsewhere the reference, for tests: what the tables refuse,
the other rows, and every other device keep the kernels in int8_linear and fp8_linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from service.kernels.cuda import absence
from service.kernels.int8_rows import Marks, OutlierRule
from service.kernels.w8_linear import reference
from service.kernels.w8_linear.plan import AFTER_ROWS, Row, Shape, plan, refusal, row_for
from service.kernels.w8_linear.variants import KERNEL, MAX_INPUTS, Codes, Tile

if TYPE_CHECKING:
    from service.kernels.int8_rows.triton import Rows

__all__ = [
    "AFTER_ROWS", "Codes", "FewRows", "Row", "Shape", "Tiles", "absence", "bind_fp8", "bind_int8",
    "kernel_name", "load", "plan", "refusal", "row_for",
]  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """An int8 weight for more than AFTER_ROWS rows."""

    marks: Marks  # where the rows' columns with outliers are to be told
    multiply: Callable[["Rows"], Tensor]  # -> [T, out]


@dataclass(frozen=True)
class FewRows:
    """An fp8 weight for as many rows as its plan has."""

    rows: tuple[Row, ...]
    multiply: Callable[[Tensor, Tensor], Tensor]  # float8_e4m3fn [T, in], float32 [T] -> [T, out]


def bind_int8(
    codes: Tensor, steps: Tensor, bias: Tensor | None, rule: OutlierRule, shape: Shape, number: int
) -> Tiles:
    """codes int8 [out, in], steps float32 [out] (what a code counts), bias [out].

    `number`: of the layer in the order of a forward pass, so that neighbours mark in different places.
    """
    if codes.is_cuda:
        from service.kernels.w8_linear.cuda import BoundInt8, Weight

        bound = BoundInt8(Weight(codes, steps), bias, rule, shape, number)
        return Tiles(bound.marks, bound)
    words = codes.new_zeros(2, MAX_INPUTS // 32, dtype=torch.int32)
    marks = Marks(words[0], words[1])
    return Tiles(marks, partial(reference.int8_linear, codes, steps, bias, rule, marks))


def bind_fp8(codes: Tensor, scales: Tensor, shape: Shape) -> FewRows:
    """codes float8_e4m3fn [out, in], scales float32 [out]."""
    if codes.is_cuda:
        from service.kernels.w8_linear.cuda import BoundFP8, Weight

        return FewRows(plan(shape), BoundFP8(Weight(codes, scales), shape))
    return FewRows(plan(shape), partial(reference.fp8_linear, codes, scales, shape.dtype))


def load(variant: Tile) -> object:
    """Compiles it for the GPU and brings it there, ahead of its first call."""
    from service.kernels.w8_linear import cuda

    return cuda.load(variant)


def kernel_name() -> str:
    """Of what is bound on a GPU."""
    return f"cuda.{KERNEL}"
