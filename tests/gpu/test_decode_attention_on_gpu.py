"""A decode's attention in one launch on an H100: right, each time alike, also captured between linears.

The measures are float64, and Triton's two kernels beside it. `pytest -m gpu
tests/gpu/test_decode_attention_on_gpu.py`, by hand.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from service.kernels import launch
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.cuda import absence
from service.kernels.decode_attention import Settings, Shape, cuda, table
from service.kernels.decode_attention.table import TABLE, row_for, rows_of, variant_of
from service.kernels.dense_linear import dense_linear
from service.kernels.paged_attention import paged_attention
from service.kernels.rotary_kv import rotary_kv
from tests.kernels.decodes import EPS, PAGE, Decodes, decodes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALF, BRAIN = torch.float16, torch.bfloat16
RELATIVE_RMS = {HALF: 1e-3, BRAIN: 6e-3}
WORSE_THAN_TRITON = 1.5
OTHERS = (Settings(4, 2, 1), Settings(2, 3, 4), Settings(8, 2, 1), Settings(4, 3, 8))  # of the sweep
LENGTHS = (
    [640],
    [1, 16, 17, 4096, 63, 0, 2049],
    [3000, 5, 700, 33, 16, 15, 1, 1000, 128, 127, 129, 40, 41, 42, 43, 44, 45],
)


def shape(
    dim: int, heads: int, kv_heads: int, dtype: torch.dtype, *, normed: bool = False, capped: bool = False
) -> Shape:
    return Shape(dim, heads, kv_heads, dtype, dtype, normed, capped)


# (shape, window, softcap)
MODELS = [
    (shape(128, 32, 8, HALF), 0, 0.0),  # Llama-3.1-8B
    (shape(128, 32, 8, BRAIN, normed=True), 0, 0.0),  # Qwen3-8B
    (shape(128, 12, 2, BRAIN), 0, 0.0),  # Qwen2-1.5B: groups of six
    (shape(128, 28, 4, HALF), 0, 0.0),  # Qwen2-7B: of seven
    (shape(64, 9, 3, BRAIN), 0, 0.0),  # the demo model
    (shape(128, 32, 8, HALF), 1000, 0.0),
    (shape(80, 32, 32, HALF), 33, 0.0),
    (shape(96, 16, 2, BRAIN, normed=True), 100, 0.0),
    (shape(256, 16, 8, BRAIN, capped=True), 1024, 50.0),
    (shape(256, 8, 4, HALF), 0, 0.0),
    (shape(128, 32, 2, HALF), 0, 0.0),  # sixteen heads of a group
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All at once, on all cores."""
    if reason := absence():
        pytest.skip(reason)
    variants = {row.variant for of, _, _ in MODELS for row in rows_of(of, TABLE)}
    variants |= {variant_of(MODELS[0][0], settings) for settings in OTHERS}
    with ThreadPoolExecutor() as pool:
        list(pool.map(cuda.load, variants))


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
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm())


def run(given: Decodes, settings: Settings | None = None) -> Tensor:
    rows = rows_of(given.shape, TABLE)
    variant = variant_of(given.shape, settings) if settings else row_for(rows, len(given.lengths)).variant
    rest = given.keys, given.values, given.step, given.scale, given.window, given.softcap
    norms = given.q_norm, given.k_norm
    return cuda.decode_attention(variant, given.qkv, given.cos, given.sin, *norms, EPS, *rest)


def triton(given: Decodes) -> Tensor:
    """By the two operations that it replaces."""
    blocks, offsets = given.places()
    positions = (given.step.lengths.long() - 1).clamp(min=0)
    norms, pages = (given.q_norm, given.k_norm), (given.keys, given.values)
    q = rotary_kv(given.qkv, given.cos, given.sin, positions, blocks * PAGE + offsets, *norms, EPS, *pages)
    return paged_attention(q, *pages, given.step, given.scale, given.window, given.softcap)


def check(given: Decodes, settings: Settings | None = None) -> None:
    want, k, v = given.wanted()
    kept = given.keys.clone(), given.values.clone()
    with poisoned():
        got = run(given, settings)
        again = run(given, settings)
    assert torch.equal(got, again), "run to run"
    bound = RELATIVE_RMS[given.shape.dtype]
    assert error(got, want) < bound
    blocks, offsets = given.places()
    real = given.step.lengths > 0
    for cache, new, old in zip((given.keys, given.values), (k, v), kept, strict=True):
        place = (blocks[real], slice(None), offsets[real])
        assert error(cache[place], new[real].double()) < bound
        cache[place] = old[place]
        assert torch.equal(cache.view(torch.int16), old.view(torch.int16)), "nothing else is written"


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} sequences")
@pytest.mark.parametrize(("of", "window", "softcap"), MODELS, ids=str)
def test_it_computes_attention(of: Shape, window: int, softcap: float, lengths: list[int]) -> None:
    check(decodes(of, lengths, window=window, softcap=softcap, device=CUDA))


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_so_do_variants_that_may_be_faster(settings: Settings) -> None:
    for lengths in LENGTHS:
        check(decodes(MODELS[0][0], lengths, device=CUDA), settings)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("sequences", [1, 2, 5, 16, 33, 64, 150, 256])
def test_it_is_as_right_as_triton(sequences: int, dtype: torch.dtype) -> None:
    """Whatever the number of sequences, of up to 4,096 tokens."""
    lengths = torch.randint(1, 4096 if sequences <= 64 else 1024, (sequences,)).tolist()
    given = decodes(shape(128, 32, 8, dtype), lengths, device=CUDA)
    want, *_ = given.wanted()
    got = error(run(given), want)
    assert got <= WORSE_THAN_TRITON * error(triton(given), want)


def test_layers_without_positions() -> None:
    check(decodes(MODELS[0][0], LENGTHS[1], rotates=False, device=CUDA))


def test_what_is_broken_shows() -> None:
    """NaN in one head's query, in the only key, in an old one: in those heads, and nowhere else."""
    given = decodes(MODELS[0][0], [640, 1, 300], device=CUDA)
    given.qkv[0, 5 * 128] = float("nan")  # query head 5
    given.qkv[1, 32 * 128] = float("nan")  # key head 0, of the only token
    given.keys[int(given.step.block_tables[2, 3]), 7, 2, 9] = float("nan")
    got = run(given)
    hurt = torch.isnan(got).all(2)
    of_groups = [*([1, head] for head in range(4)), *([2, head] for head in range(28, 32))]
    assert hurt.nonzero().tolist() == [[0, 5], *of_groups]
    assert torch.isnan(got).any(2).equal(hurt)


@pytest.mark.parametrize("is_dependent", [False, True])
@pytest.mark.parametrize("sequences", [1, 16, 64])
def test_a_captured_chain_equals_the_eager_one(
    sequences: int, is_dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of linear, attention, linear, each launch placed while the one before it works, and a second
    step on the K and V of the first: a hundred times the same bits."""
    monkeypatch.setattr(launch, "DEPENDENT", is_dependent and launch.is_supported())
    of, num_layers = MODELS[0][0], 3
    lengths = (torch.randint(0, 1000, (sequences,)) // PAGE * PAGE + 5).tolist()  # room for another token
    given = [decodes(of, lengths, device=CUDA) for _ in range(num_layers)]
    later = torch.tensor(lengths, dtype=torch.int32, device=CUDA) + 1
    weights = [
        [torch.randn(out, 4096, device=CUDA).mul(4096**-0.5).half() for out in (6144, 4096)]
        for _ in range(num_layers)
    ]
    norm = torch.ones(4096, device=CUDA).half()
    kept = [(one.keys.clone(), one.values.clone()) for one in given]
    hidden = torch.randn(sequences, 4096, device=CUDA).half()
    variant = row_for(rows_of(of, TABLE), sequences).variant

    def steps() -> list[Tensor]:
        found = []
        for is_later in (False, True):
            x = hidden
            for one, (qkv, o) in zip(given, weights, strict=True):
                step = replace(one.step, lengths=later) if is_later else one.step
                made = dense_linear(add_rms_norm(x, None, norm, EPS)[1], qkv)
                rest = one.keys, one.values, step, one.scale, 0, 0.0
                x = cuda.decode_attention(variant, made, one.cos, one.sin, None, None, EPS, *rest)
                x = dense_linear(x.view(sequences, -1), o)
                found.append(x)
        return found

    want = [x.clone() for x in steps()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for _ in range(100):
        for one, (keys, values) in zip(given, kept, strict=True):
            one.keys.copy_(keys)
            one.values.copy_(values)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        for x, expected in zip(captured, want, strict=True):
            assert torch.equal(x, expected)


def test_until_it_is_measured_it_serves_nobody() -> None:
    assert table.plan(MODELS[0][0]) == rows_of(MODELS[0][0], TABLE)


def test_every_variant_can_be_on_the_device() -> None:
    """A cluster for which there is no room would be refused when it is launched."""
    for settings, kv_heads in product({settings for _, settings in TABLE}, (1, 8)):
        check(decodes(shape(128, 4 * kv_heads, kv_heads, HALF), [100, 30], device=CUDA), settings)
