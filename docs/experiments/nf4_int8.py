"""First experiments on the quantized linears, before their interfaces freeze; outcomes in ../experiments.md.

1. How to decode NF4 in a kernel that reads the weights once (Llama-3.1-8B's four linears, M = 1, 16, 64):
   Triton with `tl.gather`, Triton with prmt on two byte tables, CUDA with prmt, CUDA with a table in shared
   memory; an affine W4 decode (lop3) beside them.
2. Where LLM.int8()'s outlier columns go at M = 1024: flagged K-blocks multiplied a second time in float16,
   or columns gathered beforehand and multiplied in the epilogue; 0, 3, 32, 256 outlier columns.

Every variant is checked against float64 on fresh random inputs with a poisoned output, then timed in a CUDA
graph over weights rotated past the L2 cache.

    python docs/experiments/nf4_int8.py [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from graph_times import capture, replays_us
from torch import Tensor

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
# fmt: off
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# fmt: on
ROTATED_BYTES = 256 << 20


def level_words() -> tuple[list[int], list[int]]:
    """The 16 float16 levels as four words of low bytes and four of high bytes."""
    bits = torch.tensor(NF4, dtype=torch.float16).view(torch.int16).int().tolist()
    low = [sum((bits[4 * i + j] & 255) << (8 * j) for j in range(4)) for i in range(4)]
    high = [sum(((bits[4 * i + j] >> 8) & 255) << (8 * j) for j in range(4)) for i in range(4)]
    return low, high


def prmt_assembly() -> str:
    """Two words (16 codes) -> eight float16 pairs; see `decode_prmt` in nf4_stream.cu for the idea."""
    low, high = level_words()
    lines = [".reg .b32 four, index, upper, keep, a, b, l, h;"]
    for word in range(2):
        for half in range(2):
            register = word * 4 + half * 2
            lines += [
                f"shr.b32 four, ${8 + word}, {16 * half};",
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
            lines += [f"prmt.b32 ${register}, l, h, 0x5140;", f"prmt.b32 ${register + 1}, l, h, 0x7362;"]
    return "{ " + " ".join(lines) + " }"


def lop3_assembly() -> str:
    """Two words -> eight pairs of float16 1024 + code; register r holds nibbles r % 4 and r % 4 + 4."""
    lines = [".reg .b32 shifted;"]
    for word in range(2):
        for i in range(4):
            lines += [
                f"shr.b32 shifted, ${8 + word}, {4 * i};",
                f"lop3.b32 ${word * 4 + i}, shifted, 0x000f000f, 0x64006400, 0xea;",  # (a & b) | c
            ]
    return "{ " + " ".join(lines) + " }"


PRMT, LOP3 = tl.constexpr(prmt_assembly()), tl.constexpr(lop3_assembly())
CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r")
HALVES = tl.constexpr((tl.float16,) * 8)


@triton.jit
def w4_linear(
    words, scales, zeros, levels, x, out, rows, N, K: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = sum over the split's k. A word's codes lie in eight slices of W features."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(1)
    row = tl.arange(0, TILE_M)
    slot = tl.arange(0, W)
    first: tl.constexpr = K // SPLITS
    words_at = words + n[:, None].to(tl.int64) * (K // 8) + split * (first // 8) + slot[None, :]
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    if MODE == "gather":
        table = tl.broadcast_to(tl.load(levels + tl.arange(0, 16))[None, :], [TILE_N, 16])
    for tile in range(0, first, 8 * W):
        packed = tl.load(words_at)
        if MODE == "prmt":
            slices = tl.inline_asm_elementwise(PRMT, CONSTRAINTS, [packed], HALVES, is_pure=True, pack=2)
        elif MODE == "lop3":
            slices = tl.inline_asm_elementwise(LOP3, CONSTRAINTS, [packed], HALVES, is_pure=True, pack=2)
        k = split * first + tile
        for r in tl.static_range(8):
            activations = tl.load(
                x + row[None, :] * K + (k + r * W + slot)[:, None], mask=row[None, :] < rows, other=0.0
            )
            scale = tl.load(scales + (k + r * W) // GROUP * N + n)
            if MODE == "gather":
                weight = tl.gather(table, (packed >> (4 * r)) & 15, 1) * scale[:, None]
            elif MODE == "prmt":
                weight = slices[r] * scale[:, None]
            else:
                zero = tl.load(zeros + (k + r * W) // GROUP * N + n)
                weight = (slices[r] - zero[:, None]) * scale[:, None]
            total = tl.dot(weight, activations, total)
        words_at += W
    at = out + split.to(tl.int64) * rows * N + row[None, :] * N + n[:, None]
    tl.store(at, total, mask=row[None, :] < rows)


@triton.jit
def add_splits(parts, out, size, SPLITS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def int8_linear(
    x, w, x_scale, w_scale, x_outliers, w_outliers, count, flags, out, M, N, K: tl.constexpr,
    MODE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """s8 x s8 -> s32, scaled; outliers by MODE: `none`, `gathered` (x_outliers [M, PADDED], w_outliers
    [N, PADDED]) or `flagged` (x_outliers [M, K], zero outside outlier columns; flags [K / TILE_K])."""
    tiles_m = tl.cdiv(M, TILE_M)
    program = tl.program_id(0)
    m = (program % tiles_m) * TILE_M + tl.arange(0, TILE_M)
    n = (program // tiles_m) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    x_at = x + m[:, None] * K + k[None, :]
    w_at = w + n[None, :] * K + k[:, None]
    total = tl.zeros([TILE_M, TILE_N], tl.int32)
    extra = tl.zeros([TILE_M, TILE_N], tl.float32)
    for block in range(0, K // TILE_K):
        weight = tl.load(w_at)
        total = tl.dot(tl.load(x_at), weight, total, out_dtype=tl.int32)
        if MODE == "flagged":
            if tl.load(flags + block) != 0:
                outlier = tl.load(x_outliers + m[:, None] * K + block * TILE_K + k[None, :])
                extra = tl.dot(outlier, weight.to(tl.float16), extra)
        x_at += TILE_K
        w_at += TILE_K
    result = total.to(tl.float32) * tl.load(x_scale + m)[:, None]
    if MODE == "flagged":
        result += extra
    if MODE == "gathered":
        columns = tl.arange(0, 32)
        for start in range(0, tl.load(count), 32):
            a = tl.load(x_outliers + m[:, None] * PADDED + (start + columns)[None, :])
            b = tl.load(w_outliers + n[None, :] * PADDED + (start + columns)[:, None])
            result = tl.dot(a, b, result)
    result *= tl.load(w_scale + n)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], result.to(tl.float16))


@triton.jit
def gather_columns(w, columns, count, out, N, K, PADDED: tl.constexpr, TILE: tl.constexpr):
    """Outlier columns of the int8 weight as float16 codes [N, PADDED]; zeros past `count`."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    for start in range(0, tl.cdiv(tl.load(count), 32) * 32, 32):
        at = start + tl.arange(0, 32)
        live = at < tl.load(count)
        column = tl.load(columns + at, mask=live, other=0)
        value = tl.load(w + n[:, None].to(tl.int64) * K + column[None, :], mask=live[None, :], other=0)
        tl.store(out + n[:, None] * PADDED + at[None, :], value.to(tl.float16))


def time_rotating(launches: list[Callable[[], Any]], repeats: int = 30) -> tuple[float, float]:
    """Median microseconds of one launch and the spread of the medians' sample, from one graph of all."""
    times = [us / len(launches) for us in replays_us(capture(launches), repeats)]
    return statistics.median(times), max(times) - min(times)


def pack(codes: Tensor, mode: str, w: int) -> Tensor:
    """uint8 codes [N, K] -> int32 words [N, K / 8] in the layout that `mode` decodes."""
    n, k = codes.shape
    sliced = codes.view(n, k // (8 * w), 8, w).int()  # [N, tile, slice r, slot]
    if mode == "gather":
        nibbles = sliced.transpose(2, 3)  # nibble r of word `slot` belongs to slice r
    else:
        pairs = sliced.view(n, k // (8 * w), 2, 4, w // 2, 2)  # slice = 4 * word parity + r, slot = 2p + j
        pairs = pairs.permute(0, 1, 4, 2, 3, 5)  # [N, tile, p, parity, r, j]
        if mode == "lop3":
            pairs = pairs.transpose(4, 5)  # nibble 4j + r
        nibbles = pairs.reshape(n, k // (8 * w), w, 8)
    shifts = torch.arange(8, device=codes.device, dtype=torch.int64) * 4
    words = (nibbles.long() << shifts).sum(-1).reshape(n, k // 8)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def pack_fragments(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] -> bytes [N/16, K/64, 32 lanes, 4 words, 4 bytes] as nf4_stream.cu draws them."""
    n, k = codes.shape
    tiles = codes.view(n // 16, 2, 8, k // 64, 4, 4, 2, 2)  # [block, half, g, tile, t, s, pair, low/high]
    order = tiles.permute(0, 3, 2, 4, 5, 6, 1, 7)  # [block, tile, g, t, s, pair, half, low/high]
    return (order[..., 0] | (order[..., 1] << 4)).contiguous().view(n // 16, k // 64, 32, 16)


def compile_cuda(decode: int, nt: int, rt: int, warps: int, unroll: int) -> Any:
    import cupy

    source = Path(__file__).with_name("nf4_stream.cu")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        defines = [f"-DDECODE={decode}", f"-DNT={nt}", f"-DRT={rt}", f"-DWARPS={warps}", f"-DUNROLL={unroll}"]
        command = [
            "nvcc",
            "-cubin",
            "-gencode=arch=compute_90a,code=sm_90a",
            *defines,
            "-o",
            str(cubin),
            str(source),
        ]
        subprocess.run(command, check=True, capture_output=True)
        return cupy.RawModule(path=str(cubin)).get_function("nf4_stream")


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def nf4_experiment(
    results: list[dict[str, Any]], shapes: list[str], all_rows: list[int], compile_only: bool
) -> None:
    import cupy

    levels = torch.tensor(NF4, device="cuda")
    triton_configs = [
        (mode, tile_n, w, splits, warps, stages)
        for mode in ("gather", "prmt", "lop3")
        for tile_n, w, splits, warps, stages in (
            (64, 32, 1, 4, 3), (64, 32, 2, 4, 3), (64, 32, 4, 4, 3), (128, 32, 2, 8, 3), (64, 64, 2, 4, 3),
        )
        if mode != "gather" or (tile_n, w, splits) in ((64, 32, 1), (64, 32, 2))
    ]  # fmt: skip
    cuda_configs = {  # (decode, nt, rt, warps, unroll, blocks a multiprocessor or 0 for all)
        1: [(0, 1, 1, 8, 4, 0), (0, 1, 1, 8, 8, 0), (0, 1, 2, 8, 4, 0), (0, 1, 1, 4, 8, 0), (0, 1, 1, 8, 4, 4),
            (1, 1, 1, 8, 4, 4), (1, 1, 2, 8, 4, 3), (0, 1, 2, 4, 4, 0)],
        16: [(0, 2, 2, 8, 2, 0), (0, 2, 4, 4, 2, 0), (0, 2, 2, 4, 4, 0), (0, 2, 1, 8, 4, 0)],
        64: [],
    }  # fmt: skip
    compiled: dict[tuple[int, ...], Any] = {}
    for name in shapes:
        n, k = SHAPES[name]
        copies = 1 if compile_only else max(2, ROTATED_BYTES // (n * k // 2))
        codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        scale64 = (torch.rand(k // 64, n, device="cuda") * 0.05 + 0.01).half()
        scale128 = (torch.rand(k // 128, n, device="cuda") * 0.01 + 0.002).half()
        zero = torch.randint(0, 16, (k // 128, n), device="cuda")
        dense = levels[codes.long()].view(n, k // 64, 64) * scale64.t()[:, :, None].float()
        dense_nf4 = dense.view(n, k)
        affine = (codes.view(n, k // 128, 128).float() - zero.t()[:, :, None]) * scale128.t()[
            :, :, None
        ].float()
        dense_affine = affine.view(n, k)
        biased_zero = (zero + 1024).half()
        level_halves = levels.half()
        for rows in all_rows:
            x = torch.randn(rows, k, device="cuda").half()
            want = {True: x.double() @ dense_affine.double().t(), False: x.double() @ dense_nf4.double().t()}
            tile_m = max(16, rows)
            for mode, tile_n, w, splits, warps, stages in triton_configs:
                if k % (8 * w * splits) or n % tile_n:
                    continue
                group, scale = (128, scale128) if mode == "lop3" else (64, scale64)
                if w > group:
                    continue
                packed = pack(codes, mode, w)
                weights = [packed.clone() for _ in range(copies)]
                scales = [scale.clone() for _ in range(copies)]
                parts = torch.full((splits, rows, n), float("nan"), device="cuda")
                out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.float16)

                def launch(i: int) -> None:
                    w4_linear[(n // tile_n, splits)](
                        weights[i], scales[i], biased_zero, level_halves, x, parts, rows, n, k, group, tile_m,
                        tile_n, w, splits, mode, num_warps=warps, num_stages=stages)  # fmt: skip
                    add_splits[(triton.cdiv(rows * n, 1024),)](parts, out, rows * n, splits, 1024)

                label = f"triton {mode} {tile_n}x{w} split {splits} warps {warps} stages {stages}"
                try:
                    launch(0)
                except Exception as error:  # a shape that Triton cannot compile is a result, too
                    print(f"{name} M={rows} {label}: {type(error).__name__} {str(error)[:100]}")
                    continue
                if compile_only:
                    continue
                error = relative_error(out, want[mode == "lop3"])
                us, spread = time_rotating([lambda i=i: launch(i) for i in range(copies)])
                results.append(
                    {
                        "shape": name,
                        "rows": rows,
                        "variant": label,
                        "us": us,
                        "spread": spread,
                        "error": error,
                    }
                )
            fragments = pack_fragments(codes)
            absmax = scale64.view(k // 64, n // 16, 16).permute(1, 0, 2).contiguous()
            for config in () if compile_only else cuda_configs[rows]:
                decode, nt, rt, warps, unroll, per_sm = config
                if (k // 64) % warps:
                    continue
                kernel = compiled.get(config[:5]) or compiled.setdefault(
                    config[:5], compile_cuda(*config[:5])
                )
                weights = [fragments.clone() for _ in range(copies)]
                scales = [absmax.clone() for _ in range(copies)]
                out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.float16)
                shared = warps * rt * nt * 512 + (32768 if decode else 0)
                kernel.max_dynamic_shared_size_bytes = shared
                blocks = n // 16 // rt if per_sm == 0 else min(n // 16 // rt, 132 * per_sm)

                def launch_cuda(i: int) -> None:
                    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                        kernel((blocks,), (warps * 32,),
                               (cupy.uint64(weights[i].data_ptr()), cupy.uint64(scales[i].data_ptr()),
                                cupy.uint64(x.data_ptr()), cupy.uint64(out.data_ptr()),
                                cupy.int32(rows), cupy.int32(n), cupy.int32(k)), shared_mem=shared)  # fmt: skip

                launch_cuda(0)
                torch.cuda.synchronize()
                error = relative_error(out, want[False])
                us, spread = time_rotating([lambda i=i: launch_cuda(i) for i in range(copies)])
                label = f"cuda {'table' if decode else 'prmt'} nt {nt} rt {rt} warps {warps} unroll {unroll} blocks/sm {per_sm}"
                results.append(
                    {
                        "shape": name,
                        "rows": rows,
                        "variant": label,
                        "us": us,
                        "spread": spread,
                        "error": error,
                    }
                )


def int8_experiment(results: list[dict[str, Any]], compile_only: bool) -> None:
    rows = 1024
    for name in ("gate_up", "down"):
        n, k = SHAPES[name]
        copies = 1 if compile_only else max(2, ROTATED_BYTES // (n * k))
        w = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        weights = [w.clone() for _ in range(copies)]
        x = torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8)
        x_scale, w_scale = torch.rand(rows, device="cuda") * 1e-2, torch.rand(n, device="cuda") * 1e-2
        out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.float16)
        us, spread = time_rotating([lambda i=i: torch._int_mm(x, weights[i].t()) for i in range(copies)])
        results.append(
            {
                "shape": name,
                "rows": rows,
                "variant": "torch._int_mm, int32 out",
                "us": us,
                "spread": spread,
                "error": 0.0,
            }
        )
        wide = torch.randn(rows, k, device="cuda").half()
        wide_w = [torch.randn(n, k, device="cuda").half() for _ in range(2)]
        us, spread = time_rotating([lambda i=i: torch.mm(wide, wide_w[i].t()) for i in range(2)])
        results.append(
            {"shape": name, "rows": rows, "variant": "cuBLAS fp16", "us": us, "spread": spread, "error": 0.0}
        )
        for outliers in (0, 3, 32, 256):
            columns = torch.randperm(k, device="cuda")[:outliers].sort().values.int()
            padded = max(32, triton.cdiv(outliers, 32) * 32)
            listed = torch.zeros(padded, device="cuda", dtype=torch.int32)
            listed[:outliers] = columns
            count = torch.tensor([outliers], device="cuda", dtype=torch.int32)
            outlier_x = torch.zeros(rows, padded, device="cuda", dtype=torch.float16)
            outlier_x[:, :outliers] = torch.randn(rows, outliers, device="cuda").half() * 8
            sparse_x = torch.zeros(rows, k, device="cuda", dtype=torch.float16)
            sparse_x[:, columns.long()] = outlier_x[:, :outliers]
            regular = x.clone()
            regular[:, columns.long()] = 0
            want = regular[:64].double() @ w.double().t() * x_scale[:64, None].double()
            want = (want + sparse_x[:64].double() @ w.double().t()) * w_scale.double()
            outlier_w = torch.zeros(n, padded, device="cuda", dtype=torch.float16)
            for mode, tile_m, tile_n, tile_k, warps, stages in (
                ("none", 128, 256, 128, 8, 3), ("none", 128, 128, 128, 8, 4), ("gathered", 128, 256, 128, 8, 3),
                ("gathered", 128, 128, 128, 8, 4), ("gathered", 128, 128, 128, 4, 4), ("flagged", 128, 128, 128, 8, 3),
                ("flagged", 128, 128, 64, 8, 4),
            ):  # fmt: skip
                if mode == "none" and outliers:
                    continue
                flags = torch.zeros(k // tile_k, device="cuda", dtype=torch.int32)
                flags[columns.long() // tile_k] = 1
                source = sparse_x if mode == "flagged" else outlier_x
                out.fill_(float("nan"))

                def launch(i: int) -> None:
                    if mode == "gathered":
                        gather_columns[(n // 128,)](weights[i], listed, count, outlier_w, n, k, padded, 128)
                    int8_linear[(triton.cdiv(rows, tile_m) * (n // tile_n),)](
                        regular, weights[i], x_scale, w_scale, source, outlier_w, count, flags, out, rows, n, k,
                        mode, tile_m, tile_n, tile_k, padded, num_warps=warps, num_stages=stages)  # fmt: skip

                label = (
                    f"{mode} {tile_m}x{tile_n}x{tile_k} warps {warps} stages {stages}, {outliers} outliers"
                )
                try:
                    launch(0)
                    if compile_only:
                        continue
                    error = relative_error(out[:64], want)
                    us, spread = time_rotating([lambda i=i: launch(i) for i in range(copies)], repeats=15)
                except Exception as failure:
                    print(f"{name} {label}: {type(failure).__name__} {str(failure)[:100]}")
                    continue
                results.append(
                    {
                        "shape": name,
                        "rows": rows,
                        "variant": label,
                        "us": us,
                        "spread": spread,
                        "error": error,
                    }
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,16,64", help="rows of the NF4 experiment; empty: none")
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache, time nothing")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    results: list[dict[str, Any]] = []
    all_rows = [int(r) for r in arguments.rows.split(",") if r]
    nf4_experiment(results, arguments.shapes.split(","), all_rows, arguments.compile_only)
    if not arguments.no_int8:
        int8_experiment(results, arguments.compile_only)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))
    for shape, rows in sorted({(r["shape"], r["rows"]) for r in results}):
        chosen = sorted(
            (r for r in results if (r["shape"], r["rows"]) == (shape, rows)), key=lambda r: r["us"]
        )
        shown = (
            chosen if rows == 1024 else chosen[:6] + [r for r in chosen[6:] if "gather" in r["variant"]][:1]
        )
        for r in shown:
            print(
                f"{shape:8s} M={rows:5d} {r['us']:9.2f} us +-{r['spread']:6.2f} error {r['error']:.1e}  {r['variant']}"
            )


if __name__ == "__main__":
    main()
