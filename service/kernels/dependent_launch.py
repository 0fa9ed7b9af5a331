"""Programmatic dependent launch: a kernel is placed on the device while the one before it still works.

Every Triton kernel of a step begins with `await_predecessor`, so that what it reads is complete and what it
overwrites is no longer read; only what no kernel writes (a weight) may be fetched before. The call comes
first and unconditionally: a program that ends without it would let its successor overtake its predecessor.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ENABLED = False  # for kernels launched or captured from now on


@triton.jit  # type: ignore[untyped-decorator]
def await_predecessor(is_dependent: tl.constexpr):  # type: ignore[no-untyped-def]
    if is_dependent:
        gdc_wait()
        gdc_launch_dependents()
