"""What a tool that watches a GPU's memory is given launches every kernel of ours; none runs here."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch

pytest.importorskip("triton")

from service.kernels.cuda import Program, driver, maps
from service.kernels.decode_attention import cuda as decode_cuda
from service.kernels.decode_attention.table import HEAD_DIMS, TABLE
from service.kernels.dense_linear import few_rows
from service.kernels.w4_linear.plan import TABLES
from service.kernels.w8_linear.plan import TABLES as W8_TABLES
from tests.kernels import cuda_launches, triton_launches
from tests.kernels.absent_gpu import KERNELS, recorded
from tests.kernels.given import Given
from tests.kernels.launched import launched, triton_kernels

CUDA_SOURCES = {path.stem for path in KERNELS.glob("*/*.cu")}
CUDA_MODULES = ("w4_linear", "w8_linear", "dense_linear", "gated_linear", "decode_attention")
SHARED_BYTES = 227 << 10  # that a block may have


@dataclass
class Kernel:
    """Stands in for a loaded one."""

    name: str
    threads: int
    handle: Any = None


class Driver:
    """Launches nothing."""

    def launch(self, config: int, *_: Any) -> int:
        told = driver.Config.from_address(config)
        assert told.grid_x > 0
        assert told.block_x <= 1024
        assert told.shared_bytes <= SHARED_BYTES
        return 0

    def encode(self, *_: Any) -> int:
        return 0

    def check(self, what: str, code: int) -> None:
        assert code == 0


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> set[Program]:
    """What is loaded."""
    found: set[Program] = set()

    def kernel_of(program: Program, threads: int, most_shared_bytes: int, **_: bool) -> Kernel:
        assert most_shared_bytes <= SHARED_BYTES
        found.add(program)
        return Kernel(program.kernel, threads, ctypes.c_void_p(1))

    monkeypatch.setattr(driver, "driver", Driver)
    monkeypatch.setattr(maps, "_maps", {})
    monkeypatch.setattr(decode_cuda, "call_of", decode_cuda.Call)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    for package in CUDA_MODULES:
        module = f"service.kernels.{package}.cuda"
        monkeypatch.setattr(f"{module}.kernel_of", kernel_of)
        monkeypatch.setattr(f"{module}.multiprocessors", lambda: 132, raising=False)
        monkeypatch.setattr(f"{module}._workspaces", WeakValueDictionary(), raising=False)
    return found


def names_launched(cases: tuple[Callable[[Given], None], ...]) -> set[str]:
    with recorded(), launched() as found:
        for case in cases:
            case(Given(torch.device("cpu")))
    return set(found)


def test_every_triton_kernel_is() -> None:
    assert names_launched(triton_launches.CASES) == triton_kernels()


def test_every_kernel_in_cuda_is(programs: set[Program]) -> None:
    assert names_launched(cuda_launches.CASES) >= CUDA_SOURCES
    assert {program.kernel for program in programs} == CUDA_SOURCES


def test_so_is_every_variant_of_a_table(programs: set[Program]) -> None:
    """By what a table says of it; the rest are sizes of heads and the type."""
    names_launched(cuda_launches.CASES)

    def seen(kernel: str, *names: str, **only: int) -> set[tuple[int, ...]]:
        told = [dict(program.definitions) for program in programs if program.kernel == kernel]
        return {
            tuple(each.get(name, 0) for name in names)
            for each in told
            if all(each.get(name, 0) == value for name, value in only.items())
        }

    for kind, (few, few_of_wide, tiles) in TABLES.items():
        codes = {"AFFINE": int(kind != "nf4"), "BITS": 3 if kind == "int3" else 4}
        assert seen("w4_few", "WARPS", "STAGES", "TILES", "WIDE_TABLE", **codes) == {
            (each.warps, each.stages, each.tiles, each.wide_table) for each in (*few, *few_of_wide)
        }
        names = ("TILE", "RT", "WGS", "KS", "STAGES", "STRETCHED", "SCALED_SUMS")
        assert seen("w4_tile", *names, **codes) == {
            (each.tile, each.rt, each.wgs, each.ks, each.stages, each.stretched > 0, each.scaled_sums)
            for _, choices in tiles
            for each in choices
        }
    for codes, table in W8_TABLES.items():
        names = ("TILE", "RT", "STAGES", "CAP")
        assert seen("w8_tile", *names, FP8=int(codes == "fp8")) == {
            (each.tile, each.rt, each.stages, each.cap) for _, choices in table for each in choices if each
        }
    assert seen("dense_stream", "TILE", "EARLY", "BF16") == {
        (entry.variant.tile, entry.variant.early, bf16) for entry in few_rows.TABLE for bf16 in (0, 1)
    }
    assert seen("decode_attention", "STAGES", "SPLITS") == {(each.stages, each.splits) for _, each in TABLE}
    assert seen("decode_attention", "DIM") == {(dim,) for dim in HEAD_DIMS}
    assert seen("decode_attention", "CODES") == {(0,), (1,), (2,)}
    for kernel in CUDA_SOURCES:
        assert seen(kernel, "BF16") == {(0,), (1,)}


def test_what_is_compiled_ahead_is_what_is_launched(programs: set[Program]) -> None:
    names_launched(cuda_launches.CASES)
    needed = set(programs)
    programs.clear()
    for load in cuda_launches.loads():
        load()
    assert programs == needed
