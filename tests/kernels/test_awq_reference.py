"""AutoAWQ's GEMM layout against words written by hand, and the CPU forms against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.awq_linear import apply, cpu, dense, prepare, reference


def signed(word: int) -> int:
    """The int32 with these bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def words(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor([[signed(word) for word in row] for row in rows], dtype=torch.int32)


# a word's hexadecimal digits, right to left, are columns 0 2 4 6 1 3 5 7 of its eight
BY_HAND = [
    (0x00000000, [0, 0, 0, 0, 0, 0, 0, 0]),
    (0x0000000F, [15, 0, 0, 0, 0, 0, 0, 0]),
    (0x000000F0, [0, 0, 15, 0, 0, 0, 0, 0]),
    (0x000F0000, [0, 15, 0, 0, 0, 0, 0, 0]),
    (0xF0000000, [0, 0, 0, 0, 0, 0, 0, 15]),
    (0x75316420, [0, 1, 2, 3, 4, 5, 6, 7]),
    (0xFDB9ECA8, [8, 9, 10, 11, 12, 13, 14, 15]),
]


@pytest.mark.parametrize(("word", "columns"), BY_HAND, ids=[f"{word:08x}" for word, _ in BY_HAND])
def test_a_word_by_hand(word: int, columns: list[int]) -> None:
    assert reference.unpack(words((word,))).tolist() == [columns]
    assert torch.equal(reference.pack(torch.tensor([columns])), words((word,)))


def test_a_layer_by_hand() -> None:
    """in 4, group 2, out 8: (code - zero) * scale, zero and scale of the row's own group."""
    qweight = words((0x75316420,), (0xFDB9ECA8,), (0x00000000,), (0x0000000F,))
    qzeros = words((0x11111111,), (0x80000002,))
    scales = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0.5], [2.0] * 8]).half()
    want = [
        [-1, 0, 1, 2, 3, 4, 5, 3],
        [7, 8, 9, 10, 11, 12, 13, 7],
        [-4, 0, 0, 0, 0, 0, 0, -16],
        [26, 0, 0, 0, 0, 0, 0, -16],
    ]
    assert reference.dequantize(qweight, qzeros, scales).tolist() == want
    x = torch.tensor([[1.0, 0, 0, 10]])
    assert reference.awq_linear(x, qweight, qzeros, scales).tolist() == [[259, 0, 1, 2, 3, 4, 5, -157]]


@given(st.integers(1, 9), st.integers(1, 5), st.randoms(use_true_random=False))
def test_pack_round_trip(rows: int, num_words: int, random: object) -> None:
    seed = random.getrandbits(32)  # type: ignore[attr-defined]
    values = torch.randint(0, 16, (rows, num_words * 8), generator=torch.Generator().manual_seed(seed))
    packed = reference.pack(values)
    assert packed.dtype == torch.int32
    assert torch.equal(reference.unpack(packed).long(), values)


def random_layer(in_features: int, out_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features + out_features + group)
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator)
    zeros = torch.randint(0, 16, (in_features // group, out_features), generator=generator)
    scales = torch.rand(in_features // group, out_features, generator=generator) * 0.02 + 1e-3
    return reference.pack(codes), reference.pack(zeros), scales.half()


SHAPES = [(128, 64, 32), (192, 192, 64), (576, 960, 64), (256, 128, 128), (256, 72, 128), (80, 64, 16)]
RELATIVE_RMS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize(("in_features", "out_features", "group"), SHAPES)
def test_prepared_bits_are_only_moved(in_features: int, out_features: int, group: int) -> None:
    layer = random_layer(in_features, out_features, group)
    weight = prepare(*layer)
    packed = out_features % 64 == 0 and group != 16
    assert weight.kernel == ("torch.int4pack" if packed and cpu.span() else "reference.awq_linear")
    assert torch.equal(dense(weight.codes, weight.zeros, weight.scales), reference.dequantize(*layer).t())


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 33, cpu.MAX_PACKED_ROWS, cpu.MAX_PACKED_ROWS + 1])
@pytest.mark.parametrize(("in_features", "out_features", "group"), SHAPES)
def test_cpu_paths_agree_with_the_reference(
    in_features: int, out_features: int, group: int, tokens: int, dtype: torch.dtype
) -> None:
    layer = random_layer(in_features, out_features, group)
    weight = prepare(*layer)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    want = x.float() @ reference.dequantize(*layer)
    got = apply(x, weight.codes, weight.zeros, weight.scales)
    assert got.dtype == dtype
    assert (got.float() - want).norm() < RELATIVE_RMS[dtype] * want.norm()


def test_chunks_cover_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last chunk narrower than the others, as at 960 columns."""
    layer = random_layer(192, 320, 64)
    weight = prepare(*layer)
    if weight.codes.dtype != torch.uint8:
        pytest.skip("this CPU has another int4pack order")
    x = torch.randn(cpu.MAX_PACKED_ROWS + 4, 192)
    whole = apply(x, weight.codes, weight.zeros, weight.scales)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 192 * 4 * 128)
    torch.testing.assert_close(apply(x, weight.codes, weight.zeros, weight.scales), whole)


def test_rows_that_are_not_contiguous() -> None:
    layer = random_layer(192, 128, 64)
    weight = prepare(*layer)
    x = torch.randn(5, 384).bfloat16()[:, ::2]
    want = x.float() @ reference.dequantize(*layer)
    got = apply(x, weight.codes, weight.zeros, weight.scales).float()
    assert (got - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize("span", cpu.SPANS)
def test_nibbles_of_both_orders(monkeypatch: pytest.MonkeyPatch, span: int) -> None:
    """Byte b of a feature of a block: its output b low, its output span + b high."""
    codes = torch.randint(16, (128, 32), dtype=torch.uint8)
    packed = torch.empty(64 // span, 32, span, dtype=torch.uint8)
    for block in range(64 // span):
        for byte in range(span):
            low = block * 2 * span + byte
            packed[block, :, byte] = codes[low] | codes[low + span] << 4
    packed = packed.view(128, 16)
    assert torch.equal(cpu.unpack_int4(packed, span), codes)
    monkeypatch.setattr(cpu, "span", lambda: span)
    zeros, scales = torch.zeros(1, 128, dtype=torch.int8), torch.ones(1, 128)
    assert torch.equal(cpu.dequantize(packed, zeros, scales, torch.float32).t(), codes.float() - 8)


def test_an_unknown_int4pack_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch documents no order: were it another one, the reference must serve, not wrong numbers."""

    def other_order(codes: Tensor, span: int) -> Tensor:
        return real(codes.view(codes.shape[0], -1).flip(0).contiguous(), span)

    real = cpu.unpack_int4
    monkeypatch.setattr(cpu, "unpack_int4", other_order)
    cpu.span.cache_clear()
    try:
        assert prepare(*random_layer(128, 64, 32)).kernel == "reference.awq_linear"
    finally:
        cpu.span.cache_clear()


def test_ops_have_fakes() -> None:
    """Shapes without computing, as graph capture and torch.compile ask for."""
    layer = random_layer(128, 64, 32)
    weight = prepare(*layer)
    with torch.device("meta"):
        x = torch.empty(3, 128, dtype=torch.bfloat16)
    y = torch.ops.halftone.awq_linear(x, *(t.to("meta") for t in layer))
    assert y.shape == (3, 64)
    assert y.dtype == torch.bfloat16
    packed = (weight.codes, weight.zeros, weight.scales)
    assert torch.ops.halftone.awq_linear_int4pack(x, *(t.to("meta") for t in packed)).shape == (3, 64)
