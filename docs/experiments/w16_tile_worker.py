"""What w16_tile.py does on the device: variants of w16_tile.cu beside cuBLAS and our gated_silu, checked, timed, and held.

workers.work --task--> Worker.run --> microseconds and errors, or joules and clocks of what ran for a while
"""

import ctypes
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import pynvml
import torch
import torch.nn.functional as F
from graph_times import capture, replays_us
from torch import Tensor
from w4_driver import Driver, Function, LaunchConfig, multiprocessors
from w16_tile_variants import INPUTS, PIECE, THREADS, Variant, all_variants
from workers import read_lines

from service.device import device_uuid
from service.energy import EnergyMeter
from service.kernels.cuda.driver import SWIZZLE_128, tensor_map
from service.kernels.gated_silu import gated_silu

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
MAX_ROWS = 2048
SAMPLED = range(5, MAX_ROWS, 21)  # rows that are compared with float64
RAGGED = (333, 1544, 1096)  # rows, columns of y and K that no tile divides
ROTATED_BYTES = 192 << 20  # of one shape's weights
GRAPH_US = 6e3  # of one replay, about; of one that is held, three times as much
FLOP_PER_US = 6e8  # about cuBLAS's
SETTLE_S, MEASURE_S, ROUNDS = 0.25, 0.5, 2  # until the clock follows the power; contenders take turns
LARGEST_ERROR = {0: 6e-4, 1: 5e-3}  # relative, in norm; by BF16
DEVICE = "cuda"

Launch = Callable[[], Any]


class Launcher:
    """A variant on the device; binds operands to launches on torch's current stream."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.driver, self.variant = Driver(), variant
        self.function = Function(
            self.driver, folder / variant.file, "w16_tile", THREADS, variant.shared_bytes
        )
        self.grid = self.most_clusters() * variant.cluster

    def most_clusters(self) -> int:
        """That run at once: a group of multiprocessors may have some left over."""
        wanted = multiprocessors() // self.variant.cluster
        if self.variant.cluster == 1:
            return wanted
        config, found = LaunchConfig(shared_bytes=self.variant.shared_bytes), ctypes.c_int()
        config.grid[0], config.grid[1], config.grid[2] = wanted * self.variant.cluster, 1, 1
        config.block[0], config.block[1], config.block[2] = THREADS, 1, 1
        self.driver.call(
            "cuOccupancyMaxActiveClusters", ctypes.byref(found), self.function.handle, ctypes.byref(config)
        )
        assert found.value > 0, found.value
        return min(wanted, found.value)

    def bind(self, x: Tensor, w: Tensor, y: Tensor) -> Launch:
        """A dependent launch, which keeps the tensors."""
        boxes = ((x, (self.variant.x_box, INPUTS)), (w, (self.variant.w_box, INPUTS)), (y, PIECE))
        maps = []
        for matrix, box in boxes:
            rows, columns = matrix.shape
            maps.append(tensor_map(matrix.data_ptr(), matrix.dtype, (rows, columns), box, SWIZZLE_128))
        numbers = [ctypes.c_int(number) for number in (y.shape[0], *w.shape)]
        start = self.function.bind(self.grid, self.variant.shared_bytes, [*maps, *numbers])

        def launch() -> None:
            start(True)

        launch.kept = (x, w, y)  # type: ignore[attr-defined]
        return launch


class Worker:
    """Weights of all shapes on the device."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(int.from_bytes(os.urandom(4)))
        self.folder = folder
        self.x = {k: torch.randn(MAX_ROWS, k, device=DEVICE).half() for k in {k for _, k in SHAPES.values()}}
        self.weights: dict[str, list[Tensor]] = {}
        self.want: dict[str, Tensor] = {}  # of the sampled rows
        for name, (n, k) in SHAPES.items():
            first = (torch.randn(n, k, device=DEVICE) / k**0.5).half()
            copies = max(2, -(-ROTATED_BYTES // first.nbytes))
            self.weights[name] = [first, *(first.clone() for _ in range(copies - 1))]
            few = self.x[k][SAMPLED.start :: SAMPLED.step].double()
            self.want[name] = torch.cat([few @ part.double().t() for part in first.split(4096)], dim=1)
        gate, up = self.want["gate_up"].chunk(2, -1)
        self.want["gated"] = F.silu(gate) * up
        self.launchers: dict[Variant, Launcher] = {}

    def launcher(self, variant: Variant) -> Launcher:
        if variant not in self.launchers:
            self.launchers[variant] = Launcher(self.folder, variant)
        return self.launchers[variant]

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        kind, rows = task["kind"], task["rows"]
        if kind == "ragged":
            return self.check_ragged(all_variants()[task["variant"]])
        if kind == "own":
            return self.own(all_variants()[task["variant"]], rows)
        if kind == "cublas":
            return self.cublas(rows)
        return self.hold(rows, bool(task.get("layer")))

    def time(self, launches: list[Launch]) -> float:
        """Median microseconds of a launch; one graph replays all launches in turn."""
        return statistics.median(replays_us(capture(launches), 5)) / len(launches)

    def repeated(self, name: str, rows: int) -> list[Tensor]:
        """Weights of a shape in turn, as many as one graph takes."""
        weights, (n, k) = self.weights[name], SHAPES[name]
        us = 2 * rows * n * k / FLOP_PER_US
        return weights * max(1, round(GRAPH_US / us / len(weights)))

    def check_ragged(self, variant: Variant) -> dict[str, Any]:
        """A shape that nothing divides, a row fewer than y has, twice."""
        rows, columns, k = RAGGED
        dtype = torch.bfloat16 if variant.bf16 else torch.float16
        n = columns * 2 if variant.gated else columns
        x = torch.randn(rows, k, device=DEVICE).to(dtype)
        w = (torch.randn(n, k, device=DEVICE) / k**0.5).to(dtype)
        want, found = x.double() @ w.double().t(), []
        if variant.gated:
            gate, up = want.chunk(2, -1)
            want = F.silu(gate) * up
        launcher = self.launcher(variant)
        for _ in range(2):
            y = torch.full((rows + 1, columns), float("nan"), device=DEVICE, dtype=dtype)
            launcher.bind(x, w, y[:rows])()
            found.append(y)
        error = float((found[0][:rows].double() - want).norm() / want.norm())
        right = error <= LARGEST_ERROR[variant.bf16] and torch.equal(found[0][:rows], found[1][:rows])
        untouched = all(bool(y[rows].isnan().all()) for y in found)
        return {"error": error, "right": right and untouched, "blocks": launcher.grid}

    def own(self, variant: Variant, rows: int) -> dict[str, Any]:
        """Microseconds by shape, and the largest error of the sampled rows; a gated one's is gate_up alone."""
        launcher, worst, same = self.launcher(variant), 0.0, True
        us: dict[str, float] = {}
        for name in ("gate_up",) if variant.gated else SHAPES:
            n, k = SHAPES[name]
            y = torch.full((rows, n // 2 if variant.gated else n), float("nan"), device=DEVICE).half()
            launches = [launcher.bind(self.x[k][:rows], w, y) for w in self.repeated(name, rows)]
            launches[0]()
            found = y[SAMPLED.start :: SAMPLED.step].double()
            want = self.want["gated" if variant.gated else name][: len(found)]
            error = float((found - want).norm() / want.norm())
            worst = error if error > worst or error != error else worst  # a NaN stays
            first = y.clone()
            us[name] = self.time(launches)
            same &= bool(torch.equal(first, y))
        return {"us": us, "error": worst, "right": worst <= LARGEST_ERROR[0] and same}

    def cublas(self, rows: int) -> dict[str, Any]:
        """Beside the shapes: gate_up with gated_silu behind it, and that alone."""
        us: dict[str, float] = {}
        for name, (n, k) in SHAPES.items():
            x, y = self.x[k][:rows], torch.empty(rows, n, device=DEVICE, dtype=torch.float16)
            launches: list[Launch] = [partial(torch.mm, x, w.t(), out=y) for w in self.repeated(name, rows)]
            us[name] = self.time(launches)
            if name == "gate_up":
                behind = [launch for one in launches for launch in (one, partial(gated_silu, y))]
                us["gated"] = self.time(behind) * 2
                us["gated_silu"] = self.time([partial(gated_silu, y)] * 64)
        return {"us": us}

    def hold(self, rows: int, layer: bool) -> dict[str, Any]:
        """Contenders in turn, each again and again until the clock has settled and the energy tells.

        `layer`: the four linears and the gate of a layer, else gate_up and the gate alone.
        """
        contenders = self.layers(rows) if layer else self.gates(rows)
        graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
        held: dict[str, list[dict[str, float]]] = {}
        for name, launches in contenders.items():
            calls = len(launches)
            graphs[name] = capture([launch for call in launches for launch in call]), calls
        with Board() as board:
            board.hold(*graphs["cuBLAS, gated_silu"])  # warm
            for _ in range(ROUNDS):
                for name, (graph, calls) in graphs.items():
                    held.setdefault(name, []).append(board.hold(graph, calls))
        return {"held": held}

    def best(self, rows: int, gated: int, name: str, count: int) -> list[Variant]:
        """The fastest of a kind, of those that are right everywhere, by what is in the results so far."""
        tasks, lines = (
            json.loads((self.folder / "tasks.json").read_text()),
            read_lines(self.folder / "results.jsonl"),
        )
        told = [{**tasks[line["task"]], **line} for line in lines]
        wrong = {one["variant"] for one in told if "variant" in one and not one.get("right")}
        fine = [
            one
            for one in told
            if one["kind"] == "own" and one["rows"] == rows and one["variant"] not in wrong
            if all_variants()[one["variant"]].gated == gated
        ]
        fine.sort(key=lambda one: one["us"][name])
        return [all_variants()[one["variant"]] for one in fine[:count]]

    def gates(self, rows: int) -> dict[str, list[list[Launch]]]:
        """By contender a list of calls, each a list of launches."""
        (n, k), weights = SHAPES["gate_up"], self.repeated("gate_up", rows) * 3
        x, both = self.x[k][:rows], torch.empty(rows, n, device=DEVICE, dtype=torch.float16)
        y = torch.empty(rows, n // 2, device=DEVICE, dtype=torch.float16)
        found: dict[str, list[list[Launch]]] = {
            "cuBLAS, gated_silu": [
                [partial(torch.mm, x, w.t(), out=both), partial(gated_silu, both)] for w in weights
            ]
        }
        for variant in self.best(rows, 1, "gate_up", 2):
            found[variant.label] = [[self.launcher(variant).bind(x, w, y)] for w in weights]
        return found

    def layers(self, rows: int) -> dict[str, list[list[Launch]]]:
        """All by cuBLAS; gate_up by ours; all by ours. Every linear's input lies there, whoever is to make it."""
        made = {name: torch.empty(rows, n, device=DEVICE).half() for name, (n, _) in SHAPES.items()}
        gated = torch.empty(rows, SHAPES["gate_up"][0] // 2, device=DEVICE).half()
        calls = round(3 * GRAPH_US * FLOP_PER_US / sum(2 * rows * n * k for n, k in SHAPES.values()))

        def linear(name: str, call: int) -> Launch:
            w = self.weights[name][call % len(self.weights[name])]
            return partial(torch.mm, self.x[w.shape[1]][:rows], w.t(), out=made[name])

        def own(variant: Variant, name: str, call: int) -> Launch:
            w = self.weights[name][call % len(self.weights[name])]
            y = gated if variant.gated else made[name]
            return self.launcher(variant).bind(self.x[w.shape[1]][:rows], w, y)

        def row(call: int, plain: dict[str, Variant], fused: Variant | None) -> list[Launch]:
            launches = []
            for name in SHAPES:
                variant = fused if fused and name == "gate_up" else plain.get(name)
                launches.append(own(variant, name, call) if variant else linear(name, call))
                if name == "gate_up" and not fused:
                    launches.append(partial(gated_silu, made[name]))
            return launches

        plain = {name: variant for name in SHAPES for variant in self.best(rows, 0, name, 1)}
        found = {"cuBLAS, gated_silu": [row(call, {}, None) for call in range(calls)]}
        for fused in self.best(rows, 1, "gate_up", 1):
            found[f"cuBLAS, {fused.label}"] = [row(call, {}, fused) for call in range(calls)]
            if plain:
                found[f"ours, {fused.label}"] = [row(call, plain, fused) for call in range(calls)]
        return found


class Board:
    """Energy and clock while a graph is replayed."""

    def __enter__(self) -> "Board":
        uuid = device_uuid(torch.device(DEVICE))
        self.meter = EnergyMeter.connect(uuid)
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.close()

    def hold(self, graph: torch.cuda.CUDAGraph, calls: int) -> dict[str, float]:
        """Replays back to back. -> microseconds of a call, joules of a call, watts, MHz.

        The counter moves some ten times a second: watts are between its first and last move.
        """
        ends: list[torch.cuda.Event] = []
        moves: list[tuple[float, float]] = []  # s, J
        clocks, pending, settled, last = [], deque[torch.cuda.Event](), 0, self.meter.joules()
        start = time.monotonic()
        while (now := time.monotonic() - start) < SETTLE_S + MEASURE_S:
            if len(pending) < 3:
                graph.replay()
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
                pending.append(ends[-1])
            if now < SETTLE_S:
                settled = len(ends)
            joules = self.meter.joules()
            if joules != last and now >= SETTLE_S:
                moves.append((now, joules))
                clocks.append(pynvml.nvmlDeviceGetClockInfo(self.handle, pynvml.NVML_CLOCK_SM))
            last = joules
            while pending and pending[0].query():
                pending.popleft()
            time.sleep(5e-4)
        torch.cuda.synchronize()
        assert 0 < settled < len(ends), (settled, len(ends))
        us = ends[settled - 1].elapsed_time(ends[-1]) * 1e3 / (len(ends) - settled) / calls
        watts = float("nan")
        if len(moves) > 1:
            (first_s, first), (last_s, last) = moves[0], moves[-1]
            watts = (last - first) / (last_s - first_s)
        mhz = statistics.mean(clocks) if clocks else float("nan")
        return {"us": us, "joules": watts * us * 1e-6, "watts": watts, "mhz": mhz}
