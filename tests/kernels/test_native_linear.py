"""The four native linears against float64 of what their bits mean, on shapes and values to break them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from service.kernels import awq_linear, native
from service.kernels.awq_linear.reference import pack
from service.kernels.dense_linear import dense_linear, linear_kernel, pack_weight, unpack_weight
from service.kernels.dense_linear.table import pack_table
from service.kernels.int8_linear import native as int8_native
from service.kernels.native.blocks import from_blocks, from_nibbles, to_blocks, to_nibbles
from service.kernels.native.linear import NativeLinear
from service.kernels.nf4_linear import native as nf4_native
from service.precision import load_backend
from service.precision.base import LinearGroup, QuantLinear
from service.precision.bitsandbytes_import import bitsandbytes
from service.precision.linear import LinearSpec
from service.precision.nf4 import NF4Linear

needs_library = pytest.mark.skipif(native.load() is None, reason=native.absence())
CPU = torch.device("cpu")
ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 48, 49, 97)  # around six at once and 48 in a tile
# y is rounded once (half of 2^-8 at most, 0.0017 in root mean square); nf4's levels are rounded too
RELATIVE_RMS = {"bf16": 1.8e-3, "awq": 1.8e-3, "nf4": 2.2e-3, "nf4:double_quant=off": 2.2e-3}


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    native.set_threads(request.param)
    yield request.param
    native.set_threads(torch.get_num_threads())


def random_of(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def layer_of(mode: str, outs: tuple[int, ...], in_features: int, bias: bool = False) -> QuantLinear:
    generator = random_of(*outs, in_features)
    tensors: dict[str, Tensor] = {}
    for number, out in enumerate(outs):
        groups = in_features // 32
        codes = torch.randint(0, 16, (in_features, out), generator=generator)
        zeros = torch.randint(0, 16, (groups, out), generator=generator)
        # magnitudes apart by 2^12, so that a group's absmax, scale or zero in a wrong place is seen
        spread = torch.exp2(torch.randint(-8, 5, (out, groups), generator=generator).float())
        weight = torch.randn(out, groups, 32, generator=generator) * spread[..., None]
        tensors |= {
            f"part{number}.weight": weight.view(out, in_features).bfloat16(),
            f"part{number}.bias": torch.randn(out, generator=generator).bfloat16(),
            f"part{number}.qweight": pack(codes),
            f"part{number}.qzeros": pack(zeros),
            f"part{number}.scales": spread.t().half(),
        }
    parts = tuple(LinearSpec(f"part{n}", in_features, out, bias) for n, out in enumerate(outs))
    return load_backend(mode).build(LinearGroup("qkv_proj", parts, CPU, torch.bfloat16), tensors.__getitem__)


def expected(layer: QuantLinear, x: Tensor) -> Tensor:
    weight = torch.cat([layer.dense(part) for part in range(len(layer.group.parts))]).double()
    bias = getattr(layer, "bias", None)
    return x.double() @ weight.t() + (0 if bias is None else bias.double())


SHAPES = [((64,), 64), ((128, 64, 64), 192), ((64, 192), 1600), ((960,), 576)]


@needs_library
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outs", "in_features"), SHAPES)
@pytest.mark.parametrize("mode", RELATIVE_RMS)
def test_rows_are_what_the_bits_mean_whoever_is_beside_them(
    mode: str, outs: tuple[int, ...], in_features: int, bias: bool
) -> None:
    """Within one rounding of y; and a row alone is the same row among others, bit for bit."""
    layer = layer_of(mode, outs, in_features, bias)
    assert layer.kernel.startswith("native.avx512.")
    x = torch.randn(max(ROWS), in_features, generator=random_of(in_features)).bfloat16()
    together = layer(x)
    want = expected(layer, x)
    for row in range(max(ROWS)):
        error = (together[row].double() - want[row]).norm() / want[row].norm()
        assert error < 2 * RELATIVE_RMS[mode], row
    assert (together.double() - want).norm() < RELATIVE_RMS[mode] * want.norm()
    for rows in ROWS:
        assert torch.equal(layer(x[:rows]), together[:rows]), rows
        assert torch.equal(layer(x[-rows:]), together[-rows:]), rows


@needs_library
def test_every_code_under_every_zero_and_scale() -> None:
    """One feature at a time: y is (code - zero) * scale rounded once, from the least scale to the largest."""
    codes = torch.arange(64).remainder(16).expand(64, 64).contiguous()
    zeros = torch.arange(64).div(4, rounding_mode="floor").remainder(16)[None].repeat(2, 1)
    scales = torch.tensor([[2.0**-24, 65504.0, 1e-3, 0.0] * 16, [6e-5, -1.0, 3.14, 1e4] * 16]).half()
    weight = awq_linear.prepare(pack(codes), pack(zeros), scales, torch.bfloat16)
    assert weight.kernel == "native.avx512.awq_linear"
    y = awq_linear.apply(torch.eye(64).bfloat16(), weight.codes, weight.zeros, weight.scales)
    want = (codes - zeros.repeat_interleave(32, dim=0)).float() * scales.float().repeat_interleave(32, dim=0)
    assert torch.equal(y, want.bfloat16())


@needs_library
def test_each_level_and_absmax_of_nf4() -> None:
    """One feature at a time, parts of which the nested blocks end anywhere: each level within a bf16 step."""
    layer = layer_of("nf4", (64, 192, 64), 192)
    y = layer(torch.eye(192).bfloat16()).t().float()
    want = torch.cat([layer.dense(part) for part in range(3)])
    assert ((y - want).abs() <= want.abs() * 2**-7).all()
    assert ((y == 0) == (want == 0)).all()


@needs_library
@pytest.mark.parametrize("mode", ["nf4", "nf4:double_quant=off"])
def test_nf4_bits_are_only_moved(mode: str) -> None:
    ours = layer_of(mode, (64, 192, 64), 192)
    native.choose("torch")
    try:
        theirs = layer_of(mode, (64, 192, 64), 192)
    finally:
        native.choose("auto")
    assert isinstance(ours, NF4Linear)
    assert isinstance(theirs, NF4Linear)
    assert ours.is_native
    assert not theirs.is_native
    for part in range(3):
        assert torch.equal(ours.dense(part), theirs.dense(part))
    assert torch.equal(nf4_native.pack_codes(nf4_native.unpack_codes(ours.codes), 320), ours.codes)


# --- int8 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    name: str
    make: Callable[[Tensor], Tensor]


def with_outliers(x: Tensor) -> Tensor:
    x[1 % len(x), 5], x[-1, 17], x[0, 19] = 40, -6, 5.97
    return x


ACTIVATIONS = [
    Activations("plain", lambda x: x),
    Activations("outliers", with_outliers),
    Activations("a row of zeros", lambda x: x.index_fill_(0, torch.tensor([0]), 0)),
    Activations("all outliers", lambda x: x + 100),
    Activations("beyond float16", lambda x: x * 1e5),
    Activations("below float16", lambda x: x * 1e-8),
]


@needs_library
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threshold", [0.0, 3.3, 6.0])
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize(("rows", "in_features"), [(1, 20), (7, 64), (53, 196)])
def test_int8_codes_of_x_are_those_of_bitsandbytes(
    rows: int, in_features: int, activations: Activations, threshold: float
) -> None:
    """By batch as they code the whole of it, by row as they code each row alone."""
    x = activations.make(torch.randn(rows, in_features, generator=random_of(rows))).bfloat16()
    for by_row in (False, True):
        codes, scales, outliers = int8_native.quantize(x, threshold, by_row)
        for chosen in [slice(row, row + 1) for row in range(rows)] if by_row else [slice(None)]:
            want_codes, want_scales, columns = bitsandbytes.int8_vectorwise_quant(
                x[chosen].half(), threshold=threshold
            )
            sound = torch.isfinite(want_scales) & (want_scales > 0)  # torch has no code for NaN
            assert torch.equal(scales[chosen], want_scales)
            assert torch.equal(codes[chosen][sound], want_codes[sound])
            want_outliers = torch.zeros_like(outliers[chosen])
            want_outliers[:, [] if columns is None else columns] = True
            assert torch.equal(outliers[chosen], want_outliers)


@needs_library
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("activations", ACTIVATIONS[:4], ids=lambda a: a.name)
@pytest.mark.parametrize("mode", ["int8:outliers=batch", "int8:outliers=batch,threshold=0"])
@pytest.mark.parametrize(("outs", "in_features"), [((64,), 20), ((128, 64, 64), 192), ((64, 192), 1600)])
def test_int8_is_bitsandbytes_within_a_rounding(
    outs: tuple[int, ...], in_features: int, mode: str, activations: Activations
) -> None:
    """Of the same codes: theirs rounds both shares and the outliers' weights, ours the sum alone."""
    ours, theirs = int8_layers(outs, in_features, mode, "int8:kernel=bitsandbytes" + mode[19:])
    assert ours.kernel.startswith("native.avx512.int8_linear")
    assert theirs.kernel.startswith("bitsandbytes")
    for part in range(len(outs)):
        assert torch.equal(ours.dense(part), theirs.dense(part))
    generator = random_of(in_features)
    for rows in ROWS:
        x = activations.make(torch.randn(rows, in_features, generator=generator)).bfloat16()
        got, want = ours(x).double(), theirs(x).double()
        assert (got - want).norm() <= 4e-3 * want.norm(), rows


@needs_library
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", ["int8:outliers=row", "int8:outliers=row,threshold=0"])
@pytest.mark.parametrize(("outs", "in_features"), [((64,), 20), ((128, 64, 64), 192), ((64, 192), 1600)])
def test_int8_by_row_computes_each_row_as_if_it_were_alone(
    outs: tuple[int, ...], in_features: int, mode: str
) -> None:
    """Bit for bit, in C and in torch; and a row alone is what the batch's rule makes of it."""
    by_row, by_batch = int8_layers(outs, in_features, mode, mode.replace("row", "batch"))
    in_torch, _ = int8_layers(outs, in_features, mode, mode, "torch")
    assert in_torch.kernel.startswith("torch.int8_linear")
    x = with_outliers(torch.randn(max(ROWS), in_features, generator=random_of(in_features))).bfloat16()
    x[7], x[8], x[9, 3:7] = 0, 100, torch.tensor([900, 6.3, -41.7, 12.1])
    together, want = by_row(x), in_torch(x)
    for row in range(max(ROWS)):
        assert torch.equal(by_batch(x[row : row + 1])[0], together[row]), row
        assert torch.equal(in_torch(x[row : row + 1])[0], want[row]), row
    for rows in ROWS:
        assert torch.equal(by_row(x[:rows]), together[:rows]), rows
        assert torch.equal(by_row(x[-rows:]), together[-rows:]), rows
    assert ((together.float() - want.float()).abs() <= want.float().abs() * 2**-7 + 1e-2).all()
    assert (together.double() - want.double()).norm() <= 1e-3 * want.double().norm()


def int8_layers(
    outs: tuple[int, ...], in_features: int, mode: str, other: str, cpu_kernels: native.Choice = "auto"
) -> tuple[QuantLinear, QuantLinear]:
    """The same weights in two modes."""
    generator = random_of(*outs, in_features)
    tensors = {
        f"part{n}.weight": torch.randn(out, in_features, generator=generator).bfloat16() * 0.1
        for n, out in enumerate(outs)
    }
    parts = tuple(LinearSpec(f"part{n}", in_features, out) for n, out in enumerate(outs))
    group = LinearGroup("qkv_proj", parts, CPU, torch.bfloat16)
    native.choose(cpu_kernels)
    try:
        return (
            load_backend(mode).build(group, tensors.__getitem__),
            load_backend(other).build(group, tensors.__getitem__),
        )
    finally:
        native.choose("auto")


# --- layouts and edges ---------------------------------------------------------------------------


def test_blocks_by_hand() -> None:
    values = torch.arange(128 * 4).view(128, 4)
    blocks = to_blocks(values, 2)
    assert blocks.shape == (2, 2, 128)
    # block 1, second pair: output 64's features 2 and 3, then output 65's
    assert blocks[1, 1, :4].tolist() == [64 * 4 + 2, 64 * 4 + 3, 65 * 4 + 2, 65 * 4 + 3]
    assert torch.equal(from_blocks(blocks, 2), values)


def test_nibbles_by_hand() -> None:
    """Lane 2 o + f of a pair: outputs o, 16 + o, 32 + o, 48 + o from its lowest nibble on."""
    codes = torch.zeros(64, 4, dtype=torch.uint8)
    codes[3, 2], codes[19, 2], codes[35, 2], codes[51, 2], codes[3, 3] = 1, 2, 3, 4, 5
    packed = to_nibbles(codes, 2)
    assert packed.shape == (1, 2, 64)
    assert packed[0, 0].tolist() == [0] * 64
    assert packed[0, 1, 12:16].tolist() == [0x21, 0x43, 0x05, 0x00]
    assert torch.equal(from_nibbles(packed, 2), codes)
    assert torch.equal(from_nibbles(to_nibbles(codes, 1), 1), codes)


@needs_library
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(63, 64), (96, 64), (64, 33)], ids=["63", "96", "odd"]
)
def test_other_shapes_are_not_packed(out_features: int, in_features: int) -> None:
    weight = torch.randn(out_features, in_features).bfloat16()
    packed = pack_weight(weight)
    assert not linear_kernel(packed).startswith("native")
    assert torch.equal(unpack_weight(packed), weight)


@needs_library
def test_rows_of_a_native_table() -> None:
    weight = torch.randn(192, 66).bfloat16()
    table = pack_table(weight)
    assert table is not None
    ids = torch.tensor([191, 0, 64, 63, 64])
    assert torch.equal(table.rows(ids), weight[ids])
    assert torch.equal(table.rows(ids[::2]), weight[ids[::2]])
    assert table.rows(ids[:0]).shape == (0, 66)
    for beyond in (-1, 192):
        with pytest.raises(IndexError, match="192 rows"):
            table.rows(torch.tensor([3, beyond]))


@needs_library
def test_what_c_would_read_wrongly_is_refused() -> None:
    packed = pack_weight(torch.randn(64, 64).bfloat16())
    for x in (torch.randn(2, 64), torch.randn(2, 32).bfloat16()):
        with pytest.raises(AssertionError):
            dense_linear(x, packed)
    with pytest.raises(AssertionError):
        NativeLinear("halftone_dense_linear", 64, 64, "2P", packed[..., :1], None)


@needs_library
def test_rows_of_any_stride_and_none() -> None:
    weight = torch.randn(64, 64).bfloat16()
    packed = pack_weight(weight)
    wide = torch.randn(9, 128).bfloat16()
    assert torch.equal(dense_linear(wide[:, ::2], packed), dense_linear(wide[:, ::2].contiguous(), packed))
    assert dense_linear(wide[:0, :64], packed).shape == (0, 64)


@needs_library
def test_the_workspace_grows_between_calls() -> None:
    """Sums and codes of x lie in one piece of memory, made larger while layers of all kinds use it."""
    layers = [layer_of(mode, (64,), 64) for mode in ("awq", "int8")]
    x = torch.randn(40_000, 64, generator=random_of(1)).bfloat16()
    small = [layer(x[:9]) for layer in layers]
    large = [layer(x) for layer in layers]
    assert torch.equal(large[0][:9], small[0])
    for rows, more in pairwise((9, 20_000, 40_000)):
        assert torch.equal(layers[0](x[rows:more]), large[0][rows:more])
    assert torch.equal(layers[1](x), large[1])
