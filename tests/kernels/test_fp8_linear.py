"""E4M3 linears: the reference by hand, and our C code against it, code by code and row by row."""

from collections.abc import Iterator

import pytest
import torch

from service.errors import PrecisionError
from service.kernels import native
from service.kernels.fp8_linear import fp8_linear, quantize_rows
from service.kernels.fp8_linear import native as fp8_native
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.fp8 import check_on_cuda
from service.precision.linear import LinearSpec

needs_library = pytest.mark.skipif(native.load() is None, reason=native.absence())
CPU = torch.device("cpu")
ROWS = (1, 2, 5, 6, 7, 12, 13, 48, 49, 97)  # around six at once and 48 in a tile
NAN_CODES = (0x7F, 0xFF)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    native.set_threads(request.param)
    yield request.param
    native.set_threads(torch.get_num_threads())


def test_rows_by_hand() -> None:
    """Ties go to the even mantissa; below 2^-6 of the scale's unit steps are 2^-9."""
    x = torch.tensor([[448.0, 17.0, 19.0, -0.003, 2.0**-10], [0.0] * 5, [8.96, -4.48, 0.0, 0.0, 0.0]])
    codes, scales = quantize_rows(x)
    torch.testing.assert_close(scales, torch.tensor([1.0, 1.0, 0.02]))
    assert codes[0].float().tolist() == [448, 16, 20, -0.00390625, 0]
    assert not codes[1].float().any()
    assert codes[2].float().tolist() == [448, -224, 0, 0, 0]


def test_the_reference_by_hand() -> None:
    codes = torch.tensor([[1.0, 2.0], [-4.0, 0.5]]).to(torch.float8_e4m3fn)
    x = torch.tensor([[448.0, 224.0], [0.0, 0.0]])
    y = fp8_linear(x, codes, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]))
    assert y.tolist() == [[449.0, -3361.0], [1.0, -1.0]]


@needs_library
def test_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 2)
    codes[:, 1] = 0
    weight = codes.view(torch.float8_e4m3fn)
    x = torch.tensor([[448.0, 0.0]]).bfloat16()  # its own code: scale 1
    y = fp8_native.linear(fp8_native.pack(weight), torch.full((256,), 2.0**-8), None)(x)[0]
    want = weight[:, 0].float() * 448 / 256
    sound = torch.tensor([code not in NAN_CODES for code in range(256)])
    assert torch.equal(y[sound].float(), want[sound])


@needs_library
def test_every_number_of_x_is_rounded_as_torch_does() -> None:
    """All bf16 numbers up to 448 in magnitude, in rows of scale 1, through the identity."""
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() <= 448]
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 63)).view(-1, 63)
    x = torch.cat((torch.full((len(numbers), 1), 448.0).bfloat16(), numbers), 1)
    identity = torch.eye(64).to(torch.float8_e4m3fn)
    y = fp8_native.linear(fp8_native.pack(identity), torch.ones(64), None)(x)
    assert torch.equal(y.float(), x.float().to(torch.float8_e4m3fn).float())


@needs_library
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 2), (128, 34), (192, 1600), (320, 576)])
def test_rows_are_the_references_whoever_is_beside_them(
    out_features: int, in_features: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(in_features)
    spread = torch.exp2(torch.randint(-12, 5, (out_features, in_features), generator=generator).float())
    weight, scales = quantize_rows(torch.randn(spread.shape, generator=generator) * spread)
    offset = torch.randn(out_features, generator=generator).bfloat16() if bias else None
    linear = fp8_native.linear(fp8_native.pack(weight), scales, offset)
    x = torch.randn(max(ROWS), in_features, generator=generator) * spread[:1]
    x = x.bfloat16()
    together = linear(x)
    want = fp8_linear(x.float(), weight, scales, offset)
    # y is rounded once: half of 2^-8 at most, 0.0017 in root mean square
    assert (together.float() - want).norm() < 1.8e-3 * want.norm()
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), together[:rows]), rows
        assert torch.equal(linear(x[-rows:]), together[-rows:]), rows


@needs_library
@pytest.mark.parametrize(
    "broken", [0x7FC0, 0x7FFF, 0xFFFF, 0x7F80], ids=["nan", "all bits", "negative", "inf"]
)
def test_a_broken_row_is_nan_and_no_other(broken: int) -> None:
    weight, scales = quantize_rows(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[1, 7] = torch.tensor(broken, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    y = fp8_native.linear(fp8_native.pack(weight), scales, None)(x)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert y.isfinite().all(1).tolist() == [True, False, True]
    assert fp8_linear(x, weight, scales, None).isnan().any(1).tolist() == [False, True, False]


@needs_library
def test_packed_codes_are_only_moved() -> None:
    codes = torch.randint(0, 256, (128, 6), dtype=torch.uint8)
    packed = fp8_native.pack(codes.view(torch.float8_e4m3fn))
    assert packed.shape == (2, 3, 128)
    assert packed[1, 2, :4].tolist() == [*codes[64, 4:].tolist(), *codes[65, 4:].tolist()]
    assert torch.equal(fp8_native.unpack(packed).view(torch.uint8), codes)


def group(dtype: torch.dtype = torch.bfloat16, in_features: int = 64, out: int = 32) -> LinearGroup:
    return LinearGroup("o_proj", (LinearSpec("part", in_features, out),), CPU, dtype)


@pytest.mark.parametrize(
    ("asked", "capability", "named"),
    [
        (group(), (8, 0), "8.0"),
        (group(torch.float16), (9, 0), "float16"),
        (group(in_features=72), (9, 0), "`o_proj` has 72"),
        (group(out=24), (9, 0), "64 and 24"),
    ],
)
def test_what_no_gpu_kernel_computes_is_refused(
    asked: LinearGroup, capability: tuple[int, int], named: str
) -> None:
    with pytest.raises(PrecisionError, match=named) as error:
        check_on_cuda(asked, capability)
    assert error.value.hint
    check_on_cuda(group(), (8, 9))


def test_weights_that_are_broken_do_not_pass_as_numbers() -> None:
    weight = torch.randn(64, 64).bfloat16()
    weight[5, 6] = float("nan")
    layer = load_backend("fp8").build(group(out=64), lambda _: weight)
    y = layer(torch.ones(1, 64).bfloat16())
    assert y.isnan().sum() == 1
    assert y[0, 5].isnan()
