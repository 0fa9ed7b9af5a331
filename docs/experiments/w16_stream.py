"""16-bit linears of few rows on Llama-3.1-8B's shapes: every variant of dense_stream.cu built, checked and timed.

python docs/experiments/w16_stream.py --out FOLDER [--rows 1,16,32,64,128]

Beside them cuBLAS, our Triton kernel where it serves, and a kernel that only reads the same bytes. Checked against
float64 with a poisoned output, on ragged shapes too, twice for the same bits, and for them once more after all that was
timed; timed in CUDA graphs with weights rotated past the L2, each launch waiting for the one before: plainly, and as a
dependent launch (PDL). A chain is the four linears of a layer, each on the output of the one before, layer after layer.
A worker process runs them: one that dies or hangs costs that variant, and the next worker goes on.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from graph_times import capture, replays_us
from w16_variants import IN_BFLOAT16, Variant, all_variants, compile_all, variants_for
from workers import measure, read_lines, work

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
LAYER = ("qkv", "o", "gate_up", "down")
ROWS = (1, 16, 32, 64, 128)
MAX_ROWS = 128
RAGGED = (1544, 1096)  # outputs and inputs that no tile divides
ROTATED_BYTES, TIMED_BYTES = 192 << 20, 2 << 30  # of weights: different ones, and in one graph
LAYERS = 8  # of a chain
LARGEST_ERROR = {0: 6e-4, 1: 4e-3}  # relative, in norm; by BF16


def list_tasks(all_rows: list[int]) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = [{"kind": "read", "rows": 0, "variant": -1}]
    tasks += [{"kind": "bfloat16", "rows": v.tile, "variant": all_variants().index(v)} for v in IN_BFLOAT16]
    for rows in all_rows:
        tasks += [
            {"kind": "own", "rows": rows, "variant": all_variants().index(v)} for v in variants_for(rows)
        ]
        tasks.append({"kind": "cublas", "rows": rows, "variant": -1})
        if rows <= 64:
            tasks.append({"kind": "triton", "rows": rows, "variant": -1})
    return tasks


class Launcher:
    """A variant on the device; binds operands to launches on torch's current stream."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        import torch
        from w4_driver import Driver, Function, multiprocessors

        self.driver, self.variant = Driver(), variant
        cubin = folder / variant.file
        self.function = Function(self.driver, cubin, "dense_stream", variant.threads, variant.shared_bytes)
        self.grid = multiprocessors() // variant.share * variant.share * variant.per_sm
        words = self.grid * 2 * variant.outputs * variant.tile
        self.workspace = torch.full((words,), -1, dtype=torch.int32, device="cuda")  # every number ABSENT

    def map_of(self, matrix: Any, box_rows: int) -> Any:
        """A tensor map of a [rows, columns] whose rows may lie apart; boxes of 64 columns under the swizzle."""
        import torch

        room = ctypes.create_string_buffer(192)
        place = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
        kind = {torch.float16: 6, torch.bfloat16: 9}[matrix.dtype]
        rows, columns = matrix.shape
        self.driver.call(
            "cuTensorMapEncodeTiled", ctypes.byref(place), kind, 2, ctypes.c_void_p(matrix.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(matrix.stride(0) * 2),
            (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1), 0, 3, 3, 0)  # fmt: skip
        return place

    def bind(self, x: Any, w: Any, y: Any, bias: Any = None) -> Callable[[bool], None]:
        """y = x @ w.T + bias, as a dependent launch or a plain one. The caller keeps the tensors."""
        v, (rows, k), n = self.variant, x.shape, w.shape[0]
        pointers = [ctypes.c_void_p(t if t is None else t.data_ptr()) for t in (bias, y, self.workspace)]
        maps = [self.map_of(x, v.tile // v.share), self.map_of(w, v.outputs)]
        arguments = [*maps, *pointers, *(ctypes.c_int(number) for number in (rows, n, k))]
        return self.function.bind(self.grid, v.shared_bytes, arguments)


class Worker:
    """Weights of all shapes on the device; every task writes a line to the results."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.torch, self.folder = torch, folder
        torch.manual_seed(int.from_bytes(os.urandom(4)))
        self.weights: dict[str, list[Any]] = {}
        self.want: dict[str, Any] = {}
        self.x = {k: torch.randn(MAX_ROWS, k, device="cuda").half() for k in {k for _, k in SHAPES.values()}}
        for name, (n, k) in SHAPES.items():
            first = (torch.randn(n, k, device="cuda") / k**0.5).half()
            copies = max(1 if name == "lm_head" else 2, ROTATED_BYTES // first.nbytes)
            self.weights[name] = [first, *(first.clone() for _ in range(copies - 1))]
            parts = [self.x[k].double() @ part.double().t() for part in first.split(16384)]
            self.want[name] = torch.cat(parts, dim=1)
        self.launchers: dict[Variant, Launcher] = {}

    def launcher(self, variant: Variant) -> Launcher:
        if variant not in self.launchers:
            self.launchers[variant] = Launcher(self.folder, variant)
        return self.launchers[variant]

    def time(self, launches: list[Callable[[], Any]]) -> float:
        """Median microseconds of a launch; one graph replays all launches in turn."""
        return statistics.median(replays_us(capture(launches))) / len(launches)

    def repeated(self, name: str) -> list[Any]:
        """Weights of a shape in turn, as many as one graph reads."""
        weights = self.weights[name]
        return weights * max(1, TIMED_BYTES // sum(w.nbytes for w in weights))

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        kind, rows = task["kind"], task["rows"]
        if kind == "read":
            return {"us": self.read()}
        variant = all_variants()[task["variant"]]
        if kind == "bfloat16":
            return self.check_ragged(variant, rows)
        if kind == "own":
            return self.own(variant, rows)
        return self.library(kind, rows)

    def read(self) -> dict[str, float]:
        from w4_driver import Driver, Function, multiprocessors

        reader, times = Function(Driver(), self.folder / "read.cubin", "read_only", 512, 0), {}
        out = self.torch.zeros(1, device="cuda", dtype=self.torch.int32)
        for name in SHAPES:
            told = [
                [ctypes.c_void_p(w.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_uint64(w.nbytes)]
                for w in self.repeated(name)
            ]
            times[name] = min(
                self.time([partial(reader.bind(multiprocessors() * blocks, 0, a), False) for a in told])
                for blocks in (1, 2, 4)
            )
        return times

    def check_ragged(self, variant: Variant, rows: int) -> dict[str, Any]:
        """A shape that nothing divides, a bias, one row fewer than y has."""
        torch = self.torch
        dtype = torch.bfloat16 if variant.bf16 else torch.float16
        n, k = RAGGED
        x, w = torch.randn(rows, k, device="cuda").to(dtype), torch.randn(n, k, device="cuda").to(dtype)
        bias = torch.randn(n, device="cuda").to(dtype)
        y = torch.full((rows + 1, n), float("nan"), device="cuda", dtype=dtype)
        self.launcher(variant).bind(x, w, y, bias)(False)
        want = x.double() @ w.double().t() + bias.double()
        error = float((y[:rows].double() - want).norm() / want.norm())
        fine = error <= LARGEST_ERROR[variant.bf16] and bool(y[rows].isnan().all())
        return {"error": error, "right": fine}

    def own(self, variant: Variant, rows: int) -> dict[str, Any]:
        torch, launcher = self.torch, self.launcher(variant)
        ragged = self.check_ragged(variant, max(1, rows - 3))
        worst, right = 0.0, ragged["right"]
        us: dict[str, float] = {}
        plain: dict[str, float] = {}
        for name, (n, k) in SHAPES.items():
            y = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.float16)
            x, weights = self.x[k][:rows], self.repeated(name)
            launches = [launcher.bind(x, w, y) for w in weights]
            launches[0](False)
            want = self.want[name][:rows]
            worst = max(worst, float((y.double() - want).norm() / want.norm()))
            first = y.clone()
            plain[name] = self.time([partial(launch, False) for launch in launches])
            us[name] = self.time([partial(launch, True) for launch in launches])
            right = right and bool(torch.equal(first, y)) and worst <= LARGEST_ERROR[0]

        def bind_dependent(x: Any, w: Any, y: Any) -> Callable[[], None]:
            return partial(launcher.bind(x, w, y), True)

        def bind_plain(x: Any, w: Any, y: Any) -> Callable[[], None]:
            return partial(launcher.bind(x, w, y), False)

        chains = [self.chain(bind, rows) for bind in (bind_dependent, bind_plain)]
        told = {"ragged_error": ragged["error"], "error": worst, "right": right}
        return {"us": us, "plain": plain, "chain": chains[0], "chain_plain": chains[1], **told}

    def chain(self, bind: Callable[..., Callable[[], Any]], rows: int) -> float:
        """Microseconds a layer, each linear on the output of the one before."""
        y = {name: self.torch.zeros(rows, SHAPES[name][0], device="cuda").half() for name in LAYER}
        y["down"].copy_(self.x[SHAPES["qkv"][1]][:rows])
        launches, last = [], "down"
        for layer in range(LAYERS):
            for name in LAYER:
                weights = self.weights[name]
                x = y[last][:, : SHAPES[name][1]]
                launches.append(bind(x, weights[layer % len(weights)], y[name]))
                last = name
        return self.time(launches) * len(LAYER)

    def library(self, kind: str, rows: int) -> dict[str, Any]:
        torch = self.torch
        if kind == "triton":
            sys.path.insert(0, str(Path(__file__).parents[2]))
            from service.kernels.dense_linear.triton import stream_linear

        us: dict[str, float] = {}
        for name, (n, k) in SHAPES.items():
            x = self.x[k][:rows]
            y = torch.empty(rows, n, device="cuda", dtype=torch.float16)
            launches: list[Callable[[], Any]] = [
                partial(stream_linear, x, w, None) if kind == "triton" else partial(torch.mm, x, w.t(), out=y)
                for w in self.repeated(name)
            ]
            us[name] = self.time(launches)
        if kind == "triton":
            return {"us": us}

        def bind(x: Any, w: Any, y: Any) -> Callable[[], Any]:
            return partial(torch.mm, x, w.t(), out=y)

        return {"us": us, "chain": self.chain(bind, rows)}


def report(folder: Path, machine: str) -> None:
    tasks = json.loads((folder / "tasks.json").read_text())
    results = [{**tasks[line["task"]], **line} for line in read_lines(folder / "results.jsonl")]
    for r in results:
        r["name"] = all_variants()[r["variant"]].label if r["variant"] >= 0 else r["kind"]
    (folder / "w16_stream.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    if len(results) < len(tasks):
        print(f"{len(tasks) - len(results)} of {len(tasks)} tasks had no time")
    for r in results:
        if "failed" in r or not r.get("right", True):
            errors = f"error {r.get('error')}, ragged {r.get('ragged_error')}"
            print(f"WRONG {r['name']} M={r['rows']}: {r.get('failed') or errors}")
    print(f"{'M':>3} {'qkv':>6} {'o':>6} {'gate_up':>7} {'down':>6} {'layer':>7} {'chain':>7} {'lm_head':>7}"
          " | without PDL: layer, chain | variant; microseconds")  # fmt: skip
    fine = [r for r in results if "us" in r and r.get("right", True)]
    for rows in sorted({r["rows"] for r in fine}):
        here = [r for r in fine if r["rows"] == rows]
        for r in sorted(here, key=lambda r: (r["kind"] == "own", r.get("chain", 0.0))):
            us, plain = r["us"], r.get("plain")
            layer = sum(us[name] for name in LAYER)
            told = [f"{rows:3} {us['qkv']:6.1f} {us['o']:6.1f} {us['gate_up']:7.1f} {us['down']:6.1f}"]
            told += [f"{layer:7.1f} {r.get('chain', float('nan')):7.1f} {us['lm_head']:7.1f} |"]
            if plain:
                told.append(f"{sum(plain[name] for name in LAYER):7.1f} {r['chain_plain']:7.1f} |")
            print(*told, r["name"])
        own = [r for r in here if r["kind"] == "own"]
        if own:
            best = {name: min(own, key=lambda r: r["us"][name]) for name in SHAPES}
            layer = sum(best[name]["us"][name] for name in LAYER)
            print(f"{rows:3} best of each shape {layer:.1f}:", "; ".join(f"{n} {r['us'][n]:.1f} {r['name']}" for n, r in best.items()))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=int, default=100, help="of the device, compilation included")
    parser.add_argument("--work", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if arguments.work:
        work(folder, Worker(folder).run)
        return
    tasks = list_tasks([int(rows) for rows in arguments.rows.split(",")])
    machine = measure(Path(__file__), folder, tasks, compile_all, arguments.seconds)
    report(folder, machine)


if __name__ == "__main__":
    main()
