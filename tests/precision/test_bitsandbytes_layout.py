"""int8 and nf4 against bytes that bitsandbytes makes, and against the numbers of the papers."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor

from service.errors import PrecisionError
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.int8 import Int8Linear
from service.precision.linear import LinearSpec
from service.precision.nf4 import NF4Linear, codebook, deinterleave, interleave

CPU = torch.device("cpu")
OUTS, IN = (96, 160, 32), 192  # 288, 480 and 96 blocks: none a multiple of the nested 256


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"part{i}.weight": (torch.randn(out, IN, generator=generator) * 0.1).bfloat16()
        for i, out in enumerate(OUTS)
    }


def group_of(dtype: torch.dtype) -> LinearGroup:
    parts = tuple(LinearSpec(f"part{i}", IN, out) for i, out in enumerate(OUTS))
    return LinearGroup("qkv_proj", parts, CPU, dtype)


def nf4(precision: str, dtype: torch.dtype) -> NF4Linear:
    layer = load_backend(precision).build(group_of(dtype), weights().__getitem__)
    assert isinstance(layer, NF4Linear)
    return layer


def int8(precision: str, dtype: torch.dtype = torch.bfloat16) -> Int8Linear:
    layer = load_backend(precision).build(group_of(dtype), weights().__getitem__)
    assert isinstance(layer, Int8Linear)
    return layer


def test_int8_codes_and_scales_are_those_of_bitsandbytes() -> None:
    layer = int8("int8")
    want = [bnb.int8_vectorwise_quant(weight.half()) for weight in weights().values()]
    assert torch.equal(layer.codes, torch.cat([codes for codes, _, _ in want]))
    assert torch.equal(layer.scales, torch.cat([scales for _, scales, _ in want]))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_forward_is_that_of_bitsandbytes(threshold: float) -> None:
    """With planted outliers, so that the 16-bit share is not empty."""
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[4, 17] = 40
    weight = torch.cat(list(weights().values()))
    theirs = Linear8bitLt(IN, weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu").eval()
    ours = int8(f"int8:kernel=bitsandbytes,threshold={threshold}")
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("rule", ["row", "batch"])
def test_int8_outlier_features_are_exact(rule: str) -> None:
    """A feature that reaches the threshold is not rounded; without decomposition it ruins its row."""
    x = torch.zeros(1, IN)
    x[0, 5], x[0, 6] = 100, 0.3
    want = x @ torch.cat([int8("int8").dense(part) for part in range(3)]).t()
    split = int8(f"int8:outliers={rule}", torch.float32)(x)
    whole = int8("int8:threshold=0", torch.float32)(x)
    assert (split - want).norm() < 1e-3 * want.norm()
    assert (whole - want).norm() > 10 * (split - want).norm()


def test_absmax_vectors() -> None:
    """Worked example of absmax quantization: scale 127 / 67 on a vector with one outlier."""
    row = torch.tensor([[-0.1, -0.23, 0.08, -0.38, -0.28, -0.29, -2.11, 0.34, -0.53, -67.0]]).half()
    codes, scale, _ = bnb.int8_vectorwise_quant(row)
    assert codes.tolist() == [[0, 0, 0, -1, -1, -1, -4, 1, -1, -127]]
    assert scale.tolist() == [67.0]


def test_nf4_levels() -> None:
    """The sixteen quantiles of the paper."""
    want = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
    want += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
    torch.testing.assert_close(codebook(CPU), torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_bits_are_those_of_bitsandbytes(double_quant: bool, dtype: torch.dtype) -> None:
    """Codes, and what they mean after double quantization, each part with its own nested scales."""
    layer = nf4("nf4" if double_quant else "nf4:double_quant=off", dtype)
    codes = deinterleave(layer.codes) if layer.interleaved else layer.codes
    start = 0
    for number, weight in enumerate(weights().values()):
        their_codes, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        assert torch.equal(codes[start : start + their_codes.numel()], their_codes.view(-1))
        start += their_codes.numel()
        state.dtype = torch.float32
        assert torch.equal(layer.dense(number), bnb.dequantize_4bit(their_codes, state))
        if double_quant:
            assert layer.offsets is not None
            assert layer.offsets[number] == state.offset
    assert start == codes.numel()


def test_nf4_interleaving_is_that_of_bitsandbytes() -> None:
    codes, state = bnb.quantize_4bit(torch.randn(96, 128), quant_type="nf4")
    want, _ = bnb._convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(interleave(codes.view(-1), 96), want)
    assert torch.equal(deinterleave(want), codes.view(-1))


def test_nf4_stays_double_quantized() -> None:
    """bitsandbytes' own CPU layer holds bf16 scales after its first forward, and its footprint has none."""
    once, twice = nf4("nf4:double_quant=off", torch.bfloat16), nf4("nf4", torch.bfloat16)
    for layer in (once, twice):
        layer(torch.ones(2, IN, dtype=torch.bfloat16))
    blocks = sum(OUTS) * IN // 64
    assert once.bytes()["scales"] == blocks * 4
    # a byte a block, parts padded to whole nested blocks, an offset a part
    assert twice.bytes()["scales"] == (512 + 512 + 256) + (2 + 2 + 1) * 4 + 3 * 4
    assert twice.bytes()["codes"] == sum(OUTS) * IN // 2


def test_nf4_needs_whole_blocks_in_a_row() -> None:
    group = LinearGroup("o_proj", (LinearSpec("o", 96, 64),), CPU, torch.bfloat16)
    with pytest.raises(PrecisionError, match="divisible by 64"):
        load_backend("nf4").build(group, lambda name: torch.zeros(64, 96))
