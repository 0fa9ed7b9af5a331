"""Who could serve fp8's few rows, linear by linear: w8_tile.cu in several shapes, Triton's kernel, torch's product."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from w8_variants import SHAPES, Kernel, cut

from service.kernels.int8_linear.plan import Tile, splits_of

MULTIPROCESSORS = 132
WIDE = "gate_up"
MAX_SPLITS = 8


@dataclass(frozen=True)
class ByTiles:
    """w8_tile.cu; `how` a tile's work is cut, as w8_variants.cut has it."""

    kernel: Kernel
    how: str

    def __str__(self) -> str:
        kernel, kinds = self.kernel, ("light", "ahead", "maps")
        told = " ".join(f"{kind} {getattr(kernel, kind)}" for kind in kinds if getattr(kernel, kind))
        return f"{kernel.outputs}x{kernel.tile} of {kernel.threads} threads, {kernel.stages} stages {self.how} {told}"


@dataclass(frozen=True)
class ByTriton:
    """Triton's kernel; no tile: as it serves."""

    tile: Tile | None = None
    splits: int = 0  # 0: as many as fit

    def __str__(self) -> str:
        return (
            f"Triton {tuple(vars(self.tile).values())} splits {self.splits}"
            if self.tile
            else "Triton as served"
        )


@dataclass(frozen=True)
class ByTorch:
    def __str__(self) -> str:
        return "torch._scaled_mm"


@dataclass(frozen=True)
class Nobody:
    """y stays as it is: what is left are the kernels in between."""

    def __str__(self) -> str:
        return "nobody"


Choice = ByTiles | ByTriton | ByTorch | Nobody


# rows of a tile; stages for 128 outputs, for 256, for one warpgroup of 128, and for that with two blocks a multiprocessor
RINGS = ((16, 10, 6, 11, 5), (32, 9, 5, 10, 5), (64, 8, 5, 8, 4))


def tiles(narrow: Kernel, wide: Kernel | None = None) -> dict[str, Choice]:
    """Of narrow linears what does not fill a round of the grid is cut; of the wide one too, if it has no kernel of its own."""
    return {
        name: ByTiles(wide, "whole") if wide and name == WIDE else ByTiles(narrow, "rest") for name in SHAPES
    }


def candidates(rows: int) -> dict[str, dict[str, Choice]]:
    """Name -> linear -> who serves it."""
    found: dict[str, dict[str, Choice]] = {
        "Triton": dict.fromkeys(SHAPES, ByTriton()),
        "_scaled_mm": dict.fromkeys(SHAPES, ByTorch()),
    }
    tile, deep, deep_wide, deepest, small = next(told for told in RINGS if rows <= told[0])

    def usual(ahead: int = 0, **knobs: int) -> dict[str, Choice]:
        narrow = Kernel(1, tile, 1, deep, bf16=1, ahead=ahead, **knobs)
        # a step of the wide one's blocks is twice as many bytes, and its ring is full of what is asked for already
        return tiles(narrow, Kernel(1, tile, 2, deep_wide, bf16=1, ahead=ahead // 4, **knobs))

    def lean(stages: int, ahead: int = 0) -> dict[str, Choice]:
        return tiles(Kernel(1, tile, 2, stages, bf16=1, warpgroups=1, light=1, ahead=ahead, maps=1))

    found["tiles"] = usual()
    found["tiles, ahead 8"] = usual(ahead=8, maps=1)
    found["light"] = usual(light=1, maps=1)
    found["lean"] = lean(small)
    found["lean, ahead 8"] = lean(small, 8)
    found["lean, ahead 16"] = lean(small, 16)
    found["lean, deep"] = lean(deepest)
    return found


# outputs, inputs, warps, stages of Triton's kernel beside what serves: for narrow linears, and for the wide one
SWEPT = {
    1: (
        ((64, 256, 4, 4), (64, 256, 4, 3), (64, 256, 4, 2), (64, 128, 4, 6), (128, 256, 8, 3)),
        ((128, 128, 4, 5), (128, 128, 4, 4), (128, 256, 8, 2), (128, 256, 4, 2), (64, 256, 4, 4)),
    ),
    16: (
        ((64, 128, 4, 6), (64, 128, 4, 4), (64, 128, 4, 8), (64, 256, 4, 3), (64, 256, 4, 4)),
        ((128, 256, 8, 2), (128, 256, 8, 3), (128, 128, 4, 5), (128, 128, 8, 4), (64, 128, 4, 6)),
    ),
    64: (
        ((64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 4, 6), (64, 256, 4, 3), (128, 128, 8, 4)),
        ((128, 128, 8, 4), (128, 128, 8, 3), (128, 128, 4, 4), (64, 128, 4, 4), (128, 256, 8, 2)),
    ),
}


def swept(rows: int, name: str) -> list[ByTriton]:
    """Each tile with the usual splits and, of narrow linears, with twice as many."""
    out_features, in_features = SHAPES[name]
    most = min(known for known in SWEPT if rows <= known)
    found = []
    for told in SWEPT[most][name == WIDE]:
        tile = Tile(*told)
        splits = splits_of(in_features, out_features, tile)
        more = {splits} if name == WIDE else {splits, min(2 * splits, MAX_SPLITS)}
        found += [ByTriton(tile, each) for each in sorted(more)]
    return found


def kernels(all_rows: list[int]) -> list[Kernel]:
    def each() -> Iterator[Kernel]:
        for rows in all_rows:
            for choices in candidates(rows).values():
                yield from (choice.kernel for choice in choices.values() if isinstance(choice, ByTiles))

    return sorted(set(each()))


def most_sums(found: Iterable[Kernel]) -> int:
    """Float32 numbers that blocks of any of them leave for each other."""
    return max(kernel.workspace_bytes(MULTIPROCESSORS) for kernel in found) // 4


def room() -> None:
    """Prints what a block of each needs of a multiprocessor, and what all ask for before they wait."""
    for rows in SWEPT:
        for label, choices in candidates(rows).items():
            for name in ("o", WIDE):
                choice = choices[name]
                if isinstance(choice, ByTiles):
                    kernel, (n, k) = choice.kernel, SHAPES[name]
                    blocks, _ = cut(kernel, choice.how, n, k, rows, MULTIPROCESSORS)
                    asked = min(blocks * (kernel.stages + kernel.ahead) * kernel.outputs * 128, n * k)
                    print(
                        f"{rows:3} {label:16} {name:8} {kernel.threads} threads, {kernel.shared_bytes >> 10} KiB, "
                        f"{asked / 1e6:.1f} of {n * k / 1e6:.1f} MB asked for early"
                    )
