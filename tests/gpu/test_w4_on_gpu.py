"""AWQ, NF4 and int3 on an H100 by our own kernels: right for any number of rows, alike each time.

The measure is cuBLAS in float16 on the same weights dequantized, against float64; the weights' meaning comes
from their checkpoints' layouts, not from ours. `pytest -m gpu tests/gpu/test_w4_on_gpu.py`, by hand.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor

from service.engine.self_check import check
from service.kernels import w4_linear
from service.kernels.w4_linear import Shape, Weight, absence, bind
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.linear import LinearSpec
from service.precision.w4 import W4Linear
from tests.gpu.w4_linears import AFFINE, CUDA, DTYPES, LINEARS, linear, load, shape_of
from tests.kernels.w4_weights import KINDS, Awq, Codes, random_awq, random_int3, random_nf4, random_weight

pytestmark = pytest.mark.gpu

ROWS = (1, 7, 8, 9, 16, 17, 33, 64, 65, 128, 257, 1024, 4096)
FEWER_ROWS = (1, 5, 8, 16, 24, 64, 128, 257, 1024)
WORSE_THAN_CUBLAS = 2.0


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if reason := absence():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialized is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check_product(weight: Weight, shape: Shape, dense: Tensor, x: Tensor) -> None:
    multiply = bind(weight, shape)
    with poisoned():
        got, again = multiply(x), multiply(x)
    assert got.shape == (len(x), shape.out_features)
    assert torch.isfinite(got).all()
    assert torch.equal(got, again), "run to run"
    want = x.double() @ dense.double().t()
    of_cublas = error(x @ dense.to(x.dtype).t(), want)
    assert error(got, want) <= WORSE_THAN_CUBLAS * of_cublas


@pytest.mark.parametrize(
    ("dtype", "num_rows"),
    [*product(DTYPES[:1], ROWS), *product(DTYPES[1:], FEWER_ROWS)],
)
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_it_is_as_right_as_cublas(codes: Codes, dtype: torch.dtype, name: str, num_rows: int) -> None:
    weight, shape, dense = linear(codes, name, dtype)
    check_product(weight, shape, dense, torch.randn(num_rows, shape.in_features, device=CUDA).to(dtype))


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_so_it_is_for_shapes_that_nobody_chose(codes: Codes) -> None:
    """250 of them: parts, outputs and input features that fill no tile, any number of rows."""
    draw = random.Random(7)
    for _ in range(250):
        in_features = 128 * draw.choice([1, 2, 3, 5, 7, 8, 11, 24, 37, 60, 112, 224])
        most_blocks = min(896, (1 << 24) // in_features // 32)
        blocks = draw.randint(1, max(1, draw.choice([3, 40, most_blocks])))
        cut = draw.randint(0, 2 * blocks - 1)
        outs = (16 * cut, 32 * blocks - 16 * cut) if cut else (32 * blocks,)
        num_rows = draw.choice([1, 2, 3, 8, 13, 16, 31, 40, 100, 129, 300, 700])
        dtype = draw.choice(DTYPES)
        shape = shape_of(codes, outs, in_features, dtype)
        source = random_weight(codes.kind, outs, in_features, "cuda", codes.group_size)
        x = torch.randn(num_rows, in_features, device=CUDA).to(dtype)
        check_product(source.pack(outs), shape, source.dense(), x)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_an_element_is_right_and_not_only_the_norm(codes: Codes, num_rows: int) -> None:
    """A lost row, column or group would be a hundred times what rounding is."""
    weight, shape, dense = linear(codes, "narrow")
    x = torch.randn(num_rows, shape.in_features, device=CUDA).half()
    want = x.double() @ dense.double().t()
    size = x.double().norm(dim=1)[:, None] * dense.double().norm(dim=1)
    assert ((bind(weight, shape)(x).double() - want).abs() / size).max() < 1e-3


@pytest.mark.parametrize("num_rows", [1, 16, 33, 257])
@pytest.mark.parametrize("scale", [0.0, 6e-8, 5e-6, 65504.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awq_s_scales_may_be_extreme(dtype: torch.dtype, scale: float, num_rows: int) -> None:
    """One output in two, beside ordinary ones: zero, the least subnormal, another one, the greatest."""
    outs, in_features = (512,), 1024
    source = random_awq(outs, in_features, "cuda")
    source.scales[:, ::2] = scale
    if scale > 1:  # codes that are one beside their zero, so that weights are float16 at all
        source.qzeros[:] = 0x77777777
        source.qweight[:] = source.qweight & 0x11111111 | 0x66666666
    x = (torch.randn(num_rows, in_features, device=CUDA) * (1e-4 if scale > 1 else 1)).to(dtype)
    y = bind(source.pack(outs), shape_of(AFFINE, outs, in_features, dtype))(x)
    dense = source.dense()
    want, cublas = x.double() @ dense.double().t(), x @ dense.to(dtype).t()
    for columns in (slice(0, None, 2), slice(1, None, 2)):
        assert torch.isfinite(y[:, columns]).all()
        bound = (cublas[:, columns].double() - want[:, columns]).norm()
        # and an ulp of a subnormal y: sums of other order may round another way
        room = 6e-8 * y[:, columns].numel() ** 0.5
        assert (y[:, columns].double() - want[:, columns]).norm() <= WORSE_THAN_CUBLAS * bound + room


@pytest.mark.parametrize("num_rows", [1, 16, 33, 257])
@pytest.mark.parametrize("absmax", [0.0, 3e-6, 60000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_s_absmax_may_be_extreme(dtype: torch.dtype, absmax: float, num_rows: int) -> None:
    outs, in_features = (256, 256), 1024
    source = random_nf4(outs, in_features, "cuda")
    source.nested.map.fill_(1)
    source.nested.absmax.fill_(absmax)
    source.nested.offsets.fill_(0)
    x = (torch.randn(num_rows, in_features, device=CUDA) * (1e-4 if absmax > 1 else 1)).to(dtype)
    y = bind(source.pack(outs), shape_of(Codes("nf4", 64), outs, in_features, dtype))(x)
    dense = source.dense()
    want, cublas = x.double() @ dense.double().t(), x @ dense.to(dtype).t()
    assert torch.isfinite(y).all()
    room = 6e-8 * y.numel() ** 0.5
    assert (y.double() - want).norm() <= WORSE_THAN_CUBLAS * (cublas.double() - want).norm() + room


@pytest.mark.parametrize("num_rows", [1, 16, 33, 257])
def test_every_zero_point_is_subtracted(num_rows: int) -> None:
    """All sixteen, in every place of a word, against all sixteen codes; of codes like their zero y is 0."""
    outs, in_features = (256,), 512
    source = random_awq(outs, in_features, "cuda")
    zero = torch.arange(32, device=CUDA).remainder(16)  # of each word of eight outputs
    word = (zero[None] * 0x11111111).to(torch.int64)
    word = torch.where(word >= 1 << 31, word - (1 << 32), word).int()
    source.qzeros[:] = word
    source.qweight[:] = word
    multiply = bind(source.pack(outs), shape_of(AFFINE, outs, in_features))
    x = torch.randn(num_rows, in_features, device=CUDA).half()
    assert (multiply(x) == 0).all()
    for code in range(16):
        value = code * 0x11111111
        source.qweight[:] = value - (1 << 32) if value >= 1 << 31 else value
        check_product(source.pack(outs), shape_of(AFFINE, outs, in_features), source.dense(), x)


@pytest.mark.parametrize("num_rows", [1, 16, 33, 257])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_is_every_zero_of_three_bits(dtype: torch.dtype, group_size: int, num_rows: int) -> None:
    """All eight, against all eight codes; beside scales of 0, the least and the greatest."""
    outs, in_features = (256,), 512
    source = random_int3(outs, in_features, "cuda", group_size)
    source.zeros[:] = torch.arange(256, device=CUDA).remainder(8)[:, None]
    source.codes[:] = source.zeros.repeat_interleave(group_size, dim=1)
    source.scales[:3, 0] = torch.tensor([0.0, 6e-8, 65504.0], device=CUDA)
    shape = shape_of(Codes("int3", group_size), outs, in_features, dtype)
    x = torch.randn(num_rows, in_features, device=CUDA).to(dtype)
    assert (bind(source.pack(outs), shape)(x) == 0).all()
    source.scales[2, 0] = 100.0
    for code in range(8):
        source.codes[:] = code
        check_product(source.pack(outs), shape, source.dense(), x)


@pytest.mark.parametrize("num_rows", [1, 16, 24, 64, 257])
@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_it_can_be_captured(codes: Codes, num_rows: int) -> None:
    """A graph computes with what its x holds when it is replayed, and y is the eager one bit for bit."""
    weight, shape, _ = linear(codes, "qkv")
    multiply = bind(weight, shape)
    x = torch.randn(num_rows, shape.in_features, device=CUDA).half()
    multiply(x)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiply(multiply(x)[:, : shape.in_features].contiguous())
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        again = multiply(multiply(x)[:, : shape.in_features].contiguous())
        assert torch.equal(captured, again)


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_launches_that_follow_each_other(codes: Codes) -> None:
    """Each placed while the one before it works, of both kernels and several grids, as in a model's step: a
    thousand times, and as a graph that is replayed."""
    names = ("narrow", "uneven", "few in", "small", "o")
    layers = [linear(codes, name)[:2] for name in names]
    products = [bind(weight, shape) for weight, shape in layers]

    def all_of(num_rows: int) -> list[Tensor]:
        told = []
        for multiply, (_, shape) in zip(products, layers, strict=True):
            x = inputs[:num_rows, : shape.in_features] * 1.0
            told.append(multiply(multiply(x).repeat(1, 33)[:, : shape.in_features] * 0.01))
        return told

    inputs = torch.randn(257, 4096, device=CUDA).half()
    for num_rows in (1, 8, 16, 24, 64, 257):
        want = all_of(num_rows)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = all_of(num_rows)
        for _ in range(20):
            for y in captured:
                y.fill_(float("nan"))
            graph.replay()
            for y, again, expected in zip(captured, all_of(num_rows), want, strict=True):
                assert torch.equal(y, expected)
                assert torch.equal(again, expected)


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_rows_of_another_tensor_s_middle(codes: Codes) -> None:
    """x that begins anywhere, and rows that lie apart."""
    weight, shape, _ = linear(codes, "few in")
    multiply = bind(weight, shape)
    wide = torch.randn(50, shape.in_features + 3, device=CUDA).half()
    for x in (wide[:, 1:-2], wide[5:25, 3:]):
        assert torch.equal(multiply(x), multiply(x.clone()))
    flat = wide.flatten()[1 : 1 + 7 * shape.in_features].view(7, -1)
    assert torch.equal(multiply(flat), multiply(flat.clone()))
    assert multiply(flat[:0]).shape == (0, shape.out_features)


def group(dtype: torch.dtype, *, deterministic: bool = False) -> LinearGroup:
    parts = tuple(LinearSpec(f"part{i}", 1024, out, bias=True) for i, out in enumerate((512, 128, 128)))
    return LinearGroup("qkv_proj", parts, CUDA, dtype, deterministic)


def tensors(source: Awq | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    start = 0
    for part in group(torch.float16).parts:
        end = start + part.out_features
        found[f"{part.path}.bias"] = torch.randn(part.out_features).half()
        if source:
            found[f"{part.path}.qweight"] = source.qweight[:, start // 8 : end // 8].cpu()
            found[f"{part.path}.qzeros"] = source.qzeros[:, start // 8 : end // 8].cpu()
            found[f"{part.path}.scales"] = source.scales[:, start:end].cpu()
        else:
            found[f"{part.path}.weight"] = torch.randn(part.out_features, 1024).half() * 0.02
        start = end
    return found


@pytest.mark.parametrize("precision", ["awq", "nf4", "int3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_precision_s_layer_is_served(dtype: torch.dtype, precision: str) -> None:
    """With biases; its bits mean what the backend's own layer means."""
    load(next(codes for codes in KINDS if codes.kind == {"awq": "affine"}.get(precision, precision)))
    read = tensors(random_awq((512, 128, 128), 1024, "cuda") if precision == "awq" else None)
    layer = load_backend(precision).build(group(dtype), read.__getitem__)
    assert isinstance(layer, W4Linear)
    assert layer.kernel == "cuda.w4_few up to 8 rows, cuda.w4_tile"
    check(layer, 0.002 if dtype == torch.float16 else 0.012)
    bits = 8 * sum(size for part, size in layer.bytes().items() if part != "linear16") / (768 * 1024)
    assert bits <= 1.01 * {"awq": 4.156, "nf4": 4.127, "int3": 3.313}[precision]
    if precision == "nf4":
        for number, part in enumerate(layer.group.parts):
            source = read[f"{part.path}.weight"].cuda()
            codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(source, 64, "nf4", torch.uint8)
            want = torch.ops.bitsandbytes.dequantize_4bit.default(
                codes, absmax, 64, "nf4", source.shape, torch.float32
            )
            assert error(layer.dense(number), want.double().cpu()) < 0.01  # absmax are 8-bit codes
    if precision == "int3":
        for number, part in enumerate(layer.group.parts):
            assert error(layer.dense(number), read[f"{part.path}.weight"].double()) < 0.25


@pytest.mark.parametrize(
    ("precision", "dtype", "deterministic", "kernel"),
    [
        ("awq", torch.float16, True, "triton.awq_linear"),
        ("awq", torch.bfloat16, True, "triton.awq_linear"),
        ("nf4", torch.float16, True, "bitsandbytes.gemm_4bit"),
        ("nf4:double_quant=off", torch.float16, False, "bitsandbytes.gemm_4bit"),
    ],
)
def test_what_the_table_refuses_keeps_its_kernel(
    precision: str, dtype: torch.dtype, deterministic: bool, kernel: str
) -> None:
    source = random_awq((512, 128, 128), 1024, "cuda") if precision == "awq" else None
    layer = load_backend(precision).build(
        group(dtype, deterministic=deterministic), tensors(source).__getitem__
    )
    assert layer.kernel == kernel
    assert layer.row_invariant == (deterministic and precision == "awq")


def test_random_weights_are_what_they_are_said_to_be() -> None:
    for codes in KINDS:
        source = random_weight(codes.kind, (256,), 512, "cuda", codes.group_size)
        weight = source.pack((256,))
        torch.testing.assert_close(w4_linear.dequantize(weight), source.dense(), rtol=1e-6, atol=0)
