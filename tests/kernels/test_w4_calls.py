"""What a bound W4 weight tells the kernels of its plan; no kernel runs."""

from weakref import WeakValueDictionary

import pytest
import torch

from service.kernels import launch as launching
from service.kernels.cuda import driver
from service.kernels.cuda import maps as kept_maps
from service.kernels.w4_linear import Kind, Shape, Weight, cuda, plan
from service.kernels.w4_linear.cuda import Bound, Parts, parts_of
from service.kernels.w4_linear.variants import Few, Tile
from tests.kernels.told_driver import MULTIPROCESSORS, STREAM, Driver, Map, stand_in
from tests.kernels.w4_weights import Nf4, random_nf4, random_weight

OUTS, IN = (128, 64, 64), 512
NUM_ARGUMENTS = 13
FLOAT16, INT32 = driver.MAP_TYPES[torch.float16], driver.MAP_TYPES[torch.int32]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(cuda, "_workspaces", {})
    return stand_in(monkeypatch, cuda, NUM_ARGUMENTS)


def bound(kind: Kind) -> tuple[Bound, Weight]:
    torch.manual_seed(0)
    weight = random_weight(kind, OUTS, IN).pack(OUTS)
    shape = Shape(kind, OUTS, IN, weight.group_size, torch.float16)
    return Bound(weight, plan(shape), torch.float16), weight


@pytest.mark.parametrize("kind", ["affine", "nf4", "int3"])
def test_few_rows(library: Driver, kind: Kind) -> None:
    """codes, scales, zeros, nested absmax, map, x, y, rows, N twice, K, parts."""
    multiply, weight = bound(kind)
    x = torch.randn(5, IN).half()
    y = multiply(x)
    told = library.launches[0]
    config = told.config
    nested, zeros = weight.nested, weight.zeros
    of_nested = (nested.absmax.data_ptr(), nested.map.data_ptr()) if nested else (0, 0)
    assert told.pointers(range(7)) == [
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        *of_nested,
        x.data_ptr(),
        y.data_ptr(),
    ]
    assert told.integers(range(7, 11)) == [5, 256, 256, IN]
    assert Parts.from_address(told.addresses[11]).count == 3
    variant = next(row.variant for row in multiply.rows if row.max_rows and row.max_rows >= 5)
    assert isinstance(variant, Few)
    assert (config.grid_x, config.block_x) == (MULTIPROCESSORS, variant.threads)
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
    assert rows == Map(FLOAT16, x.data_ptr(), [IN, 50], [2 * IN], [64, 64])
    tile_words = 96 if kind == "int3" else 128
    box, width = [variant.ks * tile_words, variant.outputs // 16], IN // 64 * tile_words
    assert codes == Map(INT32, weight.codes.data_ptr(), [width, 16], [width * 4], box, driver.SWIZZLE_NONE)
    told = library.launches[0]
    config = told.config
    assert told.pointers(range(2, 3)) == [weight.scales.data_ptr()]
    workspace = cuda.workspace_on(weight.codes.device)
    of_others = [workspace.sums.data_ptr(), workspace.flags[0].data_ptr()]
    assert told.pointers(range(7, 9)) == of_others
    assert told.integers(range(9, 13)) == [50, 256, 256, IN]
    assert y.shape == (50, 256)
    assert config.grid_x == MULTIPROCESSORS * variant.each, "all blocks at once, whatever the work"
    assert workspace.sums.numel() >= config.grid_x * variant.sums_of_block


def test_a_call_s_rows_choose_the_variant(library: Driver) -> None:
    multiply, _ = bound("affine")
    for num_rows in (1, 8, 9, 16, 17, 64, 65, 129, 256, 257, 5000):
        multiply(torch.zeros(num_rows, IN, dtype=torch.float16))
        wanted = next(r.variant for r in multiply.rows if r.max_rows is None or num_rows <= r.max_rows)
        assert library.launches[-1].config.shared_bytes == wanted.shared_bytes_for(num_rows, IN)
        assert library.launches[-1].config.block_x == wanted.threads
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
        (address,) = library.launches[-1].pointers([5])
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
        assert library.launches[-1].config.num_attributes == int(dependent)


def test_layers_of_a_device_share_what_blocks_leave(monkeypatch: pytest.MonkeyPatch, library: Driver) -> None:
    """And it is given back with the last of them."""
    monkeypatch.setattr(cuda, "_workspaces", WeakValueDictionary())
    first, second = bound("affine")[0], bound("nf4")[0]
    assert first._workspace is second._workspace
    del first, second
    assert not cuda._workspaces
