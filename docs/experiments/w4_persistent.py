"""Second version of the small-M W4 linear (w4_persistent.cu): NF4 and affine, M = 1, 8, 16; see ../experiments.md.

python docs/experiments/w4_persistent.py [--json FILE]
"""

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from nf4_int8 import NF4, ROTATED_BYTES, SHAPES, pack_fragments, relative_error, time_rotating
from torch import Tensor

# (warps, chunks) by K; (stages, blocks a multiprocessor)
SLICES = {4096: ((16, 2), (8, 4), (32, 1)), 14336: ((16, 7), (8, 14), (28, 4), (14, 8))}
PIPES = ((6, 1), (5, 1), (4, 1), (3, 1), (4, 2), (3, 2))


def compile_one(config: tuple[int, ...]) -> bytes | None:
    affine, warps, chunks, nt, stages, per_sm = config
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        names = {
            "AFFINE": affine,
            "WARPS": warps,
            "CHUNKS": chunks,
            "NT": nt,
            "STAGES": stages,
            "BLOCKS_PER_SM": per_sm,
        }
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-o", str(cubin)]
        command += [f"-D{name}={value}" for name, value in names.items()]
        subprocess.run([*command, str(Path(__file__).with_suffix(".cu"))], check=True, capture_output=True)
        return cubin.read_bytes()


def shared_bytes(affine: int, warps: int, nt: int, stages: int) -> int:
    chunk = 1024 + 64 + (64 if affine else 0)
    return (0 if affine else 65536) + warps * stages * chunk + 2 * warps * nt * 512


def by_rows(values: Tensor) -> Tensor:
    """[K/64, N] -> [N/16, K/128, 8 g, 4] in the kernel's order of scales."""
    k, n = values.shape
    parts = values.view(k // 2, 2, n // 16, 2, 8)  # [chunk, tile, block, half, g]
    return parts.permute(2, 0, 4, 1, 3).contiguous()


def pack_affine(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] -> [N/16, K/64, 32 lanes, 4 words]; register r of a word in nibbles r and r + 4."""
    n, k = codes.shape
    tiles = codes.view(n // 16, 2, 8, k // 64, 4, 4, 2, 2)  # [block, half, g, tile, t, s, pair, low/high]
    order = tiles.permute(0, 3, 2, 4, 5, 7, 6, 1).contiguous()  # [block, tile, g, t, s, low/high, pair, half]
    nibbles = order.view(n // 16, k // 64, 32, 4, 8).long()
    words = (nibbles << (torch.arange(8, device=codes.device) * 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def main() -> None:
    import cupy

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    configs = []
    for affine in (0, 1):
        for k, slices in SLICES.items():
            for warps, chunks in slices:
                for nt in (1, 2):
                    for stages, per_sm in PIPES:
                        if (
                            shared_bytes(affine, warps, nt, stages) * per_sm > 227 * 1024
                            or warps * per_sm > 32
                        ):
                            continue
                        configs.append((k, (affine, warps, chunks, nt, stages, per_sm)))
    unique = sorted({config for _, config in configs})
    with ThreadPoolExecutor(16) as pool:
        cubins = dict(zip(unique, pool.map(compile_one, unique), strict=True))
    kernels: dict[tuple[int, ...], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for config, cubin in cubins.items():
            path = Path(folder) / f"{'_'.join(map(str, config))}.cubin"
            path.write_bytes(cubin or b"")
            kernels[config] = cupy.RawModule(path=str(path)).get_function("w4_persistent")
            kernels[config].max_dynamic_shared_size_bytes = shared_bytes(
                config[0], config[1], config[3], config[4]
            )
    print(f"{torch.cuda.get_device_name()}: {len(unique)} kernels compiled")
    results: list[dict[str, Any]] = []
    levels = torch.tensor(NF4, device="cuda")
    for name, (n, k) in SHAPES.items():
        copies = max(2, ROTATED_BYTES // (n * k // 2))
        codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        scale64 = (torch.rand(k // 64, n, device="cuda") * 0.05 + 0.01).half()
        scale128 = (torch.rand(k // 128, n, device="cuda") * 0.01 + 0.002).half()
        zero = torch.randint(0, 16, (k // 128, n), device="cuda").half()
        nf4 = (levels[codes.long()].view(n, k // 64, 64) * scale64.t()[:, :, None].float()).view(n, k)
        spread_out = codes.view(n, k // 128, 128).float() - zero.t()[:, :, None].float()
        affine_w = (spread_out * scale128.t()[:, :, None].float()).view(n, k)
        doubled = [t.repeat_interleave(2, 0) for t in (scale128, zero + 1024)]
        operands = {
            0: (pack_fragments(codes), by_rows(scale64), by_rows(scale64)),
            1: (pack_affine(codes), by_rows(doubled[0]), by_rows(doubled[1])),
        }
        for affine, tensors in operands.items():
            copied = [[t.clone() for t in tensors] for _ in range(copies)]
            for rows in (1, 8, 16):
                x = torch.randn(rows, k, device="cuda").half()
                want = x.double() @ (affine_w if affine else nf4).double().t()
                for at_k, config in configs:
                    if at_k != k or config[0] != affine or config[3] != (rows + 7) // 8:
                        continue
                    _, warps, _, nt, stages, per_sm = config
                    out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.float16)

                    def launch(i: int) -> None:
                        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
                            kernels[config](
                                (min(n // 16, 132 * per_sm),), (warps * 32,),
                                (*(cupy.uint64(t.data_ptr()) for t in copied[i]), cupy.uint64(x.data_ptr()),
                                 cupy.uint64(out.data_ptr()), cupy.int32(rows), cupy.int32(n)),
                                shared_mem=shared_bytes(affine, warps, nt, stages))  # fmt: skip

                    launch(0)
                    torch.cuda.synchronize()
                    error = relative_error(out, want)
                    us, spread = time_rotating([lambda i=i: launch(i) for i in range(copies)])
                    label = (
                        f"{'affine' if affine else 'nf4'} warps {warps} stages {stages} blocks/sm {per_sm}"
                    )
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
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))
    worst = max(r["error"] for r in results)
    print(f"largest relative error {worst:.1e}")
    for kind in ("nf4", "affine"):
        for rows in (1, 8, 16):
            total = 0.0
            for shape in SHAPES:
                chosen = [
                    r
                    for r in results
                    if r["shape"] == shape and r["rows"] == rows and r["variant"].startswith(kind)
                ]
                chosen.sort(key=lambda r: r["us"])
                total += chosen[0]["us"]
                tops = "; ".join(f"{r['us']:.2f} {r['variant'][len(kind) + 1 :]}" for r in chosen[:3])
                print(f"{kind:6s} M={rows:2d} {shape:8s} {tops}")
            print(f"{kind:6s} M={rows:2d} layer {total:.1f} us")


if __name__ == "__main__":
    main()
