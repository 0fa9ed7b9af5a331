"""The table of W4 kernels: total for what it does not refuse, one reason for what it does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.kernels.w4_linear import Kind, Shape, kernel_name, plan, refusal
from service.kernels.w4_linear.variants import MAX_SHARED_BYTES, Few, Tile

HALF = torch.float16
LLAMA = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}


def shape(kind: Kind, outs: tuple[int, ...], in_features: int, **changes: object) -> Shape:
    told = {"group_size": 128 if kind == "affine" else 64, "dtype": HALF} | changes
    return Shape(kind, outs, in_features, **told)  # type: ignore[arg-type]


@given(
    kind=st.sampled_from(["affine", "nf4"]),
    outs=st.builds(
        lambda outs, step: [out * step for out in outs],
        st.lists(st.integers(1, 120), min_size=1, max_size=5),
        st.sampled_from([8, 16, 64, 128, 256]),
    ),
    in_features=st.builds(lambda steps, step: steps * step, st.integers(1, 128), st.sampled_from([64, 128])),
    num_rows=st.integers(1, 10_000),
)
def test_it_has_a_kernel_or_a_reason(kind: Kind, outs: list[int], in_features: int, num_rows: int) -> None:
    asked = shape(kind, tuple(outs), in_features)
    if reason := refusal(asked):
        assert "no multiple" in reason or "cannot be cut" in reason or "share an input" in reason
        return
    rows = plan(asked)
    ends = [row.max_rows for row in rows]
    assert ends[-1] is None
    assert ends[:-1] == sorted({end for end in ends if end})
    variant = next(row.variant for row in rows if row.max_rows is None or num_rows <= row.max_rows)
    assert variant.serves(asked.out_features, in_features)
    assert 0 < variant.shared_bytes <= MAX_SHARED_BYTES
    assert variant.threads <= 1024
    most = 8 * variant.nt if isinstance(variant, Few) else None
    assert most is None or num_rows <= most
    assert variant.clusters(num_rows, asked.out_features, 132) > 0


@pytest.mark.parametrize("kind", ["affine", "nf4"])
@pytest.mark.parametrize("name", LLAMA)
def test_the_shapes_that_were_measured(kind: Kind, name: str) -> None:
    rows = plan(shape(kind, *LLAMA[name]))
    first, second = rows[0].variant, rows[1].variant
    assert isinstance(first, Few)
    assert isinstance(second, Few)
    shares = {4096: (1, 1), 14336: (2, 4)}[LLAMA[name][1]]
    assert (first.cluster, second.cluster) == shares
    assert all(isinstance(row.variant, Tile) for row in rows[2:])
    assert len({row.variant.program for row in rows}) >= 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"group_size": 32}, "groups are of 32"),
        ({"is_nested": False}, "double quantization"),
        ({"outs": (576,), "in_features": 1536}, "no multiple of 16 each and of 128"),  # the demo model's
        ({"outs": (96, 40, 120)}, "no multiple of 16 each"),
        ({"outs": (128,) * 5}, "5 linears"),
        ({"in_features": 192}, "192 input features are no multiple"),
        ({"in_features": 128 * 37}, "cannot be cut"),
    ],
)
def test_who_is_refused_is_told_why(changes: dict[str, object], reason: str) -> None:
    told = {"outs": (4096,), "in_features": 4096} | changes
    assert reason in refusal(shape("nf4", **told))  # type: ignore[arg-type]


def test_a_layer_names_the_kernels_that_serve_it() -> None:
    asked = shape("affine", (4096,), 4096)
    assert kernel_name(torch.device("cuda"), asked) == "cuda.w4_few up to 16 rows, cuda.w4_tile"
    assert kernel_name(torch.device("cpu"), asked) == "reference.w4_linear"
