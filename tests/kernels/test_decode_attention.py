"""A decode's attention in one launch: the very CUDA kernel on a machine of fibers, and who is served how."""

import shutil
from collections.abc import Iterator
from ctypes import c_float, c_int
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.kernels import launch as launching
from service.kernels.cuda import driver
from service.kernels.decode_attention import Settings, Shape, Variant, cuda, plan, refusal, serving, table
from service.kernels.decode_attention.table import HEAD_DIMS, TABLE, row_for, rows_of, variant_of
from service.kernels.paged_attention import plan_attention
from tests.kernels.decodes import EPS, PAGE, Decodes, decodes
from tests.kernels.emulated import box, build, pointer
from tests.kernels.told_driver import STREAM, Driver, stand_in

NUM_ARGUMENTS, POINTERS, NUMBERS, FRACTIONS = 19, range(2, 13), range(13, 16), range(16, 19)
HALF, BRAIN = torch.float16, torch.bfloat16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
TOLERANCE = {HALF: 1e-3, BRAIN: 6e-3}  # relative RMS, as Triton's kernels have it
PARAMETERS = (
    "TensorMap* keys, TensorMap* values, const char* qkv, char* y, const float* cosines, const float* sines,"
    " const char* q_norm, const char* k_norm, char* key_pages, char* value_pages, char* scale_pages,"
    " const int* tables, const int* lengths, int width, int kv_heads, int window, float scale, float softcap,"
    " float eps"
)
ARGUMENTS = (
    "*keys, *values, qkv, y, cosines, sines, q_norm, k_norm, key_pages, value_pages, scale_pages, tables,"
    " lengths, width, kv_heads, window, scale, softcap, eps"
)
LAUNCH = f"emulate(grid, SPLITS, THREADS, [=] {{ decode_attention({ARGUMENTS}); }});"
RUN = f"void run(int order, int grid, {PARAMETERS}) {{ emulated_order = order; {LAUNCH} }}"


def shape(
    dim: int,
    group: int,
    kv_heads: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    *,
    normed: bool = False,
) -> Shape:
    return Shape(dim, group * kv_heads, kv_heads, dtype, kv_dtype or dtype, normed)


# (shape, settings, lengths, window, softcap, rotates, wild)
CASES = [
    (shape(128, 4, 2, HALF), Settings(4, 2, 1), [640, 1, 16, 17, 0], 0, 0.0, True, 1),
    (shape(128, 4, 1, HALF), Settings(2, 3, 4), [257, 15, 1], 0, 0.0, True, 1),
    (shape(64, 3, 3, BRAIN), Settings(4, 2, 2), [100, 33], 40, 0.0, True, 1),
    (shape(64, 7, 1, HALF, normed=True), Settings(1, 2, 1), [1100, 32], 0, 0.0, True, 1),  # tables read twice
    (shape(80, 1, 2, HALF), Settings(2, 2, 2), [70, 16], 0, 5.0, True, 1),
    (shape(96, 8, 1, BRAIN, normed=True), Settings(2, 2, 8), [200, 0, 31], 16, 0.0, True, 1),
    (shape(256, 2, 1, BRAIN), Settings(2, 2, 2), [90], 33, 50.0, False, 1),
    (shape(128, 16, 1, HALF), Settings(2, 2, 4), [129, 48], 0, 0.0, True, 1),
    (shape(64, 1, 2, BRAIN), Settings(1, 2, 16), [1000], 700, 0.0, True, 1),
    (shape(128, 4, 2, HALF, INT8), Settings(4, 2, 1), [640, 1, 16, 17, 0], 0, 0.0, True, 1),
    (shape(128, 4, 1, BRAIN, FP8), Settings(2, 3, 4), [257, 15, 1], 0, 0.0, True, 1),
    (shape(64, 3, 3, BRAIN, INT8), Settings(4, 2, 2), [100, 33], 40, 0.0, False, 1),
    (shape(64, 7, 1, HALF, FP8, normed=True), Settings(1, 2, 1), [1100, 32], 0, 0.0, True, 1),
    (shape(80, 1, 2, HALF, INT8), Settings(2, 2, 2), [70, 16], 0, 5.0, True, 1),
    (shape(96, 8, 1, BRAIN, INT8, normed=True), Settings(2, 2, 8), [200, 0, 31], 16, 0.0, True, 1),
    (shape(256, 2, 1, BRAIN, FP8), Settings(2, 2, 2), [90], 33, 50.0, False, 1),
    (shape(128, 16, 1, HALF, INT8), Settings(2, 2, 4), [129, 48], 0, 0.0, True, 1),
    (shape(256, 16, 1, HALF, FP8), Settings(2, 2, 1), [50], 0, 0.0, True, 1),
    (shape(128, 4, 1, BRAIN, INT8), Settings(2, 2, 1), [100, 20], 0, 0.0, True, 2.0**30),
    (shape(64, 8, 1, BRAIN, FP8), Settings(2, 2, 2), [100, 20], 0, 0.0, True, 2.0**-30),
]


def emulated(library: Any, variant: Variant, given: Decodes, order: int) -> torch.Tensor:
    """-> [S + 1, heads, head_dim], of which the last are not to be written."""
    of, sequences = given.shape, len(given.lengths)
    columns = 128 // of.kv_dtype.itemsize
    maps = [
        box(cache, (cache[..., 0].numel(), of.head_dim), PAGE, columns, swizzled=2)
        for cache in (given.keys, given.values)
    ]
    y = torch.full((sequences + 1, of.num_heads, of.head_dim), float("nan"), dtype=of.dtype)
    tensors = (
        *maps, given.qkv, y, given.cos, given.sin, given.q_norm, given.k_norm, given.keys, given.values,
        given.scales, given.step.block_tables, given.step.lengths,
    )  # fmt: skip
    numbers = (given.step.block_tables.shape[1], of.num_kv_heads, given.window)
    fractions = (given.scale, given.softcap, EPS)
    blocks = sequences * of.num_kv_heads * variant.splits
    library.run(order, blocks, *map(pointer, tensors), *map(c_int, numbers), *map(c_float, fractions))
    return y


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the kernel for the emulator")
@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
def test_what_is_broken_shows(tmp_path: Path, codes: torch.dtype) -> None:
    """NaN in a query, infinity in the only value, an old scale of NaN: in those heads, nowhere else; and
    codes stay finite."""
    of = shape(128, 2, 2, HALF, codes)
    variant = variant_of(of, Settings(2, 2, 2))
    library = build(variant.program, tmp_path, RUN)
    torch.manual_seed(2)
    given = decodes(of, [40, 1, 33])
    assert given.scales is not None
    given.qkv[0, 3 * 128] = float("nan")  # query head 3
    given.qkv[1, 6 * 128] = float("inf")  # value head 0, of the only token
    given.scales[int(given.step.block_tables[2, 1]), 1, 2, 0] = float("nan")
    hurt = torch.isnan(emulated(library, variant, given, 0)[:-1]).any(2)
    assert hurt.nonzero().tolist() == [[0, 3], [1, 0], [1, 1], [2, 2], [2, 3]]
    assert all(bool(cache.float().isfinite().all()) for cache in (given.keys, given.values))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the kernel for the emulator")
@pytest.mark.parametrize(
    ("of", "settings", "lengths", "window", "softcap", "rotates", "wild"), CASES, ids=str
)
def test_it_computes_the_same_bits_in_whatever_order_blocks_come(
    tmp_path: Path,
    of: Shape,
    settings: Settings,
    lengths: list[int],
    window: int,
    softcap: float,
    rotates: bool,
    wild: float,
) -> None:
    torch.manual_seed(0)
    of = replace(of, is_capped=softcap > 0)
    variant = variant_of(of, settings)
    library = build(variant.program, tmp_path, RUN)
    found = []
    for order in (0, 5):
        torch.manual_seed(1)
        given = decodes(of, lengths, window=window, softcap=softcap, rotates=rotates, wild=wild)
        want, k, v = given.wanted()
        caches = [cache for cache in (given.keys, given.values, given.scales) if cache is not None]
        before = [cache.clone() for cache in caches]
        y = emulated(library, variant, given, order)
        assert torch.isnan(y[-1]).all()
        got = y[:-1].double()
        assert float((got - want).norm() / want.norm()) < TOLERANCE[of.dtype]
        for row, length in enumerate(lengths):
            assert length or not got[row].any(), "a padded row gets zeros"
        blocks, offsets = given.places()
        for row, length in enumerate(lengths):
            place = (int(blocks[row]), slice(None), int(offsets[row]))
            for part, new in enumerate((k, v) if length else ()):
                kept = given.meant(part, blocks[row : row + 1])[0, :, place[2]]
                error = (kept - given.kept(new[row])).norm() / new[row].double().norm()
                is_moved_alone = part == 1 or (given.cos is None and given.k_norm is None)
                assert error <= (0 if is_moved_alone else TOLERANCE[of.dtype])
            for cache, old in zip(caches, before, strict=True):
                cache[place] = old[place]
        for cache, old in zip(caches, before, strict=True):
            assert torch.equal(cache.view(torch.int8), old.view(torch.int8)), "nothing else is written"
        found.append(y[:-1])
    assert torch.equal(*found)


LLAMA = shape(128, 4, 8, HALF)


def test_whom_it_serves() -> None:
    assert plan(LLAMA)
    assert "float32" in refusal(replace(LLAMA, dtype=torch.float32))
    assert "float32" in refusal(replace(LLAMA, kv_dtype=torch.float32))
    assert "48 dimensions" in refusal(replace(LLAMA, head_dim=48))
    assert "32 query heads" in refusal(replace(LLAMA, num_heads=256))
    assert plan(replace(LLAMA, num_heads=256)) == ()


@pytest.mark.parametrize("kv_dtype", [INT8, FP8])
def test_8_bit_caches_are_served_by_the_same_settings(kv_dtype: torch.dtype) -> None:
    coded, plain = plan(replace(LLAMA, kv_dtype=kv_dtype)), plan(LLAMA)
    assert [row.max_sequences for row in coded] == [row.max_sequences for row in plain]
    assert {table.pages_of(row.variant) for row in coded} == {kv_dtype}


def test_few_sequences_are_shared_by_many_blocks() -> None:
    """And of models with few KV heads more of them."""
    for kv_heads in (1, 2, 8, 32):
        rows = plan(shape(128, 4, kv_heads, BRAIN))
        ends = [row.max_sequences for row in rows]
        assert ends[-1] is None
        assert ends[:-1] == sorted({end for end in ends if end})
        assert {row.variant.bf16 for row in rows} == {1}
        splits = [row_for(rows, sequences).variant.splits for sequences in range(1, 300)]
        assert splits == sorted(splits, reverse=True)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_variants_fit_the_device(dim: int, group: int) -> None:
    rows = [rows_of(shape(dim, group, 1, HALF, kv_dtype), TABLE) for kv_dtype in (HALF, INT8)]
    for row in (*rows[0], *rows[1]):
        assert row.variant.per_sm * (row.variant.shared_bytes + 1024) <= 228 << 10
        assert row.variant.splits <= 16


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    cuda.call_of.cache_clear()
    yield stand_in(monkeypatch, cuda, NUM_ARGUMENTS)
    cuda.call_of.cache_clear()


@pytest.mark.parametrize(("kv_dtype", "columns"), [(HALF, 64), (INT8, 128), (FP8, 128)])
@pytest.mark.parametrize("dependent", [True, False])
def test_what_a_call_tells(
    library: Driver, monkeypatch: pytest.MonkeyPatch, dependent: bool, kv_dtype: torch.dtype, columns: int
) -> None:
    """One call serves all layers: maps and addresses are each layer's own."""
    monkeypatch.setattr(launching, "DEPENDENT", dependent)
    of = replace(LLAMA, kv_dtype=kv_dtype)
    variant = row_for(rows_of(of, TABLE), 2).variant
    for given in (decodes(of, [40, 7]), decodes(of, [3, 90], rotates=False)):
        maps_before = len(library.maps)
        y = cuda.decode_attention(
            variant, given.qkv, given.cos, given.sin, None, None, EPS, given.keys, given.values, given.step,
            0.25, 33, 0.0, given.scales,
        )  # fmt: skip
        told = library.launches[-1]
        config = told.config
        assert y.shape == (2, 32, 128)
        assert config.grid_x == 2 * 8 * variant.splits
        assert (config.block_x, config.shared_bytes) == (variant.threads, variant.shared_bytes)
        assert (config.stream, config.num_attributes) == (STREAM, int(dependent))
        tensors = (
            given.qkv, y, given.cos, given.sin, None, None, given.keys, given.values, given.scales,
            given.step.block_tables, given.step.lengths,
        )  # fmt: skip
        assert told.pointers(POINTERS) == [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        assert told.integers(NUMBERS) == [given.step.block_tables.shape[1], 8, 33]
        assert told.floats(FRACTIONS) == pytest.approx([0.25, 0.0, EPS])
        of_keys, of_values = library.maps[maps_before:]
        rows = given.keys.shape[0] * 8 * PAGE
        for told_map, pages in ((of_keys, given.keys), (of_values, given.values)):
            assert told_map[1:5] == (
                pages.data_ptr(),
                [128, rows],
                [128 * kv_dtype.itemsize],
                [columns, PAGE],
            )


@pytest.mark.parametrize(("splits", "is_wide"), [(8, False), (16, True)])
def test_clusters_of_more_than_eight_blocks_are_allowed(
    monkeypatch: pytest.MonkeyPatch, splits: int, is_wide: bool
) -> None:
    class Library:
        def __init__(self) -> None:
            self.asked: list[tuple[Any, ...]] = []

        def use_context(self) -> None: ...

        def call(self, name: str, *told: Any) -> None:
            if name == "cuFuncSetAttribute":
                self.asked.append(told[1:])

    found = Library()
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(driver, "cubin", lambda program: b"")
    variant = variant_of(LLAMA, Settings(4, 2, splits))
    driver.kernel_of.cache_clear()
    cuda.load(variant)
    driver.kernel_of.cache_clear()
    allowed = [(driver.WIDE_CLUSTERS, 1)] if is_wide else []
    assert found.asked == [(driver.MAX_DYNAMIC_SHARED_BYTES, variant.shared_bytes), *allowed]


def test_what_is_not_the_variant_s_is_not_launched(library: Driver) -> None:
    """The kernel would read what is not there."""
    given = decodes(LLAMA, [40, 7])
    for changes in ({"num_heads": 16}, {"dtype": BRAIN, "kv_dtype": BRAIN}, {"kv_dtype": INT8}):
        variant = row_for(rows_of(replace(LLAMA, **changes), TABLE), 2).variant
        with pytest.raises(AssertionError):
            cuda.decode_attention(
                variant, given.qkv, given.cos, given.sin, None, None, EPS, given.keys, given.values,
                given.step, 0.25, 0, 0.0,
            )  # fmt: skip
    assert not library.launches


def test_steps_that_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts alone, deterministic steps, and all where there is no such GPU."""
    tables = torch.zeros(2, 4, dtype=torch.int32)
    steps = {
        "decode": plan_attention(tables, [0, 1, 2], [5, 9], 2),
        "mixed": plan_attention(tables, [0, 1, 9], [5, 9], 1),
        "prompts": plan_attention(tables, [0, 2, 9], [5, 9], 0),
    }
    assert serving(LLAMA, steps["decode"]) is None
    monkeypatch.setattr("service.kernels.decode_attention.absence", lambda: "")
    lengths: Any = SimpleNamespace(device=torch.device("cuda"))
    there = {name: replace(step, lengths=lengths) for name, step in steps.items()}
    assert serving(LLAMA, there["decode"]) == row_for(plan(LLAMA), 2).variant
    assert serving(LLAMA, there["mixed"]) == row_for(plan(LLAMA), 1).variant
    assert serving(LLAMA, there["prompts"]) is None
    assert serving(LLAMA, replace(there["decode"], deterministic=True)) is None
