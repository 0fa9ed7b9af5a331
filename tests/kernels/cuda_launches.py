"""Every kernel of ours in CUDA C++, in every variant that a table has, over small ragged shapes.

tests/benchmarks/sanitize.py --device--> CASES --> kernels/*/cuda. As `triton_launches.py`, whose rules hold.
Every variant is launched in one of the two 16-bit types and every kernel in both: conversions are all that
the type decides.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from service.kernels import decode_attention as decodes_of
from service.kernels import gated_linear, w4_linear, w8_linear
from service.kernels.cuda import Kernel
from service.kernels.decode_attention import cuda as decode_cuda
from service.kernels.decode_attention.table import HEAD_DIMS, TABLE, variant_of
from service.kernels.dense_linear import cuda as dense_cuda
from service.kernels.dense_linear import few_rows
from service.kernels.gated_linear import cuda as gated_cuda
from service.kernels.int8_linear import triton as int8
from service.kernels.int8_rows import ALL_LIVE
from service.kernels.w4_linear import cuda as w4_cuda
from service.kernels.w4_linear.plan import GROUPS as W4_GROUPS
from service.kernels.w4_linear.plan import TABLES, few_of, tile_of
from service.kernels.w4_linear.variants import Few
from service.kernels.w4_linear.variants import Variant as W4Variant
from service.kernels.w8_linear import cuda as w8_cuda
from service.kernels.w8_linear.plan import AFTER_ROWS, DEEP, WIDE
from service.kernels.w8_linear.plan import TABLES as W8_TABLES
from tests.kernels.decodes import EPS, decodes
from tests.kernels.given import Given
from tests.kernels.triton_launches import rule_of
from tests.kernels.w4_weights import KINDS, random_weight

DTYPES = (torch.float16, torch.bfloat16)
THRESHOLD = 3.0
W4_OUTS, W4_INPUTS = (48, 16, 224), 640  # parts that fill no tile of any variant
DENSE_OUTS, DENSE_INPUTS = 136, 320
# (out, in): narrow and shallow, deep, wide: what a row of the table tells apart
W8_SHAPES = ((144, 1056), (144, DEEP + 32), (WIDE + 16, 160))
GATED_OUTS, GATED_INPUTS = 264, 456
LENGTHS = [640, 1, 16, 17, 0]  # of decoding sequences; 0 is padding
GROUPS = (4, 7, 1, 16)  # query heads of a KV head


def w4_variants() -> Iterator[tuple[W4Variant, w4_linear.Shape, int]]:
    """With a shape, and a number of rows whose last tile is not full; a kind's groups in turn."""
    dtypes = cycle(DTYPES)
    for kind, table in TABLES.items():
        groups = cycle(W4_GROUPS[kind])
        for few in dict.fromkeys((*table.few, *table.few_of_wide)):
            shape = w4_linear.Shape(kind, W4_OUTS, W4_INPUTS, next(groups), next(dtypes))
            variant = few_of(shape, few)
            yield variant, shape, max(1, min(few.most_rows, variant.max_rows(W4_INPUTS)) - 1)
        for tile in dict.fromkeys(tile for _, tiles in table.tiles for tile in tiles):
            shape = w4_linear.Shape(kind, W4_OUTS, W4_INPUTS, next(groups), next(dtypes))
            yield tile_of(shape, tile), shape, tile.tile + tile.tile // 2 + 1


def w4_few(given: Given) -> None:
    w4(given, few=True)


def w4_tile(given: Given) -> None:
    w4(given, few=False)


def w4(given: Given, *, few: bool) -> None:
    torch.manual_seed(0)
    device = str(given.device)
    weights = {
        told: random_weight(told[0], W4_OUTS, W4_INPUTS, device, told[1]).pack(W4_OUTS) for told in KINDS
    }
    for variant, shape, num_rows in w4_variants():
        if isinstance(variant, Few) is few:
            weight = weights[shape.kind, shape.group_size]
            multiply = w4_cuda.Bound(weight, (w4_linear.Row(None, variant),), shape.dtype)
            multiply(given.normal(num_rows, W4_INPUTS, dtype=shape.dtype))


def w8_shapes() -> Iterator[w8_linear.Shape]:
    for number, shape in enumerate(W8_SHAPES):
        yield w8_linear.Shape("int8", *shape, DTYPES[number % 2], threshold=THRESHOLD)
        for dtype in DTYPES:
            of_fp8 = w8_linear.Shape("fp8", *shape, dtype)
            if not w8_linear.refusal(of_fp8):  # its table leaves shapes to another kernel
                yield of_fp8


def w8_tile(given: Given) -> None:
    for number, shape in enumerate(w8_shapes()):
        steps = given.scales(shape.out_features)
        if shape.codes == "int8":
            int8_tile(given, shape, steps, number)
        else:
            fp8_tile(given, shape, steps)


def int8_tile(given: Given, shape: w8_linear.Shape, steps: Tensor, number: int) -> None:
    """With outliers in many columns, and without any."""
    codes = given.integers(-127, 128, shape.out_features, shape.in_features, dtype=torch.int8)
    for by_row in (True, False):
        rule = rule_of(given, THRESHOLD, by_row=by_row)
        bound = w8_cuda.BoundInt8(w8_cuda.Weight(codes, steps), None, rule, shape, number)
        tiles = w8_linear.Tiles(bound.marks, bound)
        most_rows = [most or 300 for most, _ in W8_TABLES["int8"]]
        for num_rows in (AFTER_ROWS + 1, *(most - 5 for most in most_rows[1:])):
            x = given.normal(num_rows, shape.in_features, dtype=shape.dtype)
            for times in (1, 0.1):
                int8.int8_linear(x * times, codes, steps, None, rule, ALL_LIVE, tiles)


def fp8_tile(given: Given, shape: w8_linear.Shape, steps: Tensor) -> None:
    def codes(rows: int) -> Tensor:
        return given.normal(rows, shape.in_features, dtype=torch.float32).to(torch.float8_e4m3fn)

    multiply = w8_cuda.BoundFP8(w8_cuda.Weight(codes(shape.out_features), steps), shape)
    for row in multiply.rows:
        for num_rows in (row.after + 1, row.variant.tile - 5):
            multiply(codes(num_rows), given.scales(num_rows))


def dense_rows() -> Iterator[few_rows.Row]:
    for entry in few_rows.TABLE:
        for bf16 in range(len(DTYPES)):
            yield few_rows.Row(entry.max_rows, replace(entry.variant, bf16=bf16))


def dense_stream(given: Given) -> None:
    for row in dense_rows():
        dtype = DTYPES[row.variant.bf16]
        weight = given.normal(DENSE_OUTS, DENSE_INPUTS, dtype=dtype)
        for bias, num_rows in ((None, 1), (given.normal(DENSE_OUTS, dtype=dtype), row.max_rows - 1)):
            multiply = dense_cuda.Bound(weight, bias, (row,))
            multiply(given.normal(num_rows, DENSE_INPUTS, dtype=dtype))


def gated_tile(given: Given) -> None:
    """Tiles that are not full at either end, and one of which nearly nothing is there."""
    for bf16, dtype in enumerate(DTYPES):
        weight = given.normal(2 * GATED_OUTS, GATED_INPUTS, dtype=dtype)
        multiply = gated_cuda.Bound(weight, gated_linear.Variant(bf16))
        for num_rows in (1, 200, 333):
            multiply(given.normal(num_rows, GATED_INPUTS, dtype=dtype))


def decode_variants() -> Iterator[tuple[decodes_of.Variant, decodes_of.Shape]]:
    """All settings with most sizes of heads; with norms, caps, and without; over numbers and over codes."""
    caches = cycle((None, torch.int8, torch.float8_e4m3fn, None, torch.int8, None, torch.float8_e4m3fn))
    settings = [settings for _, settings in TABLE]
    dims = cycle(HEAD_DIMS)
    pairs = [(each, next(dims)) for each in settings for _ in range(4)]
    groups, dtypes, flags = (
        cycle(GROUPS),
        cycle(DTYPES),
        cycle(((False, False), (True, False), (False, True))),
    )
    for each, dim in pairs:
        dtype, (normed, capped), kv_heads = next(dtypes), next(flags), 2
        cached = next(caches) or dtype
        shape = decodes_of.Shape(dim, next(groups) * kv_heads, kv_heads, dtype, cached, normed, capped)
        yield variant_of(shape, each), shape


def decode_attention(given: Given) -> None:
    torch.manual_seed(0)
    for number, (variant, shape) in enumerate(decode_variants()):
        made = decodes(
            shape, LENGTHS, window=40 * (number % 2), softcap=5.0 * shape.is_capped,
            rotates=number > 0, device=given.device,
        )  # fmt: skip
        rest = made.keys, made.values, made.step, made.scale, made.window, made.softcap, made.scales
        norms = made.q_norm, made.k_norm
        decode_cuda.decode_attention(variant, made.qkv, made.cos, made.sin, *norms, EPS, *rest)


def loads() -> list[Callable[[], Kernel]]:
    """What compiles and loads each variant that the cases launch."""
    return [
        *(lambda each=each: w4_cuda.load(each) for each in dict.fromkeys(each for each, *_ in w4_variants())),
        *(
            lambda each=each: w8_cuda.load(each)
            for each in dict.fromkeys(row.variant for shape in w8_shapes() for row in w8_linear.plan(shape))
        ),
        *(lambda row=row: dense_cuda.load(row.variant) for row in dense_rows()),
        *(lambda bf16=bf16: gated_cuda.load(gated_linear.Variant(bf16)) for bf16 in range(len(DTYPES))),
        *(lambda each=each: decode_cuda.load(each) for each, _ in decode_variants()),
    ]


CASES: tuple[Callable[[Given], None], ...] = (
    w4_few,
    w4_tile,
    w8_tile,
    dense_stream,
    gated_tile,
    decode_attention,
)
