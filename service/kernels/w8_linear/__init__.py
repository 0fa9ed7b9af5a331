"""LLM.int8() linears of many rows, in CUDA C++ for Hopper: the outliers in the same pass as the codes.

precision/int8 --bind--> Tiles; kernels/int8_linear --rows as int8_rows marks them--> y [tokens, out]

On an H100 `w8_tile.cu` by the table in plan.py; elsewhere the reference, for tests: what the table refuses,
few rows, and every other device keep the kernels in int8_linear.
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
from service.kernels.w8_linear.plan import AFTER_ROWS, Row, Shape, plan, refusal
from service.kernels.w8_linear.variants import KERNEL, MAX_INPUTS, Tile

if TYPE_CHECKING:
    from service.kernels.int8_rows.triton import Rows

__all__ = ["AFTER_ROWS", "Row", "Shape", "Tiles", "absence", "bind", "kernel_name", "load", "plan", "refusal"]


@dataclass(frozen=True)
class Tiles:
    """A weight for more than AFTER_ROWS rows."""

    marks: Marks  # where the rows' columns with outliers are to be told
    multiply: Callable[["Rows"], Tensor]  # -> [T, out]


def bind(
    codes: Tensor, steps: Tensor, bias: Tensor | None, rule: OutlierRule, shape: Shape, number: int
) -> Tiles:
    """codes int8 [out, in], steps float32 [out] (what a code counts), bias [out].

    `number`: of the layer in the order of a forward pass, so that neighbours mark in different places.
    """
    if codes.is_cuda:
        from service.kernels.w8_linear.cuda import Bound

        bound = Bound(codes, steps, bias, rule, shape, number)
        return Tiles(bound.marks, bound)
    words = codes.new_zeros(2, MAX_INPUTS // 32, dtype=torch.int32)
    marks = Marks(words[0], words[1])
    return Tiles(marks, partial(reference.w8_linear, codes, steps, bias, rule, marks))


def load(variant: Tile) -> object:
    """Compiles it for the GPU and brings it there, ahead of its first call."""
    from service.kernels.w8_linear import cuda

    return cuda.load(variant)


def kernel_name() -> str:
    """Of what `bind` gives on a GPU."""
    return f"cuda.{KERNEL}"
