"""A decode in one launch over 8-bit codes on an H100: right, and each time alike.

The measures are float64, and Triton's kernels beside it, on the same codes. Every variant is asked for by
name, whether the table has it or not. `pytest -m gpu tests/gpu/test_coded_decode_on_gpu.py`, by hand.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.kernels import launch
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.coded_attention import coded_attention
from service.kernels.cuda import absence
from service.kernels.decode_attention import Settings, Shape, cuda
from service.kernels.decode_attention.table import TABLE, row_for, rows_of, variant_of
from service.kernels.dense_linear import dense_linear
from service.kernels.kv_codes import dequantized
from service.kernels.rotary_kv import rotary_kv
from tests.gpu.test_kernels_on_gpu import poisoned, relative_rms
from tests.kernels.decodes import EPS, PAGE, Decodes, decodes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALF, BRAIN, INT8, FP8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
RELATIVE_RMS = {HALF: 1e-3, BRAIN: 6e-3}
WORSE_THAN_TRITON = 1.5
# of 16 bits, whose numbers of splits are all that there are, and deeper rings
SETTINGS = [*(each for _, each in TABLE), Settings(4, 4, 1), Settings(8, 6, 1)]
LENGTHS = (
    [640],
    [1, 16, 17, 4096, 63, 0, 2049],
    [3000, 5, 700, 33, 16, 15, 1, 1000, 128, 127, 129, 40, 41, 42, 43, 44, 45],
)


def shape(
    dim: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    codes: torch.dtype,
    *,
    normed: bool = False,
    capped: bool = False,
) -> Shape:
    return Shape(dim, heads, kv_heads, dtype, codes, normed, capped)


LLAMA = shape(128, 32, 8, HALF, INT8)
# (shape, window, softcap)
MODELS = [
    (LLAMA, 0, 0.0),
    (replace(LLAMA, kv_dtype=FP8), 0, 0.0),
    (shape(128, 32, 8, BRAIN, INT8, normed=True), 0, 0.0),  # Qwen3-8B
    (shape(128, 32, 8, BRAIN, FP8), 0, 0.0),
    (shape(128, 12, 2, BRAIN, INT8), 0, 0.0),  # groups of six
    (shape(128, 28, 4, HALF, FP8), 0, 0.0),  # of seven
    (shape(64, 9, 3, BRAIN, INT8), 0, 0.0),
    (shape(64, 8, 8, HALF, FP8, normed=True), 0, 0.0),
    (LLAMA, 1000, 0.0),
    (shape(80, 32, 32, HALF, INT8), 33, 0.0),
    (shape(96, 16, 2, BRAIN, FP8, normed=True), 100, 0.0),
    (shape(256, 16, 8, BRAIN, INT8, capped=True), 1024, 50.0),
    (shape(256, 8, 4, HALF, FP8), 0, 0.0),
    (shape(128, 32, 2, HALF, INT8), 0, 0.0),  # sixteen heads of a group
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All at once, on all cores."""
    if reason := absence():
        pytest.skip(reason)
    variants = {row.variant for of, _, _ in MODELS for row in rows_of(of, TABLE)}
    variants |= {variant_of(of, each) for of, *_ in MODELS[:2] for each in SETTINGS}
    with ThreadPoolExecutor() as pool:
        list(pool.map(cuda.load, variants))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def caches(given: Decodes) -> tuple[Tensor, Tensor, Tensor]:
    assert given.scales is not None
    return given.keys, given.values, given.scales


def run(given: Decodes, settings: Settings | None = None) -> Tensor:
    rows = rows_of(given.shape, TABLE)
    variant = variant_of(given.shape, settings) if settings else row_for(rows, len(given.lengths)).variant
    keys, values, scales = caches(given)
    rest = keys, values, given.step, given.scale, given.window, given.softcap, scales
    return cuda.decode_attention(
        variant, given.qkv, given.cos, given.sin, given.q_norm, given.k_norm, EPS, *rest
    )


def triton(given: Decodes, pages: list[Tensor]) -> Tensor:
    """By the operations that it replaces, into `pages`."""
    blocks, offsets = given.places()
    positions = (given.step.lengths.long() - 1).clamp(min=0)
    slots = blocks * PAGE + offsets
    norms = given.q_norm, given.k_norm
    q = rotary_kv(given.qkv, given.cos, given.sin, positions, slots, *norms, EPS, *pages)
    return coded_attention(q, *pages, given.step, given.scale, given.window, given.softcap)


def check(given: Decodes, settings: Settings | None = None) -> None:
    kept = [cache.clone() for cache in caches(given)]
    with poisoned():
        got, again = run(given, settings), run(given, settings)
    assert torch.equal(got, again), "run to run"
    want, *_ = given.wanted(is_written=True)  # held against Triton's codes below
    bound = RELATIVE_RMS[given.shape.dtype]
    assert relative_rms(got, want) < bound
    by_triton = triton(given, kept)
    assert relative_rms(got, want) <= WORSE_THAN_TRITON * max(relative_rms(by_triton, want), bound / 4)
    # padded rows write into block 0 there, and nowhere here
    ours, theirs = [cache[1:] for cache in caches(given)], [cache[1:] for cache in kept]
    if not given.shape.is_normed or given.shape.head_dim == 128:
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.view(torch.int8), other.view(torch.int8)), "what is written"
        return
    # squares of other heads are added up in another order: a sum may move a code, or a whole scale
    assert torch.equal(ours[1].view(torch.int8), theirs[1].view(torch.int8))
    real = given.step.lengths > 0
    blocks, offsets = (place[real] for place in given.places())
    mine, triton_s = (
        dequantized(keys.view(torch.int8)[blocks - 1].view(keys.dtype), scales[blocks - 1][..., 0])
        for keys, _, scales in (ours, theirs)
    )
    rows = torch.arange(len(blocks), device=CUDA)
    assert relative_rms(mine[rows, :, offsets], triton_s[rows, :, offsets]) < 1e-2


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} sequences")
@pytest.mark.parametrize(("of", "window", "softcap"), MODELS, ids=str)
def test_it_computes_attention(of: Shape, window: int, softcap: float, lengths: list[int]) -> None:
    check(decodes(of, lengths, window=window, softcap=softcap, device=CUDA))


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_so_does_every_variant(settings: Settings, codes: torch.dtype) -> None:
    for lengths in LENGTHS:
        check(decodes(replace(LLAMA, kv_dtype=codes), lengths, device=CUDA), settings)


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("sequences", [2, 16, 64, 256])
def test_whatever_the_number_of_sequences(sequences: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    lengths = torch.randint(1, 4096 if sequences <= 64 else 1024, (sequences,)).tolist()
    check(decodes(shape(128, 32, 8, dtype, codes), lengths, device=CUDA))


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
def test_layers_without_positions(codes: torch.dtype) -> None:
    check(decodes(replace(LLAMA, kv_dtype=codes), LENGTHS[1], rotates=False, device=CUDA))


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
def test_what_is_broken_shows(codes: torch.dtype) -> None:
    """NaN in one head's query, infinity in the only value, an old scale of NaN: in those heads, nowhere
    else; and codes stay finite."""
    given = decodes(replace(LLAMA, kv_dtype=codes), [640, 1, 300], device=CUDA)
    given.qkv[0, 5 * 128] = float("nan")  # query head 5
    given.qkv[1, 40 * 128] = float("inf")  # value head 0, of the only token
    _, _, scales = caches(given)
    scales[int(given.step.block_tables[2, 3]), 7, 2, 0] = float("nan")
    got = run(given)
    hurt = torch.isnan(got).any(2)
    of_groups = [*([1, head] for head in range(4)), *([2, head] for head in range(28, 32))]
    assert hurt.nonzero().tolist() == [[0, 5], *of_groups]
    for cache in (given.keys, given.values):
        assert bool(cache.float().isfinite().all())


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
@pytest.mark.parametrize("sequences", [1, 16, 64])
def test_a_captured_chain_equals_the_eager_one(sequences: int, codes: torch.dtype) -> None:
    """Layers of linear, attention, linear, each launch placed while the one before it works, and a second
    step on the codes of the first: fifty times the same bits."""
    assert launch.DEPENDENT
    of, num_layers = replace(LLAMA, kv_dtype=codes), 3
    lengths = (torch.randint(0, 1000, (sequences,)) // PAGE * PAGE + 5).tolist()  # room for another token
    given = [decodes(of, lengths, device=CUDA) for _ in range(num_layers)]
    later = torch.tensor(lengths, dtype=torch.int32, device=CUDA) + 1
    weights = [
        [torch.randn(out, 4096, device=CUDA).mul(4096**-0.5).half() for out in (6144, 4096)] for _ in given
    ]
    norm = torch.ones(4096, device=CUDA).half()
    kept = [[cache.clone() for cache in caches(one)] for one in given]
    hidden = torch.randn(sequences, 4096, device=CUDA).half()
    variant = row_for(rows_of(of, TABLE), sequences).variant

    def steps() -> list[Tensor]:
        found = []
        for is_later in (False, True):
            x = hidden
            for one, (qkv, o) in zip(given, weights, strict=True):
                keys, values, scales = caches(one)
                step = replace(one.step, lengths=later) if is_later else one.step
                made = dense_linear(add_rms_norm(x, None, norm, EPS)[1], qkv)
                rest = keys, values, step, one.scale, 0, 0.0, scales
                x = cuda.decode_attention(variant, made, one.cos, one.sin, None, None, EPS, *rest)
                x = dense_linear(x.view(sequences, -1), o)
                found.append(x)
        return found

    want = [x.clone() for x in steps()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for _ in range(50):
        for one, before in zip(given, kept, strict=True):
            for cache, old in zip(caches(one), before, strict=True):
                cache.copy_(old)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        for x, expected in zip(captured, want, strict=True):
            assert torch.equal(x, expected)
