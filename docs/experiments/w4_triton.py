"""The W4 product in Triton on the layout of w4_layout.py: the fallback for other GPUs, and an oracle.

y^T = W x^T: a load of [blocks of 16 outputs, 8 g, 4 t, 4 words] gives each thread the words of wgmma's register
operand, so that decoding stays inside a thread. Shares of K are added by a second kernel, in order.

ASSEMBLY decodes by lop3 or prmt in inline PTX; without it by plain integer operations (Triton's interpreter, other
GPUs).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from w4_problem import NF4, Problem

LEVELS = torch.tensor(NF4, dtype=torch.float16).view(torch.int16).int().tolist()


def table_words(shift: int) -> list[int]:
    return [sum((LEVELS[4 * i + j] >> shift & 255) << 8 * j for j in range(4)) for i in range(4)]


def nf4_assembly() -> str:
    """word, scale of row g, scale of row g + 8 (float16 twice) -> registers 0 to 3, scaled."""
    low, high = table_words(0), table_words(8)
    lines = [".reg .b32 four, index, upper, a, b, l, h, p, q;"]
    for half in range(2):
        lines += [
            f"shr.b32 four, $4, {16 * half};",
            "and.b32 index, four, 0x7777;",
            "shr.b32 upper, four, 3;",
            "and.b32 upper, upper, 0x1111;",
            "prmt.b32 upper, 0xff00, 0, upper;",
        ]
        for name, table in (("l", low), ("h", high)):
            lines += [
                f"prmt.b32 a, {table[0]:#x}, {table[1]:#x}, index;",
                f"prmt.b32 b, {table[2]:#x}, {table[3]:#x}, index;",
                f"lop3.b32 {name}, a, b, upper, 0xd8;",  # upper ? b : a
            ]
        lines += ["prmt.b32 p, l, h, 0x5140;", "prmt.b32 q, l, h, 0x7362;"]
        lines += [f"mul.rn.f16x2 ${2 * half}, p, $5;", f"mul.rn.f16x2 ${2 * half + 1}, q, $6;"]
    return "{ " + " ".join(lines) + " }"


def affine_assembly() -> str:
    """word, scales as above, 1024 + zero of row g, -(64 + zero) of row g + 8 -> registers 0 to 3, scaled."""
    lines = [".reg .b32 upper, v;", "shr.b32 upper, $4, 8;"]
    for half, word in enumerate(("$4", "upper")):
        lines += [
            f"lop3.b32 v, {word}, 0x000f000f, 0x64006400, 0xea;",
            "sub.rn.f16x2 v, v, $7;",
            f"mul.rn.f16x2 ${2 * half}, v, $5;",
            f"lop3.b32 v, {word}, 0x00f000f0, 0x64006400, 0xea;",
            "fma.rn.f16x2 v, v, 0x2c002c00, $8;",
            f"mul.rn.f16x2 ${2 * half + 1}, v, $6;",
        ]
    # a literal operand of fma wants a register
    text = "{ .reg .b32 sixteenth; mov.b32 sixteenth, 0x2c002c00; " + " ".join(lines) + " }"
    return text.replace("v, v, 0x2c002c00,", "v, v, sixteenth,")


NF4_ASSEMBLY, AFFINE_ASSEMBLY = tl.constexpr(nf4_assembly()), tl.constexpr(affine_assembly())
NF4_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
AFFINE_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")
FOUR_WORDS = tl.constexpr((tl.int32, tl.int32, tl.int32, tl.int32))


@triton.jit
def twice(value):
    """float16 -> int32 that holds it twice."""
    bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (bits | bits << 16).to(tl.int32, bitcast=True)


@triton.jit
def halves(pair):
    """int32 -> its two float16, low first, in a new last dimension."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = (pair >> 16 & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def w4_product(
    codes, scales, zeros, nested, map, levels, x, out, rows, N, K, share, offset0, offset1, offset2,
    begin1, begin2, first0, first1, first2, AFFINE: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] over the split's share of K; BLOCKS blocks of 16 outputs, TILE rows of x."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    split = tl.program_id(2)
    blocks, tiles = N // 16, K // 64
    g, t, s = tl.arange(0, 8), tl.arange(0, 4), tl.arange(0, 4)
    inside = (g[None, :, None, None] * 4 + t[None, None, :, None]) * 4 + s[None, None, None, :]
    words_at = codes + block[:, None, None, None].to(tl.int64) * (tiles * 128) + inside
    row_at = block[:, None, None, None] * 8 + g[None, :, None, None]  # [BLOCKS, 8, 1, 1]
    if not AFFINE:
        here = block[:, None, None, None]
        offset = tl.where(here >= begin2, offset2, tl.where(here >= begin1, offset1, offset0))
        start = tl.where(here >= begin2, begin2, tl.where(here >= begin1, begin1, 0))
        first = tl.where(here >= begin2, first2, tl.where(here >= begin1, first1, first0))
        absmax_row = first + ((here - start) * 16 + g[None, :, None, None]) * tiles
    total = tl.zeros([BLOCKS * 16, TILE], tl.float32)
    for step in range(share):
        tile = split * share + step
        word = tl.load(words_at + tile * 128)
        activations = tl.load(
            x + m[None, :] * K + (tile * 64 + tl.arange(0, 64))[:, None], mask=m[None, :] < rows, other=0.0
        )
        if AFFINE:
            at = tile // 2 * blocks * 8 + row_at
            low, high = tl.load(scales + at * 2), tl.load(scales + at * 2 + 1)
            both = tl.load(zeros + at).to(tl.int32)
        else:
            at = (tile * blocks * 8 + row_at) * 2
            near = tl.load(nested + ((absmax_row + tile) >> 8))
            far = tl.load(nested + ((absmax_row + 8 * tiles + tile) >> 8))
            low = (tl.load(map + tl.load(scales + at).to(tl.int32)) * near + offset).to(tl.float16)
            high = (tl.load(map + tl.load(scales + at + 1).to(tl.int32)) * far + offset).to(tl.float16)
        if ASSEMBLY and AFFINE:
            r0, r1, r2, r3 = tl.inline_asm_elementwise(
                AFFINE_ASSEMBLY, AFFINE_CONSTRAINTS,
                [word, twice(low), twice(high), (both & 15) * 0x10001 + 0x64006400, (both & 0xF0) * 0x10001 - 0x2BFF2C00],
                FOUR_WORDS, is_pure=True, pack=1)  # fmt: skip
        elif ASSEMBLY:
            r0, r1, r2, r3 = tl.inline_asm_elementwise(
                NF4_ASSEMBLY,
                NF4_CONSTRAINTS,
                [word, twice(low), twice(high)],
                FOUR_WORDS,
                is_pure=True,
                pack=1,
            )
        if ASSEMBLY:  # [BLOCKS, g, t, s, pair, row half, k half]
            weight = tl.join(tl.join(halves(r0), halves(r2)), tl.join(halves(r1), halves(r3)))
            weight = tl.permute(weight, (0, 1, 2, 3, 4, 6, 5))
        else:
            low, high = tl.broadcast_to(low, word.shape), tl.broadcast_to(high, word.shape)
            if AFFINE:
                a, b = (both & 15).to(tl.float16), (both >> 4).to(tl.float16)
                r0 = tl.join(
                    ((word & 15).to(tl.float16) - a) * low, ((word >> 16 & 15).to(tl.float16) - a) * low
                )
                r1 = tl.join(
                    ((word >> 4 & 15).to(tl.float16) - b) * high,
                    ((word >> 20 & 15).to(tl.float16) - b) * high,
                )
                r2 = tl.join(
                    ((word >> 8 & 15).to(tl.float16) - a) * low, ((word >> 24 & 15).to(tl.float16) - a) * low
                )
                r3 = tl.join(
                    ((word >> 12 & 15).to(tl.float16) - b) * high,
                    ((word >> 28 & 15).to(tl.float16) - b) * high,
                )
            else:
                r0 = tl.join(tl.load(levels + (word & 15)) * low, tl.load(levels + (word >> 4 & 15)) * low)
                r1 = tl.join(
                    tl.load(levels + (word >> 8 & 15)) * high, tl.load(levels + (word >> 12 & 15)) * high
                )
                r2 = tl.join(
                    tl.load(levels + (word >> 16 & 15)) * low, tl.load(levels + (word >> 20 & 15)) * low
                )
                r3 = tl.join(
                    tl.load(levels + (word >> 24 & 15)) * high, tl.load(levels + (word >> 28 & 15)) * high
                )
            weight = tl.permute(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (0, 1, 2, 3, 4, 6, 5))
        # [block, g, t, s, pair, row half, k half] -> [block, row half, g][s, k half, t, pair]
        weight = tl.permute(weight, (0, 5, 1, 3, 6, 2, 4)).reshape(BLOCKS * 16, 64)
        total = tl.dot(weight, activations, total)
    n = tl.program_id(0) * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)
    at = out + split.to(tl.int64) * rows * N + m[None, :] * N + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=m[None, :] < rows)


@triton.jit
def add_shares(parts, out, size, SPLITS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def linear(
    x: Tensor, problem: Problem, operands: tuple[Tensor, ...], affine: int, y: Tensor, tile: int, warps: int, stages: int,
    assembly: bool = True,
) -> None:  # fmt: skip
    """y[:] = x W^T for x [rows, K]; `tile` rows of x at a time, K shared out until every multiprocessor has work."""
    rows, (n, k) = x.shape[0], (problem.n, problem.k)
    blocks = 8 if n % 128 == 0 else n // 16
    programs = n // (blocks * 16) * -(-rows // tile)
    splits = 1
    while programs * splits < 96 and k // 64 % (splits * 4) == 0:
        splits *= 2
    codes, scales, zeros, nested = operands
    starts = [0]
    for out in problem.outs[:-1]:
        starts.append(starts[-1] + out // 16)
    firsts = [0]
    for part in problem.nested[:-1]:
        firsts.append(firsts[-1] + part.numel() * 256)
    beyond = 1 << 30
    starts, firsts = (starts + [beyond] * 3)[:3], (firsts + [0] * 3)[:3]
    offsets = (problem.offsets + [0.0] * 3)[:3]
    target = y if splits == 1 else torch.empty(splits, rows, n, device=y.device)
    levels = torch.tensor(NF4, device=y.device).half() if not assembly else problem.map
    w4_product[(n // (blocks * 16), -(-rows // tile), splits)](
        codes.view(torch.int32), scales, zeros, nested, problem.map, levels, x, target, rows, n, k, k // 64 // splits, *offsets, *starts[1:],
        *firsts, affine, blocks, tile, assembly, num_warps=warps, num_stages=stages)  # fmt: skip
    if splits > 1:
        add_shares[(triton.cdiv(rows * n, 1024),)](target, y, rows * n, splits, 1024)


def check() -> None:
    """In the interpreter (TRITON_INTERPRET=1), on a CPU."""
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def patch_tensor(
        tensor: Any, scope: Any
    ) -> None:  # numpy no longer takes int() of an array of one element
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor
    torch.manual_seed(0)
    problem = Problem(128, 512, "cpu", parts=(64, 32, 32))
    for affine in (0, 1):
        x = torch.randn(9, 512).half()
        y = torch.full((9, 128), float("nan"), dtype=torch.float16)
        linear(x, problem, problem.affine if affine else problem.nf4, affine, y, 16, 4, 3, assembly=False)
        want = x.double() @ problem.dense(affine).double().t()
        print(f"affine {affine}: {float((y.double() - want).norm() / want.norm()):.1e}")


if __name__ == "__main__":
    check()
