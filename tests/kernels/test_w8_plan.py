"""The table of the W8A8 kernel: total for what it does not refuse, one reason for what it does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.kernels.w8_linear import AFTER_ROWS, Shape, plan, refusal
from service.kernels.w8_linear.plan import most_sums
from service.kernels.w8_linear.variants import SHARED_BYTES, STEP, SYSTEM_BYTES, Tile

HALF = torch.float16


@given(
    outs=st.integers(1, 3000),
    steps=st.integers(1, 2100),
    factor=st.sampled_from([1, 8, 16]),
    num_rows=st.integers(AFTER_ROWS + 1, 10_000),
    most_blocks=st.integers(1, 140),
    dtype=st.sampled_from([HALF, torch.bfloat16]),
)
def test_it_has_a_kernel_or_a_reason(
    outs: int, steps: int, factor: int, num_rows: int, most_blocks: int, dtype: torch.dtype
) -> None:
    shape = Shape(outs * factor, steps * factor, dtype, 6.0)
    if reason := refusal(shape):
        assert "no multiple of" in reason or "more than 32768" in reason
        return
    rows = plan(shape)
    ends = [row.max_rows for row in rows]
    assert ends[-1] is None
    assert ends[:-1] == sorted({end for end in ends if end})
    variant = next(row.variant for row in rows if row.max_rows is None or num_rows <= row.max_rows)
    assert variant.shared_bytes <= SHARED_BYTES - SYSTEM_BYTES
    assert variant.sums_of_block <= most_sums()
    assert variant.bf16 == (dtype is torch.bfloat16)
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
    ],
)
def test_who_is_refused_is_told_why(changes: dict[str, object], reason: str) -> None:
    told = {"out_features": 4096, "in_features": 4096, "dtype": HALF, "threshold": 6.0} | changes
    assert reason in refusal(Shape(**told))  # type: ignore[arg-type]


def test_none_is_refused_where_there_are_no_outliers() -> None:
    assert not refusal(Shape(4096, 4096, HALF, 0.0))


@pytest.mark.parametrize(("outs", "width"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_shapes_that_were_measured(outs: int, width: int) -> None:
    rows = plan(Shape(outs, width, HALF, 6.0))
    assert [row.max_rows for row in rows] == [32, 64, 128, 256, None]
    gathers = [row.variant.gathers for row in rows]
    assert gathers == [False, False, True, True, True]


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
    assert Tile(0, 64, 1, 4, 64, cuts=True).work(num_rows, outs, width, most_blocks) == work
    tiles = min(-(-outs // 128) * -(-num_rows // 64), most_blocks)
    assert Tile(0, 64, 1, 4, 64).work(num_rows, outs, width, most_blocks) == (tiles, 0)
