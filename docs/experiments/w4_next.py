"""Variants of w4_tile_next.cu and w4_few_next.cu beside what serves, as w4_rows16.py measures them."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import torch

from service.kernels.cuda import Program
from service.kernels.w4_linear.layout import Kind
from service.kernels.w4_linear.variants import FOLDER, Few, Tile, Variant, most_shared_bytes, rounded_up

HERE = Path(__file__).parent
SHAPES = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
ROWS = (1, 8, 9, 16, 24, 32)
MOST_STAGES = 12


class Borrowing(Program):
    """A source here that includes production's headers."""

    @cached_property
    def texts(self) -> dict[str, str]:
        headers = {file.name: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.h"))}
        return super().texts | headers


def from_here(program: Program) -> Program:
    return Borrowing(HERE / f"{program.source.stem}_next.cu", program.kernel, program.definitions)


@dataclass(frozen=True)
class NextTile(Tile):
    """The fields are explained in w4_tile_next.cu."""

    ahead: int = 0
    told: int = 0
    at_once: int = 4
    timeline: int = 0

    @property
    def program(self) -> Program:
        return from_here(super().program)

    @property
    def label(self) -> str:
        """rt x wgs, stages, shares at once."""
        words = ["stretched"] * self.stretched + ["ahead"] * self.ahead + ["told"] * self.told
        return " ".join([f"{self.rt}x{self.wgs} s{self.stages} /{self.at_once}", *words])


@dataclass(frozen=True)
class NextFew(Few):
    ahead: int = 0

    @property
    def program(self) -> Program:
        return from_here(super().program)

    @property
    def shared_bytes(self) -> int:
        if not self.ahead:
            return super().shared_bytes
        table = 2048 + (64 << 10 if self.wide_table else 32 << 10)
        return rounded_up(table + self.warps * self.stages * 1120, 128) - 1024

    @property
    def label(self) -> str:
        words = ["wide"] * self.wide_table + ["ahead"] * self.ahead
        return " ".join([f"few w{self.warps} s{self.stages} each {self.each}", *words])


def tile(kind: Kind, rows: int, rt: int, wgs: int, **settings: int) -> NextTile:
    """With as many stages as fit."""
    size = 8 if rows <= 8 else 16 if rows <= 16 else 32
    wide, scaled = int(kind == "nf4"), int(size <= 16)
    stretched = settings.pop("stretched", 0)
    found = NextTile(kind, 0, MOST_STAGES, 1, 1, size, rt, wgs, 2, stretched, scaled, wide, **settings)
    while found.shared_bytes > most_shared_bytes(1):
        found = replace(found, stages=found.stages - 1)
    return found


def few(kind: Kind, warps: int, stages: int, per_sm: int, each: int, wide: int, ahead: int) -> NextFew:
    return NextFew(kind, 0, stages, per_sm, each, warps, 1, wide, ahead)


def tried(kind: Kind, rows: int, in_features: int) -> Iterator[NextTile | NextFew]:
    """What is tried behind so many rows."""
    aheads = (0, 1) if kind == "nf4" else (0,)
    if rows <= 8:
        fews = [few(kind, 16, stages, 2, 1, 0, ahead) for stages, ahead in product((3, 5), aheads)]
        if kind == "nf4":
            fews += [few(kind, 8, 4, 2, 2, 1, 1), few(kind, 16, 4, 1, 1, 1, 1)]
        yield from (f for f in fews if f.max_rows(in_features) >= rows)
    full = {"ahead": aheads[-1], "told": 1, "at_once": 8}
    sizes = ((1, 4), (1, 3), (1, 2), (2, 2)) if rows > 8 else ((1, 4), (1, 2), (2, 2))
    if rows == 16:  # one by one
        rt, wgs = (1, 4) if kind == "nf4" else (2, 2)
        yield tile(kind, rows, rt, wgs)
        yield tile(kind, rows, rt, wgs, at_once=8)
        if kind == "nf4":
            yield tile(kind, rows, rt, wgs, ahead=1)
        yield tile(kind, rows, rt, wgs, told=1, at_once=8)
    for (rt, wgs), stretched in product(sizes, (0, 1)):
        yield tile(kind, rows, rt, wgs, stretched=stretched, **full)


def timelines(kind: Kind) -> list[NextTile]:
    """At 16 rows: as it serves, and with all that is tried."""
    rt, wgs = (1, 4) if kind == "nf4" else (2, 2)
    full = {"ahead": int(kind == "nf4"), "told": 1, "at_once": 8}
    return [
        tile(kind, 16, rt, wgs, timeline=1),
        tile(kind, 16, rt, wgs, timeline=1, **full),
        tile(kind, 16, 1, 2, timeline=1, **full),
    ]


def all_variants(kinds: tuple[Kind, ...] = ("affine", "nf4")) -> list[NextTile | NextFew]:
    found: dict[NextTile | NextFew, None] = {}
    for kind, rows, (_, in_features) in product(kinds, ROWS, SHAPES.values()):
        found |= dict.fromkeys(tried(kind, rows, in_features))
    for kind in kinds:
        found |= dict.fromkeys(timelines(kind))
    return list(found)


def emulate() -> None:
    """Every variant on a CPU against float64, on few outputs and blocks that are held up; two minutes."""
    from tests.kernels import test_w4_emulated as machine
    from tests.kernels.w4_weights import random_weight

    os.environ["CPLUS_INCLUDE_PATH"] = str(FOLDER)
    torch.manual_seed(0)
    build = machine.build
    # words for other blocks that are on their way arrive before the next launch
    machine.build = lambda program, folder, run: build(program, folder, run[:-1] + "launch_over(); }")

    def told(variant: Variant, outs: tuple[int, ...], in_features: int, rows: int, blocks: int) -> None:
        source = random_weight(variant.kind, outs, in_features)
        weight, x = source.pack(outs), torch.randn(rows, in_features).half()
        want, first = x.double() @ source.dense().double().t(), None
        with tempfile.TemporaryDirectory() as folder:
            here = Absent(variant, blocks, Path(folder))
            for order in (0, 5, 9):
                y = torch.full((rows, sum(outs)), float("nan"), dtype=torch.float16)
                here.launch(weight, x, y, order)
                error = float((y.double() - want).norm() / want.norm())
                first = y if first is None else first
                fine = error < 6e-4 and torch.equal(first, y) and here.all_taken()
                print(
                    "ok " if fine else "BAD",
                    f"{error:.1e}",
                    variant.name,
                    outs,
                    in_features,
                    rows,
                    flush=True,
                )

    class Absent(machine.Machine):
        """One workspace for all launches, as parts that say themselves that they are there need it."""

        def __init__(self, variant: Variant, num_blocks: int, folder: Path) -> None:
            super().__init__(variant, num_blocks, folder)
            floats = num_blocks * (variant.sums_of_block if isinstance(variant, Tile) else 1)
            self.sums = torch.full((floats,), -1, dtype=torch.int32).view(torch.float32)

        def all_taken(self) -> bool:
            told = isinstance(self.variant, NextTile) and self.variant.told
            return not told or bool((self.sums.view(torch.int32) == -1).all())

        def launch(self, weight, x, y, order) -> None:  # type: ignore[no-untyped-def]
            full, machine.torch.full = torch.full, lambda *a, **k: self.sums
            try:
                super().launch(weight, x, y, order)
            finally:
                machine.torch.full = full

    for variant in all_variants():
        if isinstance(variant, NextFew):
            told(variant, (48, 16, 32), 2688, 7 if variant.kind == "nf4" else 1, 2)
        elif not variant.timeline:
            n = variant.outputs
            if variant.stretched:
                told(variant, (n, n - 32, 32), 1152, variant.tile - 3, 3)
            else:
                told(variant, (n - 32, 32), 1280, variant.tile - 3, 9)


if __name__ == "__main__":
    emulate()
