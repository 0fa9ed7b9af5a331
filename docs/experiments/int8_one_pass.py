"""LLM.int8() by row in one captured pass, and FP8 W8A8: which kernels for which rows; see ../experiments.md.

    python docs/experiments/int8_one_pass.py [--json FILE]      # on a GPU: compiles in parallel, checks, times
    python docs/experiments/int8_one_pass.py --compile          # anywhere: registers and spills for sm_90
    python docs/experiments/int8_one_pass.py --check            # numbers, small shapes; without a GPU interpreted

Every variant is checked against float64 on fresh random inputs with a poisoned output, then timed in a CUDA
graph over weights rotated past the L2 cache. Outliers: each listed column in every second row.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import int8_kernels as kernels
import torch
import triton
from nf4_int8 import ROTATED_BYTES, SHAPES, relative_error, time_rotating
from torch import Tensor

from service.kernels.int8_linear import reference

THRESHOLD, FP8_MOST = 6.0, 448.0
COUNTS = (32, 0, 3, 256)  # outlier columns; the first decides which variants are timed at the others
ROWS = (1, 16, 64, 256, 1024)
# (TILE_N, TILE_K, warps, stages) of the weight as left operand; splits of K so that about 128 programs are there
FEW = {
    1: ((64, 256, 4, 3), (64, 256, 4, 4), (64, 512, 4, 3), (128, 256, 4, 3), (128, 128, 4, 5)),
    16: ((64, 256, 4, 3), (64, 128, 4, 6), (128, 128, 4, 4), (128, 256, 8, 2)),
    64: ((64, 128, 4, 4), (64, 256, 4, 2), (128, 128, 8, 3), (128, 128, 8, 4)),
    256: ((64, 128, 8, 3), (64, 128, 8, 4)),
}
# (TILE_M, TILE_N, TILE_K, TILE_O, warps, stages, bulk copies)
MANY = {
    256: ((128, 128, 128, 32, 8, 4, True), (64, 128, 128, 32, 4, 4, True), (128, 128, 128, 32, 8, 4, False),
          (128, 256, 128, 16, 8, 3, True)),
    1024: ((128, 256, 128, 16, 8, 3, True), (128, 256, 128, 16, 8, 3, False), (128, 256, 128, 16, 8, 4, True),
           (128, 128, 128, 32, 8, 4, True)),
}  # fmt: skip


@dataclass
class Problem:
    """One linear: inputs of every variant, and what they must come to for the first rows."""

    name: str
    rows: int
    n: int
    k: int
    count: int
    device: str
    copies: int
    tensors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        t, device, shape = self.tensors, self.device, (self.n, self.k)
        t["w"] = torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
        t["w_steps"] = torch.rand(self.n, device=device) * 1e-3 + 1e-4
        x = torch.randn(self.rows, self.k, device=device).clamp_(-5.5, 5.5)
        listed = torch.randperm(self.k, device=device)[: self.count].sort().values
        has = (torch.arange(self.rows, device=device)[:, None] + listed[None, :]) % 2 == 0
        lifted = torch.empty(has.shape, device=device).uniform_(6, 60) * torch.where(x[:, listed] < 0, -1, 1)
        x[:, listed] = torch.where(has, lifted, x[:, listed])
        t["x16"] = x.half()
        found = (t["x16"].abs() >= THRESHOLD).any(0).nonzero()[:, 0].int()
        t["columns"] = torch.zeros(self.k, device=device, dtype=torch.int32)
        t["columns"][: len(found)] = found
        t["count"] = torch.tensor([len(found)], device=device, dtype=torch.int32)
        t["stack"], t["stack_steps"] = stacked(t["x16"])
        t["codes"], t["steps"] = t["stack"][: self.rows], t["stack_steps"][: self.rows]
        wide = t["x16"].float()
        t["fp8_steps"] = wide.abs().amax(1) / FP8_MOST
        t["x8"] = (wide / t["fp8_steps"][:, None]).to(torch.float8_e4m3fn)
        t["w8"] = (torch.randn(shape, device=device) * 60).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
        self.weights = [t["w"].clone() for _ in range(self.copies)]
        self.weights8 = [t["w8"].clone() for _ in range(self.copies)]
        self.out = torch.empty(self.rows, self.n, device=device, dtype=torch.float16)
        self.parts = torch.empty(8, self.rows, self.n, device=device)
        self.arrived = torch.zeros(self.n // 16, device=device, dtype=torch.int32)
        self.padded = max(32, triton.cdiv(self.count, 32) * 32)
        self.side = torch.empty(self.n, self.padded, device=device, dtype=torch.float16)

    def want(self, integer: bool, rows: int = 64) -> Tensor:
        """Of the first rows, in float64; outliers as they are."""
        t = self.tensors
        if not integer:
            y = t["x8"][:rows].double() @ t["w8"].double().t() * t["fp8_steps"][:rows, None].double()
            return y * t["w_steps"].double()
        outliers = t["x16"][:rows].double()
        outliers = torch.where(outliers.abs() >= THRESHOLD, outliers, 0)
        x = t["codes"][:rows].double() * t["steps"][:rows, None].double() + outliers
        return x @ t["w"].double().t() * t["w_steps"].double()


def stacked(x16: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [3 rows, K] and steps [3 rows] as torch makes them (service/kernels/int8_linear/reference.py)."""
    x = x16.float()
    is_outlier = x.abs() >= THRESHOLD
    codes, step = reference.quantize(x.masked_fill(is_outlier, 0))
    outliers = x.masked_fill(~is_outlier, 0)
    coarse, coarse_step = reference.quantize(outliers)
    fine = reference.divided(outliers - coarse * coarse_step, coarse_step / 254)
    return torch.cat((codes, coarse, fine)), torch.cat((step, coarse_step, coarse_step / 254))[:, 0]


@dataclass
class Variant:
    kind: str  # int8 or fp8
    label: str
    launch: Callable[
        [int], Any
    ]  # with weights of this number; returns y where it does not fill `Problem.out`
    checked: bool = True


def splits_of(n: int, k: int, tile_n: int, tile_k: int) -> int:
    splits = 1
    while splits < 8 and n // tile_n * splits < 128 and k % (2 * splits * tile_k) == 0:
        splits *= 2
    return splits


def few(p: Problem, config: tuple[int, ...], kind: str) -> Variant | None:
    """`stacked`, `listed` (int8) or `fp8`."""
    tile_n, tile_k, warps, stages = config
    t, integer, levels = p.tensors, kind != "fp8", 3 if kind == "stacked" else 1
    if p.n % tile_n or p.k % tile_k:
        return None
    rows = max(4 if levels == 3 else 16, triton.next_power_of_2(p.rows))
    splits = splits_of(p.n, p.k, tile_n, tile_k)
    x, steps = (
        (t["x8"], t["fp8_steps"]) if not integer else (t["stack"], t["stack_steps"]) if levels == 3 else (t["codes"], t["steps"])
    )  # fmt: skip

    def launch(i: int) -> None:
        kernels.few_rows[(p.n // tile_n, splits)](
            (p.weights if integer else p.weights8)[i], x, t["w_steps"], steps, t["x16"], t["columns"], t["count"],
            p.out, p.parts, p.arrived, p.rows, p.k, p.k // splits, p.n, THRESHOLD, levels, kind == "listed", rows,
            splits, integer, tile_n, tile_k, 32 if p.rows <= 64 else 16, num_warps=warps, num_stages=stages)  # fmt: skip

    label = f"{kind} {tile_n}x{tile_k} warps {warps} stages {stages} splits {splits}"
    return Variant("int8" if integer else "fp8", label, launch)


def many(p: Problem, config: tuple[Any, ...], outliers: str, integer: bool = True) -> Variant | None:
    tile_m, tile_n, tile_k, tile_o, warps, stages, copies = config
    t = p.tensors
    if p.n % tile_n or p.k % tile_k or p.rows % tile_m:
        return None
    x, steps = (t["codes"], t["steps"]) if integer else (t["x8"], t["fp8_steps"])
    weights = p.weights if integer else p.weights8
    if copies:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x_given = TensorDescriptor.from_tensor(x, [tile_m, tile_k])
        w_given = [TensorDescriptor.from_tensor(w, [tile_n, tile_k]) for w in weights]
    else:
        x_given, w_given = x, weights

    def launch(i: int) -> None:
        if outliers == "gathered":
            kernels.gather_columns[(p.n // 64,)](
                weights[i], t["columns"], t["count"], p.side, p.k, p.padded, 64, 32
            )
        side = p.side if outliers == "gathered" else weights[i]
        kernels.many_rows[(p.rows // tile_m * (p.n // tile_n),)](
            x_given, w_given[i], t["x16"], side, steps, t["w_steps"], t["columns"], t["count"], p.out, p.rows, p.n, p.k,
            p.padded, THRESHOLD, outliers, integer, bool(copies), tile_m, tile_n, tile_k, tile_o,
            num_warps=warps, num_stages=stages)  # fmt: skip

    label = f"{outliers if integer else 'fp8'} {tile_m}x{tile_n}x{tile_k} warps {warps} stages {stages}"
    return Variant("int8" if integer else "fp8", label + (" bulk" if copies else ""), launch)


def libraries(p: Problem) -> Iterator[Variant]:
    t = p.tensors
    scales = t["w_steps"] * 127

    def by_torch(i: int) -> Tensor:
        return reference.linear(t["x16"], p.weights[i], scales, None, THRESHOLD)

    yield Variant("int8", "torch, three rows of codes (service/kernels/int8_linear/reference.py)", by_torch)
    if p.rows > 16:
        yield Variant(
            "int8", "torch._int_mm alone", lambda i: torch._int_mm(t["codes"], p.weights[i].t()), False
        )
    a, b = t["fp8_steps"][:, None], t["w_steps"][None, :]

    def scaled(i: int) -> Tensor:
        return torch._scaled_mm(t["x8"], p.weights8[i].t(), a, b, out_dtype=torch.bfloat16)

    yield Variant("fp8", "torch._scaled_mm, bf16 out", scaled)
    wide = [torch.randn(p.n, p.k, device=p.device).half() for _ in range(max(2, p.copies // 2))]
    yield Variant("fp16", "cuBLAS fp16", lambda i: torch.mm(t["x16"], wide[i % len(wide)].t()), False)


def variants(p: Problem) -> Iterator[Variant | None]:
    """All that are tried for this linear."""
    for config in FEW.get(p.rows, ()):
        if p.rows <= 64:
            yield few(p, config, "stacked")
        if p.rows >= 16:
            yield few(p, config, "listed")
        yield few(p, config, "fp8")
    for config in MANY.get(p.rows, ()):
        yield many(p, config, "inline")
        if p.rows == 1024:
            yield many(p, config, "gathered")
        yield many(p, config, "none", integer=False)


def error_of(p: Problem, variant: Variant) -> float:
    p.out.fill_(float("nan"))
    given = variant.launch(0)
    want = p.want(variant.kind == "int8")
    return relative_error((p.out if given is None else given)[: len(want)], want)


def quantizers(rows: int, device: str, hidden: int, inner: int) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """The norm's and the gate's kernels with codes beside them; raises where codes differ from torch's."""
    half = {"device": device, "dtype": torch.float16}
    live = torch.tensor([max(1, rows - rows // 8)], device=device, dtype=torch.int32)
    for name, width in (("norm", hidden), ("silu", inner)):
        columns = triton.next_power_of_2(width)
        warps = 8 if columns <= 4096 else 16
        source = [torch.randn(rows, (1 if name == "norm" else 2) * width, **half) * 3 for _ in range(2)]
        gain = torch.rand(width, **half) + 0.5
        gain[::97] = 8
        total, normed = (torch.empty(rows, width, **half) for _ in range(2))
        codes = torch.empty(3 * rows, width, device=device, dtype=torch.int8)
        steps = torch.empty(3 * rows, device=device)
        flags = torch.zeros(width, device=device, dtype=torch.int8)
        listed = torch.empty(width, device=device, dtype=torch.int32)
        count = torch.empty(1, device=device, dtype=torch.int32)

        def launch(stacks: bool) -> None:
            places = codes, steps, flags, rows
            shape = width, columns, stacks
            if name == "norm":
                kernels.norm_quantize[(rows,)](
                    source[0], source[1], gain, live, total, normed, *places, 1e-5, THRESHOLD, *shape, num_warps=warps)  # fmt: skip
            else:
                kernels.silu_quantize[(rows,)](
                    source[0], live, normed, *places, THRESHOLD, *shape, num_warps=warps
                )
            if not stacks:
                kernels.list_columns[(1,)](flags, listed, count, width, columns, num_warps=warps)

        launch(False)
        wide = normed.clone()
        wide[int(live) :] = 0
        want, want_steps = stacked(wide)
        found = (wide.abs() >= THRESHOLD).any(0).nonzero()[:, 0]
        assert int(count) == len(found), (name, rows)
        assert torch.equal(listed[: len(found)].long(), found)
        assert not flags.any()
        apart = (codes[:rows].int() - want[:rows].int()).abs()
        assert apart.max() <= 1, (name, rows)
        assert apart.float().mean() < 1e-3, (name, rows)
        launch(True)
        assert (codes.int() - want.int()).abs()[: 2 * rows].max() <= 1, (name, rows)
        sums = (codes.float() * steps[:, None]).view(3, rows, width).sum(0)
        torch.testing.assert_close(
            sums, (want.float() * want_steps[:, None]).view(3, rows, width).sum(0), rtol=2e-2, atol=6e-2
        )
        yield f"{name}, stacked", lambda i, go=launch: go(True)
        yield f"{name}, listed", lambda i, go=launch: go(False)


def check(device: str) -> None:
    """Small shapes, all kinds of kernels, ragged rows; what the interpreter can do too."""
    for rows, count in ((1, 0), (1, 3), (3, 5), (16, 3), (16, 40)):
        p = Problem("small", rows, 128, 512, count, device, 1)
        for kind in ("stacked", "listed", "fp8"):
            variant = few(p, (64, 64, 4, 2), kind)
            assert variant is not None
            error = error_of(p, variant)
            print(f"rows {rows}, {count} columns, {variant.label}: error {error:.1e}", flush=True)
            assert error < 1e-3
    for rows, count in ((64, 0), (128, 37)):
        p = Problem("small", rows, 128, 256, count, device, 1)
        for outliers in ("inline", "gathered", "fp8"):
            integer = outliers != "fp8"
            variant = many(p, (64, 64, 64, 32, 4, 2, False), outliers if integer else "none", integer)
            assert variant is not None
            error = error_of(p, variant)
            print(f"rows {rows}, {count} columns, {variant.label}: error {error:.1e}", flush=True)
            assert error < 1e-3
    for rows in (1, 5, 16):
        for name, _ in quantizers(rows, device, 320, 576):
            print(f"rows {rows}, {name}: codes are torch's")


def check_interpreted() -> None:
    global kernels
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from tests.kernels.interpreter import interpreted

    of_triton = InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
        if total.data.dtype != np.int32:
            return of_triton(builder, a, b, total, *precision)
        product = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
        return TensorHandle(product + total.data, total.dtype.scalar)

    with interpreted("int8_kernels") as kernels:
        InterpreterBuilder.create_dot = dot
        check("cpu")


def cross_compile() -> None:
    """Registers, spills and instructions of every variant, for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dump = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    pointers = {"w_steps": "fp32", "x_steps": "fp32", "x16": "fp16", "columns": "i32", "count": "i32", "out": "fp16",
                "parts": "fp32", "arrived": "i32"}  # fmt: skip

    def show(
        label: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
    ) -> None:
        names = {"threshold": "fp32"} | {name: f"*{kind}" for name, kind in pointers.items()} | types
        signature = {name: names.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(
            constants, "constexpr"
        )
        aligned = [
            i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ("K", "N", "share", "PADDED")
        ]  # fmt: skip
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
        options = {"num_warps": warps, "num_stages": stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run(
                [dump, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        products = sorted(set(re.findall(r"wgmma\.mma_async[\w.]*\.(m64n\d+k\d+)", compiled.asm["ptx"])))
        assert found is not None
        print(
            f"{label}: {found[1]} registers, stack {found[2]}, {compiled.metadata.shared} bytes shared, {products}"
        )

    for rows, configs in FEW.items():
        for tile_n, tile_k, warps, stages in configs:
            kinds = (["stacked"] if rows <= 64 else []) + (["listed"] if rows >= 16 else []) + ["fp8"]
            for kind in kinds:
                levels = 3 if kind == "stacked" else 1
                eight = "*fp8e4nv" if kind == "fp8" else "*i8"
                constants = {
                    "LEVELS": levels, "LISTED": kind == "listed", "ROWS": max(4 if levels == 3 else 16, rows), "SPLITS": 2,
                    "INTEGER": kind != "fp8", "TILE_N": tile_n, "TILE_K": tile_k, "TILE_O": 32 if rows <= 64 else 16,
                }  # fmt: skip
                label = f"few {kind}, {rows} rows, {tile_n}x{tile_k} warps {warps} stages {stages}"
                show(label, kernels.few_rows, {"w": eight, "x": eight}, constants, warps, stages)
    for rows, shapes in MANY.items():
        for tile_m, tile_n, tile_k, tile_o, warps, stages, copies in shapes:
            for outliers in ("inline", "gathered", "none"):
                eight = "fp8e4nv" if outliers == "none" else "i8"
                types = {
                    "x": f"tensordesc<{eight}[{tile_m},{tile_k}]>" if copies else f"*{eight}",
                    "w": f"tensordesc<{eight}[{tile_n},{tile_k}]>" if copies else f"*{eight}",
                    "side": "*fp16" if outliers == "gathered" else f"*{eight}",
                }
                constants = {
                    "OUTLIERS": outliers, "INTEGER": outliers != "none", "COPY": bool(copies), "TILE_M": tile_m,
                    "TILE_N": tile_n, "TILE_K": tile_k, "TILE_O": tile_o,
                }  # fmt: skip
                label = f"many {outliers}, {rows} rows, {tile_m}x{tile_n}x{tile_k} warps {warps} stages {stages} copies {copies}"
                show(label, kernels.many_rows, types, constants, warps, stages)


def compile_share(share: str) -> None:
    """Launch every number-th variant once, so that Triton's cache on disk has it."""
    number, of = map(int, share.split("/"))
    place = 0
    for rows in ROWS:
        for name, (n, k) in SHAPES.items():
            p = Problem(name, rows, n, k, COUNTS[0], "cuda", 1)
            for variant in variants(p):
                place += 1
                if variant and place % of == number:
                    try:
                        variant.launch(0)
                    except (
                        Exception
                    ) as failure:  # a shape that cannot be compiled is a result; the timing run tells it
                        print(f"{name} M={rows} {variant.label}: {type(failure).__name__}")
            torch.cuda.synchronize()
        if rows % of == number:
            for _ in quantizers(rows, "cuda", SHAPES["o"][0], SHAPES["down"][1]):
                pass


def measure(rows: int, results: list[dict[str, Any]], device: str = "cuda") -> None:
    def add(name: str, p: Problem | None, variant: Variant, error: float) -> None:
        us, spread = time_rotating(
            [lambda i=i: variant.launch(i) for i in range(p.copies if p else 1)], repeats=15
        )
        count = p.count if p else 0
        results.append({"shape": name, "rows": rows, "kind": variant.kind, "variant": variant.label, "outliers": count,
                        "us": us, "spread": spread, "error": error})  # fmt: skip

    for name, (n, k) in SHAPES.items():
        best: dict[str, tuple[float, int]] = {}
        for count in COUNTS:
            p = Problem(name, rows, n, k, count, device, max(2, ROTATED_BYTES // (n * k)))
            tried = [v for v in variants(p) if v] + (list(libraries(p)) if count == COUNTS[0] else [])
            for place, variant in enumerate(tried):
                family = variant.label.split()[0]
                if count != COUNTS[0] and (variant.kind != "int8" or place != best.get(family, (0.0, -1))[1]):
                    continue
                try:
                    error = error_of(p, variant) if variant.checked else 0.0
                    if error < 3e-3:
                        add(name, p, variant, error)
                    else:
                        print(f"WRONG {name} M={rows} {variant.label} {count} columns: error {error:.1e}")
                        continue
                except Exception as failure:
                    print(f"{name} M={rows} {variant.label}: {type(failure).__name__} {str(failure)[:90]}")
                    continue
                if count == COUNTS[0] and results[-1]["us"] < best.get(family, (1e9, 0))[0]:
                    best[family] = results[-1]["us"], place
            del p
    for label, launch in quantizers(rows, device, SHAPES["o"][0], SHAPES["down"][1]):
        add("quantize", None, Variant("quantize", label, launch), 0.0)


def report(results: list[dict[str, Any]]) -> None:
    for r in results:
        if r["kind"] == "quantize":
            print(f"M={r['rows']:5d} {r['us']:8.2f} us  {r['variant']}")
    for rows in ROWS:
        for kind, counts in (("int8", COUNTS), ("fp8", COUNTS[:1]), ("fp16", COUNTS[:1])):
            for count in counts:
                chosen = []
                for name in SHAPES:
                    here = [r for r in results if (r["shape"], r["rows"], r["kind"]) == (name, rows, kind)]
                    fit = [r for r in here if r["outliers"] == count and "alone" not in r["variant"]]
                    chosen.append(min(fit, key=lambda r: r["us"], default=None))
                if all(chosen):
                    parts = "; ".join(f"{r['us']:.1f} {r['variant']}" for r in chosen)
                    print(
                        f"M={rows:5d} {kind} {count:3d} columns: LAYER {sum(r['us'] for r in chosen):7.1f} us = {parts}"
                    )
        here = [
            r for r in results if r["rows"] == rows and r["outliers"] == COUNTS[0] and r["shape"] in SHAPES
        ]
        for family in dict.fromkeys(r["variant"].split()[0] for r in here):
            least = [
                min((r["us"] for r in here if r["shape"] == name and r["variant"].split()[0] == family), default=math.nan)
                for name in SHAPES
            ]  # fmt: skip
            print(
                f"M={rows:5d}   by {family:18s} {sum(least):7.1f} us = {' + '.join(f'{us:.1f}' for us in least)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--share", default="", help="used by itself: I/N")
    parser.add_argument("--processes", type=int, default=14)
    arguments = parser.parse_args()
    if arguments.check:
        check("cuda") if torch.cuda.is_available() else check_interpreted()
    elif arguments.compile:
        cross_compile()
    elif arguments.share:
        compile_share(arguments.share)
    else:
        run(arguments.json, arguments.processes)


def run(to: str, processes: int) -> None:
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}", flush=True)
    command = [sys.executable, __file__, "--share"]
    started = [subprocess.Popen([*command, f"{i}/{processes}"]) for i in range(processes)]
    for process in started:
        process.wait()
    check("cuda")
    results: list[dict[str, Any]] = []
    for rows in ROWS:
        measure(rows, results)
        print(f"M={rows} done", flush=True)
        if to:
            Path(to).write_text(json.dumps(results, indent=1))
    report(results)


if __name__ == "__main__":
    main()
