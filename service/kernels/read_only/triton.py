"""A kernel that only reads. It begins while its predecessor ends, as a linear may fetch its weight."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from service.kernels.launch import cdiv, launch


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(  # type: ignore[no-untyped-def]
    words_ptr,  # float32 [num_words], which no kernel writes
    sums_ptr,  # float32 [programs], so that nothing that is read can be left out
    num_words,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    if IS_DEPENDENT:
        gdc_launch_dependents()
    program = tl.program_id(0)
    total = tl.full((TILE,), 0.0, tl.float32)
    for start in range(program * TILE, num_words, PROGRAMS * TILE):
        places = start + tl.arange(0, TILE)
        total += tl.load(words_ptr + places, mask=places < num_words, other=0.0)
    if IS_DEPENDENT:
        gdc_wait()
    tl.store(sums_ptr + program, tl.sum(total, 0))


def reader(device: torch.device, tile: int, warps: int, max_programs: int) -> Callable[[Tensor], Tensor]:
    """Of float32 [n] on `device`, n under 2^31 -> float32 [programs], the same tensor each time."""
    sums = torch.zeros(max_programs, device=device)

    def read(words: Tensor) -> Tensor:
        programs = min(max_programs, cdiv(words.numel(), tile))
        launch(read_kernel, (programs,), (words, sums), (words.numel(),), (tile, programs), num_warps=warps)
        return sums[:programs]

    return read
