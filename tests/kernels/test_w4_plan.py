"""The table of W4 kernels: total for what it does not refuse, one reason for what it does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.kernels.w4_linear import Kind, Shape, kernel_name, plan, refusal
from service.kernels.w4_linear.plan import GROUPS, most_sums
from service.kernels.w4_linear.variants import Few, Tile, most_shared_bytes

HALF = torch.float16
LLAMA = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}


def shape(kind: Kind, outs: tuple[int, ...], in_features: int, **changes: object) -> Shape:
    told = {"group_size": GROUPS[kind][0], "dtype": HALF} | changes
    return Shape(kind, outs, in_features, **told)  # type: ignore[arg-type]


@given(
    kind_and_group=st.sampled_from([(kind, group) for kind, groups in GROUPS.items() for group in groups]),
    outs=st.builds(
        lambda outs, step: [out * step for out in outs],
        st.lists(st.integers(1, 120), min_size=1, max_size=5),
        st.sampled_from([8, 16, 64, 128, 256]),
    ),
    in_features=st.builds(lambda steps, step: steps * step, st.integers(1, 128), st.sampled_from([64, 128])),
    num_rows=st.integers(1, 10_000),
    dtype=st.sampled_from([HALF, torch.bfloat16]),
)
def test_it_has_a_kernel_or_a_reason(
    kind_and_group: tuple[Kind, int], outs: list[int], in_features: int, num_rows: int, dtype: torch.dtype
) -> None:
    kind, group_size = kind_and_group
    asked = shape(kind, tuple(outs), in_features, dtype=dtype, group_size=group_size)
    if reason := refusal(asked):
        assert "no multiple" in reason or "share an input" in reason
        return
    rows = plan(asked)
    ends = [row.max_rows for row in rows]
    assert ends[-1] is None
    assert ends[:-1] == sorted({end for end in ends if end})
    variant = next(row.variant for row in rows if row.max_rows is None or num_rows <= row.max_rows)
    assert 0 < variant.shared_bytes_for(num_rows, in_features) <= most_shared_bytes(variant.each)
    assert variant.threads <= 1024
    assert not isinstance(variant, Few) or num_rows <= 8 * variant.tiles
    assert not isinstance(variant, Tile) or variant.each * variant.sums_of_block <= most_sums()
    assert (variant.bf16, variant.group) == (dtype is torch.bfloat16, group_size)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", LLAMA)
def test_the_shapes_that_were_measured(kind: Kind, name: str) -> None:
    rows = plan(shape(kind, *LLAMA[name]))
    kernels = [row.variant.kernel for row in rows]
    assert kernels == sorted(kernels)
    # a block has all rows of x in shared memory; NF4's wide linears are faster in tiles
    most = {
        "down": {"affine": 5, "nf4": 4, "int3": 5}[kind],
        "gate_up": {"affine": 4, "nf4": 0, "int3": 4}[kind],
    }.get(name, 8)
    assert max((row.max_rows or 0 for row in rows if isinstance(row.variant, Few)), default=0) == most
    ends = [row.max_rows for row in rows if isinstance(row.variant, Tile)]
    many = [256, 384, 512, 576, 640, 768, *([896] if name in ("qkv", "gate_up") else []), None]
    assert ends == [*([] if most == 8 else [8]), 16, 32, 64, 128, *many]
    # of many rows at most three tiles, each whole or stretched
    assert len({row.variant.program for row in rows}) <= len(rows) - len(many) + 6


@pytest.mark.parametrize(
    ("outs", "num_rows", "outputs", "stretched"),
    [
        (4096, 64, 128, 0),  # 32 tiles in four shares
        (6144, 64, 192, 0),  # likewise
        (28672, 64, 256, 0),  # 112 whole tiles, not 224 in two rounds
        (40960, 64, 256, 1),  # 160 would leave half of the second round idle
        (6144, 256, 128, 1),  # 48 in two shares would leave 36 multiprocessors idle
    ],
)
def test_tiles_keep_the_device_busy(outs: int, num_rows: int, outputs: int, stretched: int) -> None:
    row = next(row for row in plan(shape("affine", (outs,), 4096)) if row.max_rows in (num_rows, None))
    assert isinstance(row.variant, Tile)
    assert (row.variant.outputs, row.variant.stretched) == (outputs, stretched)


@pytest.mark.parametrize(
    ("num_rows", "tile"),
    [
        (384, 192),  # two tiles of 256 would be a quarter air
        (512, 256),
        (528, 192),  # a prompt of 512 and some that decode
        (640, 128),
        (768, 256),
        (1024, 256),
    ],
)
def test_tiles_of_many_rows_fit_them(num_rows: int, tile: int) -> None:
    row = next(r for r in plan(shape("nf4", (4096,), 4096)) if r.max_rows is None or num_rows <= r.max_rows)
    assert isinstance(row.variant, Tile)
    assert row.variant.tile == tile


def test_where_no_row_fits_there_is_no_row_of_the_table() -> None:
    rows = plan(shape("affine", (128,), 128 * 800))
    assert isinstance(rows[0].variant, Tile)
    assert rows[0].max_rows == 8


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"group_size": 32}, "groups are of 32"),
        ({"is_nested": False}, "double quantization"),
        ({"in_features": 576}, "576 input features are no multiple"),  # the demo model's
        ({"outs": (96, 40, 120)}, "no multiple of 16 each"),
        ({"outs": (96, 16)}, "and of 32 together"),
        ({"outs": (128,) * 5}, "5 linears"),
        ({"in_features": 192}, "192 input features are no multiple"),
    ],
)
def test_who_is_refused_is_told_why(changes: dict[str, object], reason: str) -> None:
    told = {"outs": (4096,), "in_features": 4096} | changes
    assert reason in refusal(shape("nf4", **told))  # type: ignore[arg-type]


def test_a_layer_names_the_kernels_that_serve_it() -> None:
    asked = shape("affine", (4096,), 4096)
    assert kernel_name(torch.device("cuda"), asked) == "cuda.w4_few up to 8 rows, cuda.w4_tile"
    assert kernel_name(torch.device("cpu"), asked) == "reference.w4_linear"
