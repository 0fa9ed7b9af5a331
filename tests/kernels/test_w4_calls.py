"""What a bound W4 weight tells the kernels of its plan; no kernel runs."""

import ctypes
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch

from service.kernels import launch as launching
from service.kernels.cuda import driver
from service.kernels.cuda import maps as kept_maps
from service.kernels.w4_linear import Kind, Shape, Weight, cuda, plan
from service.kernels.w4_linear.cuda import Bound, Parts, parts_of
from service.kernels.w4_linear.variants import Few, Tile, Variant
from tests.kernels.w4_weights import Nf4, random_nf4, random_weight

OUTS, IN = (128, 64, 64), 512
STREAM = 77


class Kernel:
    handle = ctypes.c_void_p(1)

    def __init__(self, variant: Variant) -> None:
        self.name, self.threads = variant.name, variant.threads


class Driver:
    """Copies arguments when it is called, as the real one does."""

    def __init__(self) -> None:
        self.launches: list[tuple[driver.Config, list[int]]] = []
        self.maps: list[tuple[Any, ...]] = []

    def launch(self, config: int, handle: Any, arguments: int, extra: None) -> int:
        addresses = (ctypes.c_void_p * 13).from_address(arguments)
        self.launches.append(
            (driver.Config.from_buffer_copy(driver.Config.from_address(config)), list(addresses))
        )
        return 0

    def encode(self, made: Any, dtype: int, dimensions: int, address: Any, *told: Any) -> int:
        shape, strides, box, _, interleave, swizzle, promotion, fill = told
        assert (dimensions, interleave, promotion, fill) == (2, 0, 3, 0)
        self.maps.append((dtype, address.value, list(shape), list(strides), list(box), swizzle))
        return 0

    def check(self, what: str, code: int) -> None:
        assert code == 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(cuda, "load", Kernel)
    monkeypatch.setattr(kept_maps, "_maps", {})
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(cuda, "multiprocessors", lambda: 13)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return found


def bound(kind: Kind) -> tuple[Bound, Weight]:
    torch.manual_seed(0)
    weight = random_weight(kind, OUTS, IN).pack(OUTS)
    shape = Shape(kind, OUTS, IN, weight.group_size, torch.float16)
    return Bound(weight, plan(shape), torch.float16), weight


def pointers(addresses: list[int], numbers: range) -> list[int]:
    return [ctypes.c_void_p.from_address(addresses[number]).value or 0 for number in numbers]


def integer(address: int) -> int:
    return ctypes.c_int.from_address(address).value


@pytest.mark.parametrize("kind", ["affine", "nf4", "int3"])
def test_few_rows(library: Driver, kind: Kind) -> None:
    """codes, scales, zeros, nested absmax, map, x, y, rows, N twice, K, parts."""
    multiply, weight = bound(kind)
    x = torch.randn(5, IN).half()
    y = multiply(x)
    config, told = library.launches[0]
    nested, zeros = weight.nested, weight.zeros
    of_nested = (nested.absmax.data_ptr(), nested.map.data_ptr()) if nested else (0, 0)
    assert pointers(told, range(7)) == [
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        *of_nested,
        x.data_ptr(),
        y.data_ptr(),
    ]
    assert [integer(address) for address in told[7:11]] == [5, 256, 256, IN]
    assert Parts.from_address(told[11]).count == 3
    variant = next(row.variant for row in multiply.rows if row.max_rows and row.max_rows >= 5)
    assert isinstance(variant, Few)
    assert (config.grid_x, config.block_x) == (13, variant.threads)
    assert config.shared_bytes == variant.shared_bytes_for(5, IN)
    assert config.stream == STREAM


@pytest.mark.parametrize("kind", ["affine", "nf4", "int3"])
def test_many_rows(library: Driver, kind: Kind) -> None:
    """Maps of x and codes; scales, zeros, nested absmax, map, y, sums, flags, rows, N twice, K, parts."""
    multiply, weight = bound(kind)
    x = torch.randn(50, IN).half()
    y = multiply(x)
    multiply(x)
    codes, rows = library.maps
    variant = next(row.variant for row in multiply.rows if row.max_rows == 64)
    assert isinstance(variant, Tile)
    assert rows == (6, x.data_ptr(), [IN, 50], [2 * IN], [64, 64], 3)
    tile_words = 96 if kind == "int3" else 128
    box, width = [variant.ks * tile_words, variant.outputs // 16], IN // 64 * tile_words
    assert codes == (2, weight.codes.data_ptr(), [width, 16], [width * 4], box, 0)
    config, told = library.launches[0]
    assert pointers(told, range(2, 3)) == [weight.scales.data_ptr()]
    workspace = cuda.workspace_on(weight.codes.device)
    of_others = [workspace.sums.data_ptr(), workspace.flags[0].data_ptr()]
    assert pointers(told, range(7, 9)) == of_others
    assert [integer(address) for address in told[9:13]] == [50, 256, 256, IN]
    assert y.shape == (50, 256)
    assert config.grid_x == 13 * variant.each, "all blocks at once, whatever the work"
    assert workspace.sums.numel() >= config.grid_x * variant.sums_of_block


def test_a_call_s_rows_choose_the_variant(library: Driver) -> None:
    multiply, _ = bound("affine")
    for num_rows in (1, 8, 9, 16, 17, 64, 65, 129, 256, 257, 5000):
        multiply(torch.zeros(num_rows, IN, dtype=torch.float16))
        wanted = next(r.variant for r in multiply.rows if r.max_rows is None or num_rows <= r.max_rows)
        assert library.launches[-1][0].shared_bytes == wanted.shared_bytes_for(num_rows, IN)
        assert library.launches[-1][0].block_x == wanted.threads
    before = len(library.launches)
    assert multiply(torch.zeros(0, IN, dtype=torch.float16)).shape == (0, 256)
    assert len(library.launches) == before


def test_a_map_is_kept_for_an_address_and_number_of_rows(
    library: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_maps, "MAX_MAPS", 2)
    multiply, _ = bound("affine")
    x = torch.zeros(64, IN, dtype=torch.float16)
    for num_rows, maps in ((64, 2), (64, 2), (63, 3), (64, 3), (62, 4), (64, 5)):
        multiply(x[:num_rows])
        assert len(library.maps) == maps, num_rows


def test_x_is_copied_where_the_kernels_could_not_read_it(library: Driver) -> None:
    multiply, _ = bound("affine")
    flat = torch.zeros(3 * IN + 8, dtype=torch.float16)
    for x in (flat[1 : 1 + 2 * IN].view(2, IN), flat[: 2 * IN].view(IN, 2).t()):
        multiply(x)
        (address,) = pointers(library.launches[-1][1], range(5, 6))
        assert address % 16 == 0
        assert address != x.data_ptr()


def test_parts_say_where_each_begins() -> None:
    source = random_nf4((48, 16, 32), 1536)
    assert isinstance(source, Nf4)
    weight = source.pack((48, 16, 32))
    parts = parts_of(weight)
    assert parts.count == 3
    assert list(parts.begin)[:3] == [0, 3, 4]
    # 48 rows of 24 blocks are 1152 absmax codes: five nested blocks, the last one not full
    assert list(parts.first)[:3] == [0, 5 * 256, 7 * 256]
    assert list(parts.offset)[:3] == source.nested.offsets.tolist()


@pytest.mark.parametrize("dependent", [True, False])
def test_a_kernel_comes_before_its_predecessor_ends_where_that_is_on(
    library: Driver, monkeypatch: pytest.MonkeyPatch, dependent: bool
) -> None:
    monkeypatch.setattr(launching, "DEPENDENT", dependent)
    for num_rows in (1, 64):
        bound("affine")[0](torch.zeros(num_rows, IN, dtype=torch.float16))
        assert library.launches[-1][0].num_attributes == int(dependent)


def test_layers_of_a_device_share_what_blocks_leave(monkeypatch: pytest.MonkeyPatch, library: Driver) -> None:
    """And it is given back with the last of them."""
    monkeypatch.setattr(cuda, "_workspaces", WeakValueDictionary())
    first, second = bound("affine")[0], bound("nf4")[0]
    assert first._workspace is second._workspace
    del first, second
    assert not cuda._workspaces
