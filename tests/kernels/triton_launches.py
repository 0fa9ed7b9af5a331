"""Every Triton kernel of ours, over small ragged shapes that take all its ways: partial tiles, splits.

tests/benchmarks/sanitize.py --device--> CASES --> kernels/*/triton. Nobody looks at results: other tests do.
`test_every_kernel_is_launched.py` fails when there is a kernel that nothing here launches.
"""

from collections.abc import Callable
from itertools import product

import torch

from service.kernels.add_rms_norm.triton import add_rms_norm as norm
from service.kernels.awq_linear.triton import awq_linear as awq
from service.kernels.coded_attention import triton as coded
from service.kernels.dense_linear.triton import TILE_IN, TILE_OUT
from service.kernels.dense_linear.triton import stream_linear as stream
from service.kernels.fixed_linear import triton as fixed
from service.kernels.fp8_linear import triton as fp8
from service.kernels.gated_silu.triton import gated_silu as gate
from service.kernels.greedy.triton import CHUNK
from service.kernels.greedy.triton import greedy as likeliest
from service.kernels.int3_linear.triton import int3_linear as int3
from service.kernels.int3_round.triton import round_groups as int3_groups
from service.kernels.int8_linear import triton as int8
from service.kernels.int8_rows import ALL_LIVE, Live, Marks, OutlierRule
from service.kernels.int8_rows.triton import MOST_NUMBERS, quantize_gated, quantize_normed, quantize_rows
from service.kernels.paged_attention.triton import paged_attention as paged
from service.kernels.read_only.triton import reader
from service.kernels.rotary_kv.triton import rotary_kv as rotary
from service.kernels.row_state.triton import WIDTH, read_rows, write_rows
from service.kernels.sample.triton import sample as draw
from service.kernels.sample_likely.triton import sample_likely as draw_likely
from service.kernels.shape_logits.triton import count_tokens
from service.kernels.shape_logits.triton import shape_logits as shape
from service.kernels.w8_linear.variants import MAX_INPUTS
from tests.kernels.given import Given

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-5
PAGE = 16
CODES = (torch.int8, torch.float8_e4m3fn)
# heads, KV heads, head_dim, dtype, window, softcap
ATTENTION = [
    (8, 2, 128, HALF, 0, 0.0),
    (9, 3, 64, BRAIN, 40, 0.0),
    (4, 4, 80, HALF, 0, 5.0),
    (4, 2, 256, BRAIN, 33, 50.0),
    (3, 1, 96, FLOAT, 0, 0.0),
]
LENGTHS = [5, 700, 1, 40, 300, 16]  # of sequences; the first three decode
CHUNKS = [1, 1, 1, 40, 130, 2]
LONG = [2100, 2080]  # behind so much, larger tiles
# temperature, top-k, top-p, min-p
FILTERS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.3, 20, 0.95, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 5000, 0.8, 0.001),
]
VOCAB = 2 * CHUNK + 809
# of LLM.int8()'s outliers: by row or batch, threshold, type of activations
RULES = [(True, 3.0, HALF), (False, 3.0, BRAIN), (True, 0.0, BRAIN)]


def add_rms_norm(given: Given) -> None:
    for width, dtype in product((576, 4100), (HALF, BRAIN, FLOAT)):
        hidden, delta = given.normal(7, width, dtype=dtype), given.normal(7, width, dtype=dtype)
        for added in (delta, None):
            norm(hidden, added, given.normal(width, dtype=dtype), EPS)


def gated_silu(given: Given) -> None:
    for width, dtype in product((40, 1100), (HALF, BRAIN)):
        gate(given.normal(3, 2 * width, dtype=dtype))


def greedy(given: Given) -> None:
    for vocab, dtype in product((7, VOCAB), (FLOAT, HALF)):
        likeliest(given.normal(3, vocab, dtype=dtype))


def sample(given: Given) -> None:
    """Some rows greedy, one broken; columns of a matrix, as a step has them."""
    for vocab in (7, VOCAB):
        logits = given.normal(9, vocab, dtype=FLOAT)
        logits[3, 5] = torch.nan
        temperature = given.told([[row % 3 * 0.5] * 2 for row in range(9)], FLOAT)[:, 1]
        keys = given.integers(0, 1 << 20, 9, 3, dtype=torch.int64).unbind(1)
        draw(logits, temperature, *keys)


def sample_likely(given: Given) -> None:
    for vocab, kind in product((7, VOCAB), ("random", "alike", "broken")):
        logits = given.normal(len(FILTERS), vocab, dtype=FLOAT)
        if kind == "alike":
            logits.zero_()
        elif kind == "broken":
            logits[2, vocab - 1], logits[3, 0] = torch.nan, torch.inf
        temperature, top_k, top_p, min_p = zip(*FILTERS, strict=True)
        keys = given.integers(0, 1 << 20, len(FILTERS), 3, dtype=torch.int64).unbind(1)
        tokens = given.told([list(top_k)] * 2, torch.int32).t()[:, 1]
        fractions = given.told([top_p, min_p], torch.float64).t().unbind(1)
        draw_likely(logits, given.told(list(temperature), FLOAT), *keys, tokens, *fractions)


def shape_logits(given: Given) -> None:
    """Rows that ask and rows that do not, in any order; unused places, and ids that were not drawn."""
    factors = given.told([[1.2, 0.5, -0.5, 1.0], [1.0, 0.0, 0.0, 0.0], [0.7, 0.0, 0.0, 1.0]], FLOAT)
    rows = given.told([2, 0, 1, 1], torch.int32)
    for vocab, places in ((50, 1), (CHUNK + 77, 300)):
        occurrences = given.integers(0, 5, 3, vocab + 3)
        bias_ids = torch.arange(vocab)[-places:].repeat(3, 1).to(given.device)  # each id of a row once
        logits, biases = given.normal(4, vocab, dtype=FLOAT), given.normal(3, places, dtype=FLOAT)
        shape(logits, rows, occurrences, factors, bias_ids, biases)
        count_tokens(occurrences, rows, factors, given.told([vocab - 1, 0, 3, -1], torch.int64))


def row_state(given: Given) -> None:
    """A table that is longer than what is copied at a time, and padding."""
    for max_blocks in (3, WIDTH + 44):
        fields = given.integers(0, 3 * PAGE, 5, 12)
        fields[4] = 0
        rows = given.told([2, 0, 4, 4], torch.int32)
        read_rows(fields, given.integers(0, 9, 5, max_blocks), rows, PAGE)
        write_rows(fields, rows, given.told([7, -1, 3, 0], torch.int64), 4)


def rotary_kv(given: Given) -> None:
    """The last row of the tables, the last slot of the last page."""
    for (heads, kv_heads, dim, dtype, *_), codes in product(ATTENTION, (None, *CODES)):
        tokens, positions, pages = 5, 50, 3
        qkv = given.normal(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
        cos, sin = given.normal(positions, dim, dtype=FLOAT), given.normal(positions, dim, dtype=FLOAT)
        norms = given.normal(dim, dtype=dtype), given.normal(dim, dtype=dtype)
        at = given.told([0, positions - 1, 3, 4, 5], torch.int64)
        slots = given.told([pages * PAGE - 1, 0, 17, 16, 15], torch.int64)
        caches = [torch.zeros(pages, kv_heads, PAGE, dim, dtype=codes or dtype).to(given.device)] * 2
        if codes is not None:
            caches.append(torch.zeros(pages, kv_heads, PAGE, 2, dtype=BRAIN).to(given.device))
        rotary(qkv, cos, sin, at, slots, *norms, EPS, *caches)
        rotary(qkv, None, None, at, slots, None, None, EPS, *caches)


def paged_attention(given: Given) -> None:
    for heads, kv_heads, dim, dtype, window, softcap in ATTENTION:
        rest = dim**-0.5, window, softcap
        for lengths in ([300, 0, 33], [1] * 300):  # with splits, without
            cache = given.pages(lengths, kv_heads, dim, dtype)
            q = given.normal(len(lengths), heads, dim, dtype=dtype)
            for deterministic in (False, True):
                paged(q, *cache.caches, cache.decode(deterministic=deterministic), *rest)
        for lengths, chunks, num_decode in ((LENGTHS, CHUNKS, 3), (LONG, [40, 1], 0)):
            cache = given.pages(lengths, kv_heads, dim, dtype)
            q = given.normal(sum(chunks), heads, dim, dtype=dtype)
            for deterministic in (False, True):
                plan = cache.plan(chunks, num_decode, deterministic=deterministic)
                paged(q, *cache.caches, plan, *rest)


def coded_attention(given: Given) -> None:
    """Codes copied, and read in place, as deterministic plans do."""
    for (heads, kv_heads, dim, dtype, window, softcap), codes in product(ATTENTION, CODES):
        rest = dim**-0.5, window, softcap
        cache = given.pages(LENGTHS, kv_heads, dim, dtype, codes)
        q = given.normal(len(LENGTHS), heads, dim, dtype=dtype)
        chunked = given.normal(sum(CHUNKS), heads, dim, dtype=dtype)
        for deterministic in (False, True):
            coded.coded_attention(q, *cache.caches, cache.decode(deterministic=deterministic), *rest)
            coded.coded_attention(
                chunked, *cache.caches, cache.plan(CHUNKS, 3, deterministic=deterministic), *rest
            )


def dense_linear(given: Given) -> None:
    for num_rows, splits, dtype in product((1, 16, 33), (1, 2), (HALF, BRAIN)):
        weight = given.normal(2 * TILE_OUT, 2 * TILE_IN, dtype=dtype)
        x = given.normal(num_rows, 2 * TILE_IN, dtype=dtype)
        for bias in (None, given.normal(2 * TILE_OUT, dtype=dtype)):
            stream(x, weight, bias, splits)


def fixed_linear(given: Given) -> None:
    """Edges that fill no tile and such that do, shares apart and in one program."""
    for (outs, width), num_rows in product(((130, 100), (64, 256), (256, 512)), (1, 70)):
        for dtype, tiles in ((HALF, fixed.FEW), (BRAIN, fixed.MANY), (FLOAT, None)):
            x, weight = given.normal(num_rows, width, dtype=dtype), given.normal(outs, width, dtype=dtype)
            fixed.fixed_linear(x, weight, given.normal(outs, dtype=dtype), tiles=tiles)
            fixed.fixed_linear(x, weight, tiles=tiles)


def awq_linear(given: Given) -> None:
    for (width, outs, group), num_rows in product(
        ((384, 136, 128), (192, 8, 64), (96, 264, 32)), (1, 17, 70)
    ):
        words = given.words(width, outs // 8), given.words(width // group, outs // 8)
        scales = given.scales(width // group, outs, dtype=HALF)
        for dtype, deterministic in ((HALF, False), (BRAIN, True)):
            awq(given.normal(num_rows, width, dtype=dtype), *words, scales, deterministic=deterministic)


def int3_linear(given: Given) -> None:
    for (width, outs, group), num_rows in product(((384, 96, 128), (192, 32, 64)), (1, 17, 70)):
        zeros = given.integers(0, 256, width // group, outs // 2, dtype=torch.uint8)
        words = given.words(width // 32, 3, outs), zeros
        scales = given.scales(width // group, outs, dtype=HALF)
        for dtype in (HALF, BRAIN):
            int3(given.normal(num_rows, width, dtype=dtype), *words, scales)


def int3_round(given: Given) -> None:
    for group, dtype in product((64, 128), (HALF, BRAIN, FLOAT)):
        int3_groups(given.normal(7, 3 * group, dtype=dtype), group)


def fp8_linear(given: Given) -> None:
    """Up to 64 rows: more are torch's."""
    for (outs, width), num_rows in product(((80, 208), (48, 1040)), (1, 5, 17, 64)):
        codes, scales = given.normal(outs, width, dtype=torch.float8_e4m3fn), given.scales(outs)
        bias = given.normal(outs, dtype=BRAIN)
        x, gain = given.normal(num_rows, width, dtype=BRAIN), given.normal(width, dtype=BRAIN)
        fp8.fp8_linear(x, codes, scales, bias)
        fp8.gated_linear(given.normal(num_rows, 2 * width, dtype=BRAIN), codes, scales, None)
        for delta in (None, x.clone()):
            fp8.normed_linear(x, delta, gain, EPS, codes, scales, bias)


def int8_linear(given: Given) -> None:
    """Few rows with all levels, many with listed columns; padding; outliers by row, by batch, and none."""
    for (outs, width), num_rows in product(((130, 777), (64, 2048)), (1, 5, 17, 64, 70, 300)):
        codes = given.integers(-127, 128, outs, width, dtype=torch.int8)
        live = Live(given.integers(0, 64, num_rows, dtype=torch.int64), PAGE)
        for by_row, threshold, dtype in RULES:
            rule = rule_of(given, threshold, by_row=by_row)
            told = codes, given.scales(outs), given.normal(outs, dtype=dtype), rule, live
            x, gain = given.normal(num_rows, width, dtype=dtype), given.normal(width, dtype=dtype)
            int8.int8_linear(x, *told)
            if by_row:
                int8.gated_linear(given.normal(num_rows, 2 * width, dtype=dtype), *told)
                for delta in (None, x.clone()):
                    int8.normed_linear(x, delta, gain, EPS, *told)


def int8_rows(given: Given) -> None:
    """Rows longer than a program holds, and columns marked for w8_linear, of this call's and of the last."""
    for dtype, lists in product((HALF, BRAIN), (False, True)):
        x = given.normal(2, MOST_NUMBERS + 40, dtype=dtype)
        quantize_rows(x, rule_of(given, 3.0), ALL_LIVE, lists_columns=lists)
    for by_row, width in product((True, False), (608, MAX_INPUTS)):
        marks = Marks(given.words(MAX_INPUTS // 32), given.words(2 * MAX_INPUTS // 32))
        x, rule = given.normal(19, width), rule_of(given, 3.0, by_row=by_row)
        quantize_rows(x, rule, ALL_LIVE, marks=marks)
        if by_row:
            quantize_gated(given.normal(19, 2 * width), rule, ALL_LIVE, marks=marks)
            quantize_normed(x, x.clone(), given.normal(width), EPS, rule, ALL_LIVE, marks=marks)


def rule_of(given: Given, threshold: float, *, by_row: bool = True) -> OutlierRule:
    return OutlierRule(threshold, by_row, given.told([0, 0], torch.int64))


def read_only(given: Given) -> None:
    read = reader(given.device, 1024, 4, 3)
    for words in (100, 5000):
        read(given.normal(words, dtype=FLOAT))


CASES: tuple[Callable[[Given], None], ...] = (
    add_rms_norm, gated_silu, greedy, sample, sample_likely, shape_logits, row_state, rotary_kv,
    paged_attention, coded_attention, dense_linear, fixed_linear, awq_linear, int3_linear, int3_round,
    fp8_linear,
    int8_linear, int8_rows, read_only,
)  # fmt: skip
