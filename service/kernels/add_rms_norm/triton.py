"""The residual connection and its norm on CUDA: one kernel, which holds a row in registers."""

import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, cdiv, launch, next_power_of_2

ELEMENTS_PER_PROGRAM = 2048  # narrow rows share a program up to here
ELEMENTS_PER_WARP = 512  # two 16-byte loads a thread


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [num_rows, WIDTH]
    delta_ptr,
    weight_ptr,  # [WIDTH]
    total_ptr,
    normed_ptr,
    num_rows,
    eps,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    total = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    if ADDS:
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + delta.to(tl.float32)).to(total.dtype)
    tl.store(total_ptr + at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    rounded = (wide * scale[:, None]).to(total.dtype).to(tl.float32)
    tl.store(normed_ptr + at, (rounded * weight[None, :]).to(total.dtype), mask=inside)


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the package; rounded where the reference rounds."""
    hidden = hidden.contiguous()
    delta = hidden if delta is None else delta.contiguous()
    total, normed = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    width = hidden.shape[-1]
    num_rows = hidden.numel() // width
    columns = next_power_of_2(width)
    rows = max(1, ELEMENTS_PER_PROGRAM // columns)
    warps = min(16, max(1, rows * columns // ELEMENTS_PER_WARP))
    launch(
        add_rms_norm_kernel,
        (cdiv(num_rows, rows),),
        (hidden, delta, weight, total, normed),
        (num_rows, eps),
        (delta is not hidden, width, columns, rows),
        num_warps=warps,
    )
    return total, normed
