"""What int8 and fp8 take a layer as they are served: rows quantized by a kernel of its own, then multiplied.

    python docs/experiments/int8_served.py [--json FILE]      # on a GPU, about 40 s

The four linears of a layer of Llama-3.1-8B, 32 columns of outliers each in every second row, weights rotated
past the L2 cache, in a CUDA graph; see section 7 of ../experiments.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from nf4_int8 import ROTATED_BYTES, SHAPES, time_rotating
from torch import Tensor

from service.engine.kernels_ahead import compile_all
from service.kernels.add_rms_norm.triton import add_rms_norm
from service.kernels.fp8_linear import triton as fp8
from service.kernels.gated_silu.triton import gated_silu
from service.kernels.int8_linear import triton as int8
from service.kernels.int8_linear.plan import FEW_ROWS
from service.kernels.int8_rows import ALL_LIVE, OutlierRule
from service.kernels.int8_rows import triton as rows

ROWS = (1, 4, 16, 32, 64, 256, 1024)
NUM_COLUMNS, THRESHOLD = 32, 6.0
# microseconds a layer before the first run: quantizing (all four inputs), products
PREDICTED = {
    "int8": {1: (11, 96), 16: (12, 97), 64: (16, 141), 256: (30, 262), 1024: (57, 620)},
    "int8 by batch": {1: (20, 96), 16: (21, 97), 64: (26, 141), 256: (40, 262), 1024: (95, 620)},
    "fp8": {1: (10, 93), 16: (11, 93), 64: (13, 107), 256: (15, 135), 1024: (35, 366)},
}


def rows_of(num_rows: int, width: int, device: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(num_rows, width, device=device, dtype=dtype)
    if device != "meta":
        x[::2, torch.randperm(width, device=device)[:NUM_COLUMNS]] = 20
    return x


def kinds(num_rows: int, n: int, k: int, device: str, copies: int) -> dict[str, tuple[list[Any], list[Any]]]:
    """Kind -> launches that quantize, and launches that multiply too, one for each copy of the weight."""
    found = {}
    scales = torch.rand(n, device=device)
    codes = [torch.ones(n, k, device=device, dtype=torch.int8) for _ in range(copies)]
    x = rows_of(num_rows, k, device, torch.float16)
    for kind, by_row in (("int8", True), ("int8 by batch", False)):
        rule = OutlierRule(THRESHOLD, by_row, torch.zeros(2, dtype=torch.int64, device=device))

        def quantize(rule: OutlierRule = rule) -> object:
            return int8.quantize_rows(x, rule, lists_columns=num_rows > FEW_ROWS)

        def multiply(i: int, rule: OutlierRule = rule) -> Tensor:
            return int8.int8_linear(x, codes[i], scales, None, rule)

        found[kind] = ([quantize], [lambda i=i, go=multiply: go(i) for i in range(copies)])
    wide = rows_of(num_rows, k, device, torch.bfloat16)
    floats = [one.view(torch.float8_e4m3fn) for one in codes]
    if device != "meta" or num_rows <= FEW_ROWS:
        products: list[Callable[[], Tensor]] = [
            lambda i=i: fp8.fp8_linear(wide, floats[i], scales, None) for i in range(copies)
        ]
        found["fp8"] = ([lambda: fp8.quantize_rows(wide)], products)
    return found


def rows_made(num_rows: int, device: str) -> dict[str, Callable[[], Any]]:
    """The norm and the gate with the codes of what they make: apart, as other precisions have them, and in one."""
    half = {"device": device, "dtype": torch.float16}
    hidden, delta = (torch.randn(num_rows, 4096, **half) for _ in range(2))
    gate_up, gain = torch.randn(num_rows, 2 * 14336, **half) * 3, torch.rand(4096, **half)
    rule = OutlierRule(THRESHOLD, True, torch.zeros(2, dtype=torch.int64, device=device))
    lists = {"lists_columns": num_rows > FEW_ROWS}
    return {
        "norm, codes": lambda: rows.quantize_rows(add_rms_norm(hidden, delta, gain, 1e-5)[1], rule, **lists),
        "in one": lambda: rows.quantize_normed(hidden, delta, gain, 1e-5, rule, ALL_LIVE, **lists),
        "gate, codes": lambda: rows.quantize_rows(gated_silu(gate_up), rule, **lists),
        "in one ": lambda: rows.quantize_gated(gate_up, rule, ALL_LIVE, **lists),
    }


def walk() -> None:
    for num_rows in ROWS:
        for make in rows_made(num_rows, "meta").values():
            make()
        for n, k in SHAPES.values():
            for quantize, multiply in kinds(num_rows, n, k, "meta", 1).values():
                quantize[0]()
                multiply[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, {compile_all(walk)} kernels", flush=True)
    results: list[dict[str, Any]] = []
    for num_rows in ROWS:
        for name, (n, k) in SHAPES.items():
            copies = max(2, ROTATED_BYTES // (n * k))
            for kind, (quantize, multiply) in kinds(num_rows, n, k, "cuda", copies).items():
                alone, _ = time_rotating(quantize * copies, repeats=10)
                both, _ = time_rotating(multiply, repeats=10)
                results.append(
                    {"rows": num_rows, "shape": name, "kind": kind, "quantize": alone, "both": both}
                )
    print(" rows  kind           quantize            + products         a layer   (predicted)")
    for num_rows in ROWS:
        for kind, predicted in PREDICTED.items():
            here = [r for r in results if (r["rows"], r["kind"]) == (num_rows, kind)]
            quantize_us, both_us = ([r[part] for r in here] for part in ("quantize", "both"))
            parts = [" + ".join(f"{us:.1f}" for us in column) for column in (quantize_us, both_us)]
            told = f"({predicted[num_rows][0]}, {sum(predicted[num_rows])})" if num_rows in predicted else ""
            total = f"{sum(quantize_us):.1f}, {sum(both_us):.1f}"
            print(f"{num_rows:5d}  {kind:13s}  {parts[0]}  |  {parts[1]}  =  {total}  {told}")
    for num_rows in ROWS:
        made = {
            name: time_rotating([make] * 8, repeats=10)[0]
            for name, make in rows_made(num_rows, "cuda").items()
        }
        print(f"{num_rows:5d}  " + "   ".join(f"{name.strip()} {us:.1f}" for name, us in made.items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
