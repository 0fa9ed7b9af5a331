"""Packed weights against torch's own linear, and the promise that a batch does not move a float32 row."""

import pytest
import torch
import torch.nn.functional as F

from service.kernels.dense_linear import dense_linear, pack_weight, packed_bytes, unpack_weight, widened
from service.kernels.dense_linear.table import pack_table

SHAPES = [(96, 64), (130, 100), (576, 1536), (192, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_packed_equals_linear(dtype: torch.dtype, out_features: int, in_features: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    packed = pack_weight(weight)
    assert torch.equal(unpack_weight(packed), weight)
    assert packed_bytes(packed) >= weight.nbytes
    for rows in (1, 2, 7, 33):
        x = torch.randn(rows, in_features).to(dtype)
        expected = F.linear(x.double(), weight.double(), bias.double())
        error = (dense_linear(x, packed, bias) - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_rows_do_not_depend_on_their_neighbours(out_features: int, in_features: int) -> None:
    """Plain torch sums a lone float32 row in another order than the same row among others."""
    torch.manual_seed(0)
    packed = pack_weight(torch.randn(out_features, in_features))
    x = torch.randn(80, in_features)
    together = dense_linear(x, packed)
    for rows in (1, 2, 3, 8, 16, 17, 64):
        assert torch.equal(dense_linear(x[:rows].contiguous(), packed), together[:rows])


def test_block_sized_weights_take_no_extra_bytes() -> None:
    weight = torch.zeros(192, 576, dtype=torch.bfloat16)
    assert packed_bytes(pack_weight(weight)) == weight.nbytes == packed_bytes(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(128, 64), (1000, 96), (300, 576), (5000, 30)])
def test_rows_of_a_packed_table(dtype: torch.dtype, num_rows: int, num_columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(num_rows, num_columns).to(dtype)
    table = pack_table(weight)
    if not widened.has_products(dtype):
        assert table is None  # oneDNN packs what it multiplies
        return
    assert table is not None, "the layout of this CPU is not understood"
    ids = torch.randint(0, num_rows, (50,))
    assert torch.equal(table.rows(ids), weight[ids])
    x = torch.randn(3, num_columns).to(dtype)
    expected = F.linear(x.double(), weight.double())
    assert (dense_linear(x, table.packed) - expected).norm() / expected.norm() < 4e-3


def test_half_precision_keeps_the_plain_table() -> None:
    assert pack_table(torch.zeros(8, 8, dtype=torch.float16)) is None
