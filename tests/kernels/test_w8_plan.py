"""The tables of the W8A8 kernel: total for what they do not refuse, one reason for what they do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.kernels.w8_linear import AFTER_ROWS, Codes, Shape, plan, refusal, row_for
from service.kernels.w8_linear.plan import TABLES, WIDE, Settings, most_sums
from service.kernels.w8_linear.variants import SHARED_BYTES, STEP, SYSTEM_BYTES, Tile

HALF = torch.float16


@given(
    codes=st.sampled_from(["int8", "fp8"]),
    biased=st.booleans(),
    outs=st.integers(1, 3000),
    steps=st.integers(1, 2100),
    factor=st.sampled_from([1, 8, 16]),
    some_rows=st.integers(1, 10_000),
    most_blocks=st.integers(1, 140),
    dtype=st.sampled_from([HALF, torch.bfloat16]),
)
def test_it_has_a_kernel_or_a_reason(
    codes: Codes,
    biased: bool,
    outs: int,
    steps: int,
    factor: int,
    some_rows: int,
    most_blocks: int,
    dtype: torch.dtype,
) -> None:
    threshold = 6.0 if codes == "int8" else 0.0
    shape = Shape(codes, outs * factor, steps * factor, dtype, biased, threshold)
    if reason := refusal(shape):
        known = ("more than 32768",) if codes == "int8" else ("no bias", "another kernel")
        assert any(text in reason for text in ("no multiple of", *known))
        return
    rows = plan(shape)
    ends = [row.max_rows for row in rows]
    assert ends[:-1] == sorted({end for end in ends[:-1] if end})
    for row, before in zip(rows, (None, *rows), strict=False):
        assert row.after >= (before.max_rows or 0 if before else 0), "ranges do not overlap"
    most_fp8 = TABLES["fp8"][-1][0]
    assert most_fp8
    num_rows = some_rows + AFTER_ROWS if codes == "int8" else (some_rows - 1) % most_fp8 + 1
    found = row_for(rows, num_rows)
    assert found or codes == "fp8", "int8 is served by any number of rows"
    assert not row_for(rows, AFTER_ROWS if codes == "int8" else most_fp8 + 1)
    if not found:
        return
    variant = found.variant
    assert variant.tile >= num_rows or codes == "int8", "fp8's rows are one tile"
    assert variant.shared_bytes <= SHARED_BYTES - SYSTEM_BYTES
    assert variant.sums_of_block <= most_sums(codes)
    assert variant.bf16 == (dtype is torch.bfloat16)
    assert variant.codes == codes
    blocks, shared = variant.work(num_rows, shape.out_features, shape.in_features, most_blocks)
    tiles = -(-shape.out_features // variant.outputs) * -(-num_rows // variant.tile)
    assert 1 <= blocks <= most_blocks
    assert 0 <= shared <= min(tiles, most_blocks)
    assert variant.cuts or not shared
    if shared:  # no block is without a step of them
        assert shared * -(-shape.in_features // STEP) >= blocks
    else:
        assert blocks == min(tiles, most_blocks)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"out_features": 1000}, "1000 outputs"),
        ({"in_features": 112}, "112 input features are no multiple of 32"),
        ({"in_features": 1 << 16}, "65536 input features are more than 32768"),
        ({"threshold": 1e-6}, "threshold 1e-06"),
        ({"codes": "fp8", "biased": True, "threshold": 0.0}, "no bias"),
    ],
)
def test_who_is_refused_is_told_why(changes: dict[str, object], reason: str) -> None:
    told = {"codes": "int8", "out_features": 4096, "in_features": 4096, "dtype": HALF, "threshold": 6.0}
    assert reason in refusal(Shape(**told | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outs", "width", "reason"),
    [
        (WIDE + 16, 208, ""),
        (WIDE + 8, 208, "16392 outputs"),
        (WIDE, 200, "no multiple of 16"),
        (WIDE, 1 << 17, ""),
    ],
)
def test_fp8_knows_no_bitmap(outs: int, width: int, reason: str) -> None:
    """So inputs need be no whole words of it, and may be any number."""
    found = refusal(Shape("fp8", outs, width, torch.bfloat16))
    assert reason in found
    assert bool(reason) == bool(found)


def test_none_is_refused_where_there_are_no_outliers() -> None:
    assert not refusal(Shape("int8", 4096, 4096, HALF))


@pytest.mark.parametrize(("outs", "width"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_shapes_that_were_measured(outs: int, width: int) -> None:
    rows = plan(Shape("int8", outs, width, HALF, threshold=6.0))
    assert [row.max_rows for row in rows] == [32, 64, 128, 256, None]
    gathers = [row.variant.gathers for row in rows]
    assert gathers == [False, False, True, True, True]
    fp8 = Shape("fp8", outs, width, torch.bfloat16)
    if outs < WIDE:
        assert "another kernel is faster" in refusal(fp8)
    else:
        assert [(row.after, row.max_rows, row.variant.tile) for row in plan(fp8)] == [(4, 16, 16)]


def test_a_place_may_be_left_to_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    some, more = Settings(16, 1, 10), Settings(64, 1, 8, cuts=True)
    table = ((16, (some, None, None)), (32, (None, None, None)), (64, (more, more, None)))
    monkeypatch.setitem(TABLES, "fp8", table)
    narrow, deep, wide = (
        Shape("fp8", outs, width, torch.bfloat16)
        for outs, width in ((4096, 4096), (4096, 14336), (28672, 4096))
    )
    rows = plan(narrow)
    served = [row_for(rows, num_rows) for num_rows in (1, 16, 17, 32, 33, 64, 65)]
    assert [row.variant.tile if row else 0 for row in served] == [16, 16, 0, 0, 64, 64, 0]
    assert [(row.after, row.max_rows) for row in plan(deep)] == [(32, 64)]
    assert "another kernel" in refusal(wide)


@pytest.mark.parametrize(
    ("outs", "width", "num_rows", "most_blocks", "work"),
    [
        (128, 1024, 64, 132, (8, 1)),  # one tile of eight steps
        (128 * 13, 256, 64, 132, (26, 13)),
        (128 * 13, 4096, 64, 132, (132, 13)),
        (128 * 132, 256, 64, 132, (132, 0)),
        (128 * 133, 256, 64, 132, (132, 0)),  # two steps are not worth it
        (128 * 133, 32768, 64, 132, (132, 1)),
        (128, 1024, 65, 132, (16, 2)),
    ],
)
def test_every_block_that_shares_has_a_step(
    outs: int, width: int, num_rows: int, most_blocks: int, work: tuple[int, int]
) -> None:
    assert Tile("int8", 0, 64, 1, 4, 64, cuts=True).work(num_rows, outs, width, most_blocks) == work
    tiles = min(-(-outs // 128) * -(-num_rows // 64), most_blocks)
    assert Tile("int8", 0, 64, 1, 4, 64).work(num_rows, outs, width, most_blocks) == (tiles, 0)
