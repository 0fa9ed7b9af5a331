"""Assignments of fp8's four linears of few rows to kernels that one run against another decides between.

`assignments(rows)` tells them. A table in service/kernels (fp8_linear/plan.py, w8_linear/plan.py) follows what wins.
"""

import torch
from fp8_layer import EVERYWHERE, Way
from fp8_variants import WIDE, ByTiles, ByTriton, Choice, candidates
from w8_variants import SHAPES, Kernel

from service.kernels.fp8_linear.plan import is_early
from service.kernels.int8_linear.plan import Tile
from service.kernels.w8_linear.plan import Row, Shape, plan, refusal, row_for

SERVED = "as served"


def triton(*told: int, splits: int = 0) -> ByTriton:
    """Outputs, inputs, warps, stages."""
    return ByTriton(Tile(*told), splits)


def of_places(*choices: Choice) -> dict[str, Choice]:
    return dict(zip(SHAPES, choices, strict=True))


# by the most rows: as Triton served when the run of 23 November 2026 was made, and that run's fastest settings behind rows
BEFORE = {
    4: of_places(triton(64, 256, 4, 4), triton(64, 256, 4, 4), triton(128, 128, 4, 5), triton(64, 256, 4, 4)),
    16: of_places(
        triton(64, 128, 4, 6), triton(64, 128, 4, 6), triton(128, 256, 8, 2), triton(64, 128, 4, 6)
    ),
    64: of_places(
        triton(64, 128, 4, 4), triton(64, 128, 4, 4), triton(128, 128, 8, 4), triton(64, 128, 4, 4)
    ),
}
MIXES = {
    4: of_places(
        triton(64, 128, 4, 6, splits=4),
        triton(64, 128, 4, 6, splits=2),
        triton(64, 256, 4, 4, splits=1),
        triton(128, 256, 8, 3, splits=8),
    ),
    16: of_places(
        triton(64, 128, 4, 8, splits=2),
        triton(64, 256, 4, 4, splits=2),
        triton(128, 256, 8, 3, splits=1),
        triton(64, 256, 4, 4, splits=2),
    ),
    64: of_places(
        triton(64, 128, 4, 4, splits=2),
        triton(64, 128, 4, 4, splits=2),
        triton(128, 128, 8, 4, splits=1),
        triton(64, 256, 4, 3, splits=4),
    ),
}


def assignments(rows: int) -> dict[str, dict[str, Choice]]:
    """Name -> linear -> who serves it."""
    most = min(known for known in MIXES if rows <= known)
    mix, tiles, light = MIXES[most], candidates(rows)["tiles"], candidates(rows)["light"]
    found = {SERVED: served(rows), "Triton before": BEFORE[most], "mix of Triton": mix, **simpler(rows)}
    for kind, serving in (("tiles", tiles), ("light", light)):
        for places in ([WIDE], ["down"], [WIDE, "down"], ["qkv", WIDE, "down"]):
            found[f"mix, {kind} {' '.join(places)}"] = {**mix, **{place: serving[place] for place in places}}
        found[kind] = serving
    found["light, tiles gate_up ahead 8"] = {**light, WIDE: candidates(rows)["tiles, ahead 8"][WIDE]}
    return found


def ways_of(rows: int, label: str, choices: dict[str, Choice]) -> list[Way | None]:
    """Rows waiting first; releasing first before all that is no kernel of Triton's; everywhere. None: as one before.

    What serves is in the first place, released as it is there.
    """
    if label == SERVED:
        found = (is_early(rows, k, n, tile_rows(n, k)) for n, k in SHAPES.values())
        return [Way(frozenset(name for name, early in zip(SHAPES, found, strict=True) if early)), None, None]
    before_tiles = frozenset(name for name, choice in choices.items() if not isinstance(choice, ByTriton))
    is_new = before_tiles not in (frozenset(), EVERYWHERE)
    return [Way(), Way(before_tiles) if is_new else None, Way(EVERYWHERE)]


def served(rows: int) -> dict[str, Choice]:
    """By today's tables."""
    return {name: served_by(rows, n, k) for name, (n, k) in SHAPES.items()}


def served_by(rows: int, n: int, k: int) -> Choice:
    row = row_for(tile_rows(n, k), rows)
    if row is None:
        return ByTriton()
    tile = row.variant
    kernel = Kernel(1, tile.tile, tile.rt, tile.stages, bf16=1, light=tile.light, ahead=tile.ahead, maps=1)
    return ByTiles(kernel, "rest" if tile.cuts else "whole")


def tile_rows(n: int, k: int) -> tuple[Row, ...]:
    """The plan of w8_tile.cu for such a linear."""
    shape = Shape("fp8", n, k, torch.bfloat16)
    return () if refusal(shape) else plan(shape)


def simpler(rows: int) -> dict[str, dict[str, Choice]]:
    """Mixes by a rule of fewer settings than places."""
    if rows <= 4:
        narrow = triton(64, 128, 4, 6, splits=4)
        return {"mix, o in 4 splits": {**MIXES[4], "o": narrow}}
    deep = triton(64, 256, 4, 4, splits=2)
    if rows <= 16:
        return {"mix, qkv as o and down": {**MIXES[16], "qkv": deep}}
    if rows <= 32:
        return {"mix of 16 rows": dict(MIXES[16]), "mix, down as of 16": {**MIXES[64], "down": deep}}
    return {}


def tried_by_triton(rows: int, name: str) -> set[ByTriton]:
    """Settings of Triton's kernel for this linear."""
    tried = {choices[name] for choices in assignments(rows).values()}
    return {choice for choice in tried if isinstance(choice, ByTriton)}


def served_kernels(all_rows: list[int]) -> set[Kernel]:
    found = (choice for rows in all_rows for choice in served(rows).values())
    return {choice.kernel for choice in found if isinstance(choice, ByTiles)}
