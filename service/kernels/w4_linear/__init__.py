"""Linears with codes of four bits, AWQ's and NF4's, or three, in one order of memory, for any number of rows.

precision/w4 --layout.pack (once, at load)--> Weight --bind--> x [tokens, in] -> y [tokens, out]

On an H100 two kernels in CUDA C++ (cuda.py) by the table in plan.py; elsewhere the reference, for tests: what
the table refuses, and every other device, keeps the kernels in awq_linear, nf4_linear and int3_linear.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from service.kernels.cuda import absence
from service.kernels.w4_linear import reference
from service.kernels.w4_linear.layout import Kind, Nested, Weight, pack_awq, pack_int3, pack_nf4
from service.kernels.w4_linear.plan import Row, Shape, plan, refusal
from service.kernels.w4_linear.reference import dequantize
from service.kernels.w4_linear.variants import Variant

__all__ = [
    "Kind", "Nested", "Row", "Shape", "Weight", "absence", "bind", "dequantize", "kernel_name", "load",
    "pack_awq", "pack_int3", "pack_nf4", "plan", "refusal",
]  # fmt: skip


def bind(weight: Weight, shape: Shape) -> Callable[[Tensor], Tensor]:
    """What multiplies with this weight."""
    if not weight.codes.is_cuda:
        return partial(reference.w4_linear, weight=weight)
    from service.kernels.w4_linear.cuda import Bound

    return Bound(weight, plan(shape), shape.dtype)


def load(variant: Variant) -> object:
    """Compiles it for the GPU and brings it there, ahead of its first call."""
    from service.kernels.w4_linear import cuda

    return cuda.load(variant)


def kernel_name(device: torch.device, shape: Shape) -> str:
    """Of what `bind` gives: a kernel and the most rows that it takes."""
    if device.type != "cuda":
        return "reference.w4_linear"
    names: dict[str, int | None] = {}
    for row in plan(shape):
        names[row.variant.kernel] = row.max_rows
    told = [f"cuda.{name}" + (f" up to {rows} rows" if rows else "") for name, rows in names.items()]
    return ", ".join(told)
