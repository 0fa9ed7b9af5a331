"""The gate of the MLP on CUDA: one kernel over tiles of a row."""

import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, cdiv, launch

TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def gated_silu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,  # [rows, 2 * WIDTH]
    out_ptr,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    gate = tl.load(gate_up_ptr + row * (2 * WIDTH) + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * WIDTH) + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * WIDTH + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


def gated_silu(gate_up: Tensor) -> Tensor:
    """See the package; computed in float32 and rounded once."""
    gate_up = gate_up.contiguous()
    rows, both = gate_up.shape
    width = both // 2
    out = gate_up.new_empty(rows, width)
    launch(gated_silu_kernel, (rows, cdiv(width, TILE)), (gate_up, out), (), (width, TILE))
    return out
