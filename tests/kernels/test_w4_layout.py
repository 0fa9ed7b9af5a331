"""The order that the W4 kernels read: as drawn, and back to the checkpoint's bits, merged parts included."""

import pytest
import torch

from service.kernels.w4_linear import Kind, dequantize, layout, reference
from service.kernels.w4_linear.layout import pack_codes, unpack_awq, unpack_codes, unpack_int3, unpack_nf4
from tests.kernels.w4_weights import KINDS, NF4, random_awq, random_int3, random_nf4, random_weight

OUTS = (32, 16, 48)
IN = 512


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows_at_once", [16, 2048])
@pytest.mark.parametrize("group_size", [64, 128])
def test_awq_comes_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, group_size: int
) -> None:
    monkeypatch.setattr(layout, "ROWS_AT_ONCE", rows_at_once)
    source = random_awq(OUTS, IN, group_size=group_size)
    qweight, qzeros, scales = unpack_awq(source.pack(OUTS))
    assert torch.equal(qweight, source.qweight)
    assert torch.equal(qzeros, source.qzeros)
    assert torch.equal(scales, source.scales)


@pytest.mark.parametrize("rows_at_once", [16, 2048])
def test_nf4_comes_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(layout, "ROWS_AT_ONCE", rows_at_once)
    source = random_nf4(OUTS, IN)
    codes, absmax = unpack_nf4(source.pack(OUTS))
    assert torch.equal(codes, source.codes)
    for mine, part in zip(absmax, source.absmax, strict=True):
        assert torch.equal(mine, part[: len(mine)])


@pytest.mark.parametrize("rows_at_once", [16, 2048])
@pytest.mark.parametrize("group_size", [64, 128])
def test_int3_comes_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, group_size: int
) -> None:
    monkeypatch.setattr(layout, "ROWS_AT_ONCE", rows_at_once)
    source = random_int3(OUTS, IN, group_size=group_size)
    weight = source.pack(OUTS)
    assert weight.group_size == group_size
    codes, zeros, scales = unpack_int3(weight)
    assert torch.equal(codes, source.codes)
    assert torch.equal(zeros, source.zeros)
    assert torch.equal(scales, source.scales)


def test_three_bits_lie_where_they_are_drawn() -> None:
    """Of three words that a lane has of four fragments, the fourth lies in the highest bits of nibbles."""
    codes = torch.randint(0, 8, (96, IN)).to(torch.uint8)
    packed = pack_codes(codes, "int3")
    assert torch.equal(unpack_codes(packed, "int3"), codes)
    assert packed.shape == (6, IN // 64, 384)
    for lane in (0, 5, 31):
        places = (8 * lane, 8 * lane + 4, 256 + 4 * lane)
        words = [int(packed[1, 2, at : at + 4].view(torch.int32)) & 0xFFFFFFFF for at in places]
        for s in range(4):
            for r in range(4):
                row, column = 16 + lane // 4 + 8 * (r % 2), 128 + 16 * s + 8 * (r // 2) + 2 * (lane % 4)
                for pair in range(2):
                    code, nibble = int(codes[row, column + pair]), r + 4 * pair
                    if s < 3:
                        assert words[s] >> 4 * nibble & 7 == code
                    else:
                        bits = [word >> 4 * nibble + 3 & 1 for word in words]
                        assert bits == [code >> 2, code >> 1 & 1, code & 1]


@pytest.mark.parametrize("kind", ["affine", "nf4"])
def test_a_weight_lies_where_it_is_drawn(kind: Kind) -> None:
    codes = torch.randint(0, 16, (96, IN)).to(torch.uint8)
    packed = pack_codes(codes, kind)
    assert torch.equal(unpack_codes(packed, kind), codes)
    for lane in (0, 5, 31):
        for s in range(4):
            for r in range(4):
                row, column = 16 + lane // 4 + 8 * (r % 2), 128 + 16 * s + 8 * (r // 2) + 2 * (lane % 4)
                low, high = int(codes[row, column]), int(codes[row, column + 1])
                word = packed[1, 2, lane, s]
                if kind == "nf4":
                    assert word[r] == low | high << 4
                else:
                    bits = int(word.contiguous().view(torch.int32)) & 0xFFFFFFFF
                    assert bits >> 4 * r & 0xF000F == low | high << 16


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_it_means_what_the_checkpoint_means(kind: Kind, group_size: int) -> None:
    """Whole and by part; every part with its own scales, zeros and offset."""
    source = random_weight(kind, OUTS, IN, group_size=group_size)
    weight, want = source.pack(OUTS), source.dense()
    assert weight.kind == kind
    assert (weight.out_features, weight.in_features, weight.outs) == (sum(OUTS), IN, OUTS)
    torch.testing.assert_close(dequantize(weight), want, rtol=1e-6, atol=0)
    for part, rows in enumerate(want.split(list(OUTS))):
        torch.testing.assert_close(dequantize(weight, part), rows, rtol=1e-6, atol=0)
    x = torch.randn(3, IN)
    torch.testing.assert_close(reference.w4_linear(x, weight), x @ want.t())


def test_bytes_a_weight() -> None:
    """Four bits, and AWQ's 16 + 4 in 128, NF4's 8 in 64 and 32 in 16,384; three, and 16 + 4 in a group."""
    outs, in_features = (256, 128, 128), 1024
    awq, nf4 = random_awq(outs, in_features).pack(outs), random_nf4(outs, in_features).pack(outs)
    assert awq.zeros is not None
    assert nf4.nested is not None
    weights = sum(outs) * in_features
    bits = 8 * (awq.codes.nbytes + awq.scales.nbytes + awq.zeros.nbytes) / weights
    assert bits == 4 + 20 / 128
    assert random_awq(outs, in_features, group_size=64).pack(outs).scales.nbytes == 2 * awq.scales.nbytes
    bits = 8 * (nf4.codes.nbytes + nf4.scales.nbytes + nf4.nested.absmax.nbytes) / weights
    assert bits == 4 + 8 / 64 + 32 / 16384
    for group_size in (64, 128):
        int3 = random_int3(outs, in_features, group_size=group_size).pack(outs)
        assert int3.zeros is not None
        bits = 8 * (int3.codes.nbytes + int3.scales.nbytes + int3.zeros.nbytes) / weights
        assert bits == 3 + 20 / group_size


def test_levels_are_those_of_bitsandbytes() -> None:
    from service.precision.nf4 import codebook

    levels = torch.tensor(reference.NF4_LEVELS)
    assert torch.equal(levels, codebook(torch.device("cpu")).cpu())
    assert torch.equal(levels, torch.tensor(NF4))
