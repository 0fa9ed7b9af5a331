"""How a Triton kernel gets onto the device: past Triton's own binding of arguments, ahead of its predecessor.

A step with prompts launches some 300 kernels from Python. Triton's `kernel[grid](...)` binds, specializes and
looks up anew each time, which took longer than the launch itself; `launch` does it once for each kind of
arguments.

Programmatic dependent launch: a kernel is placed on the device while the one before it still works. Every
kernel begins with `await_predecessor` (or `await_then_release`), so that what it reads is complete and what
it overwrites is no longer read; only what no kernel writes (a weight) may be fetched before. The call comes
first and unconditionally: a program that ends without it would let its successor overtake its predecessor.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".

It lets the successor begin before it has waited itself. A kernel that is over has waited for its predecessor,
so whoever waits for one has waited for all before it; and a successor is placed only when every program of
its predecessor is, so that it takes no place from it. When a kernel begins, then, all before it may still be
at work, back to the last that was launched plainly, as torch does: kernels/decode_attention, which reads more
than weights before its wait, says why it may.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

LEAST_CAPABILITY = (9, 0)  # Hopper's, the first with programmatic dependent launch


def is_supported() -> bool:
    """Whether the current device launches kernels before their predecessors end."""
    return (
        torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= LEAST_CAPABILITY
        and not knobs.runtime.interpret
    )


DEPENDENT = is_supported()  # for kernels launched or captured from now on

ALIGNMENT = 16  # bytes of a pointer, and a factor of a number, that Triton compiles for

_compiled: dict[tuple[Any, ...], Any] = {}  # what Triton compiled for a kind of arguments


@triton.jit  # type: ignore[untyped-decorator]
def await_predecessor(is_dependent: tl.constexpr):  # type: ignore[no-untyped-def]
    """The successor's programs take their places, and ask for weights, while the predecessor still works."""
    if is_dependent:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def await_then_release(is_dependent: tl.constexpr):  # type: ignore[no-untyped-def]
    """For 8-bit linears in Triton and the kernels that make their rows: where the programs of one of few rows
    are placed earlier, a layer takes longer (docs/experiments.md, section 5)."""
    if is_dependent:
        gdc_wait()
        gdc_launch_dependents()


def cdiv(total: int, part: int) -> int:
    """Rounded up. Triton's own, which kernels may call too, takes as long as a launch."""
    return -(-total // part)


def next_power_of_2(number: int) -> int:
    """The least that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: tuple[int | str, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    contracts: bool = True,
) -> None:
    """One launch on the current stream of the tensors' device, which is the current one.

    The kernel's parameters stand in this order: pointers, numbers, constexprs, and IS_DEPENDENT. A kind is
    at least as fine as Triton's own: dtypes and alignment of tensors; of whole numbers, whether they are 1,
    whether 16 divides them, whether 32 bits hold them.

    `contracts`: a * b + c may be rounded once. Without, every operation is, as on any other device.

    On meta tensors, which stand for aligned ones, it only compiles: engine/kernels_ahead.
    """
    if tensors[0].is_meta:
        kernel.warmup(
            *tensors, *numbers, *constants, DEPENDENT,
            grid=grid, num_warps=num_warps, num_stages=num_stages, launch_pdl=DEPENDENT,
            enable_fp_fusion=contracts,
        )  # fmt: skip
        return
    pointers = [tensor.data_ptr() for tensor in tensors]
    kind = (
        id(kernel),
        constants,
        num_warps,
        num_stages,
        contracts,
        DEPENDENT,
        *[tensor.dtype for tensor in tensors],
        *[pointer % ALIGNMENT for pointer in pointers],
        *[
            (number == 1, number % ALIGNMENT == 0, number >> 31) if type(number) is int else None
            for number in numbers
        ],
    )
    compiled = _compiled.get(kind)
    if compiled is None:
        compiled = kernel[grid](
            *tensors, *numbers, *constants, DEPENDENT,
            num_warps=num_warps, num_stages=num_stages, launch_pdl=DEPENDENT, enable_fp_fusion=contracts,
        )  # fmt: skip
        if compiled is not None:  # Triton's interpreter compiles nothing
            _compiled[kind] = compiled
        return
    width, height, depth = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(tensors[0].get_device())
    compiled.run(
        width, height, depth, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *pointers, *numbers, *constants, DEPENDENT,
    )  # fmt: skip
