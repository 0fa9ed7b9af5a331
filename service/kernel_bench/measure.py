"""Contestants x linears x rows -> microseconds, bytes a second and share of the read ceiling, as JSON.

cli/kernels --Plan--> measure() --> result, which table.py prints

Each figure is the median time of one call behind another, each with a weight of its own, so many of them that
none is left in a cache when its turn comes again. On a GPU the calls are one CUDA graph. What cannot be
measured here is in the result too, with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service import __version__
from service import device as devices
from service.errors import HalftoneError
from service.kernel_bench.contestants import Built, Contestant, others, ours, versions
from service.kernel_bench.reading import Reader
from service.model.instance import GROUPS
from service.model.layout import layer_groups
from service.model.random_weights import Draw, RandomWeights
from service.precision.base import LinearGroup
from service.quantize import packing

FORMAT = "halftone-kernels/1"
METHOD = (
    "median time of a call among calls that follow each other, each with a weight of its own; "
    "the ceiling is a kernel that only reads as many bytes in the same way"
)
CACHES_ROTATED = 4  # times the last cache's bytes that the weights of a figure have together
READ_REPEATS = 15  # at least: every share hangs on one of these
LEAST_COPIES, MOST_COPIES = 2, 64
OUTLIER, LARGEST_USUAL = 20.0, 5.0  # of x: beyond LLM.int8()'s threshold of 6, and below it

Progress = Callable[[str, int, int, str], None]  # stage, done, total, unit


@dataclass(frozen=True)
class Plan:
    """What is asked. Everything in it is in the result."""

    model_path: Path
    device: torch.device
    dtype: torch.dtype  # of x, where a contestant has the choice
    precisions: Sequence[str]  # empty: the whole table
    rows: Sequence[int]
    outliers: Sequence[int]  # columns of x, for those who tell them apart
    repeats: int
    seed: int


def measure(plan: Plan, model: str, progress: Progress) -> dict[str, Any]:
    """Raises HalftoneError for what can be measured of nobody."""
    source = source_of(plan)
    contestants = [
        *ours(plan.precisions, plan.device, plan.dtype),
        *others(plan.device, plan.dtype),
    ]
    reader = Reader(plan.device, max(plan.repeats, READ_REPEATS))
    figures: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    for number, contestant in enumerate(contestants):
        progress("time", number, len(contestants), "contestants")
        for name in GROUPS:
            try:
                for figure in measure_linear(plan, contestant, name, reader):
                    figures.append(figure)
            except HalftoneError as error:
                absent.append(absence(contestant, name, error.message))
            except Exception as error:
                # memory may run out for anyone; another's library may not know this device, type or shape
                if contestant.backend is not None and not isinstance(error, torch.OutOfMemoryError):
                    raise
                absent.append(absence(contestant, name, f"{type(error).__name__}: {error}".splitlines()[0]))
            devices.release_cached(plan.device)
    progress("time", len(contestants), len(contestants), "contestants")
    groups = layer_groups(source.config, 0)
    return {
        "format": FORMAT,
        "halftone": __version__,
        "method": METHOD,
        "device": devices.device_name(plan.device),
        "driver": devices.nvidia_driver() or "",
        "threads": torch.get_num_threads() if plan.device.type == "cpu" else 0,
        "versions": versions(),
        "model": model,
        "linears": {
            name: [sum(part.out_features for part in groups[name]), groups[name][0].in_features]
            for name in GROUPS
        },
        "rows": list(plan.rows),
        "repeats": plan.repeats,
        "seed": plan.seed,
        "ceiling_bytes_per_s": reader.most_bytes_per_s,
        "figures": figures,
        "layers": layers(figures),
        "absent": absent,
    }


def source_of(plan: Plan, contestant: Contestant | None = None) -> RandomWeights:
    """Random weights, as this contestant reads them."""
    source = RandomWeights(plan.model_path, plan.device, Draw(plan.seed))
    backend = contestant and contestant.backend
    return source.quantized(packing(source.config, backend)) if backend and backend.quantizer else source


def measure_linear(plan: Plan, contestant: Contestant, name: str, reader: Reader) -> Iterator[dict[str, Any]]:
    """A figure for each number of rows, and of outlier columns where they matter."""
    source = source_of(plan, contestant)
    built = list(copies_of(plan, contestant, source, name))
    first = built[0]
    read_s = reader.seconds(first.num_bytes, len(built))
    in_features = layer_groups(source.config, 0)[name][0].in_features
    for outliers in plan.outliers if contestant.has_outliers else (None,):
        for num_rows in plan.rows:
            x = rows_of(plan, contestant.dtype, num_rows, in_features, outliers or 0)
            seconds = time_of(plan, built, x)
            yield {
                "contestant": contestant.name,
                "is_ours": contestant.backend is not None,
                "kernel": first.kernel,
                "dtype": str(contestant.dtype).removeprefix("torch."),
                "linear": name,
                "rows": num_rows,
                "outlier_columns": outliers,
                "microseconds": seconds * 1e6,
                "weight_bytes": first.num_bytes,
                "bytes_per_s": first.num_bytes / seconds,
                "read_microseconds": read_s * 1e6,
                "ceiling_share": read_s / seconds,
                "copies": len(built),
                "is_from_memory": len(built) * first.num_bytes > devices.last_cache_bytes(plan.device),
                "is_captured": plan.device.type == "cuda" and first.is_capturable,
            }


def copies_of(plan: Plan, contestant: Contestant, source: RandomWeights, name: str) -> Iterator[Built]:
    """One linear of the first layer, built as often as is needed to come from memory each time."""
    read = cache(source.read)  # drawing takes longer than building
    wanted, count = 1, 0
    while count < wanted:
        parts = layer_groups(source.config, 0)[name]
        group = LinearGroup(name, parts, plan.device, contestant.dtype)
        built = contestant.build(group, read)
        if not count:
            total = CACHES_ROTATED * devices.last_cache_bytes(plan.device)
            wanted = min(MOST_COPIES, max(LEAST_COPIES, -(-total // built.num_bytes)))
        count += 1
        yield built


def rows_of(plan: Plan, dtype: torch.dtype, num_rows: int, in_features: int, outliers: int) -> Tensor:
    """[num_rows, in_features], normal; as many columns as are asked for lie beyond LLM.int8()'s threshold."""
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    x = torch.randn(num_rows, in_features, generator=generator, device=plan.device)
    x.clamp_(-LARGEST_USUAL, LARGEST_USUAL)
    columns = torch.randperm(in_features, generator=generator, device=plan.device)[:outliers]
    x[:, columns] = OUTLIER
    return x.to(dtype)


@torch.inference_mode()
def time_of(plan: Plan, built: Sequence[Built], x: Tensor) -> float:
    """Seconds of one call."""

    def run() -> Tensor:
        for each in built:
            y = each.call(x)
        return y

    pool = devices.graph_pool(plan.device) if built[0].is_capturable else None
    seconds = devices.median_s(plan.device, run, plan.repeats, pool)
    return seconds / len(built)


def absence(contestant: Contestant, name: str, reason: str) -> dict[str, Any]:
    return {"contestant": contestant.name, "linear": name, "reason": reason}


def layers(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the four linears, of contestants that have all of them."""
    found: dict[tuple[str, int | None, int], list[dict[str, Any]]] = {}
    for figure in figures:
        key = figure["contestant"], figure["outlier_columns"], figure["rows"]
        found.setdefault(key, []).append(figure)
    sums = []
    for (contestant, outliers, num_rows), parts in found.items():
        if len(parts) == len(GROUPS):
            microseconds = sum(part["microseconds"] for part in parts)
            num_bytes = sum(part["weight_bytes"] for part in parts)
            sums.append(
                {
                    "contestant": contestant,
                    "is_ours": parts[0]["is_ours"],
                    "dtype": parts[0]["dtype"],
                    "rows": num_rows,
                    "outlier_columns": outliers,
                    "microseconds": microseconds,
                    "weight_bytes": num_bytes,
                    "bytes_per_s": num_bytes / microseconds * 1e6,
                    "ceiling_share": sum(part["read_microseconds"] for part in parts) / microseconds,
                    "is_from_memory": all(part["is_from_memory"] for part in parts),
                    "is_captured": all(part["is_captured"] for part in parts),
                }
            )
    return sums
