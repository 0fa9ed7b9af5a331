"""The Triton kernels of a step on a CUDA device, over real and ragged shapes. `pytest -m gpu`, by hand.

Every output is poisoned first: memory that torch hands out uninitialized is full of NaN.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from service.kernels import launch
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.add_rms_norm import reference as norm_reference
from service.kernels.dense_linear import dense_linear
from service.kernels.gated_silu import gated_silu
from service.kernels.gated_silu import reference as silu_reference
from service.kernels.greedy import greedy
from service.kernels.greedy import reference as greedy_reference
from service.kernels.paged_attention import AttentionPlan, decode_plan, paged_attention, plan_attention
from service.kernels.rotary_kv import reference as rotary_reference
from service.kernels.rotary_kv import rotary_kv
from service.kernels.sample import reference as sample_reference
from service.kernels.sample import sample

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PAGE = 16
RELATIVE_RMS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# heads, KV heads, head_dim, dtype, window, softcap
SHAPES = [
    (32, 8, 128, torch.float16, 0, 0.0),  # Llama-3.1-8B, Qwen3-8B
    (32, 8, 128, torch.bfloat16, 100, 0.0),
    (9, 3, 64, torch.bfloat16, 0, 0.0),  # the demo model
    (9, 3, 64, torch.float32, 0, 0.0),
    (32, 32, 80, torch.float16, 0, 0.0),
    (8, 1, 96, torch.float16, 33, 0.0),
    (16, 8, 256, torch.bfloat16, 1024, 50.0),
    (16, 8, 256, torch.float16, 0, 0.0),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@contextmanager
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_rms(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - want.double()).norm() / want.double().norm())


class Cache:
    """Pages of random K and V in a random order; what no sequence owns is NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        pages = [-(-length // PAGE) for length in lengths]
        self.lengths = lengths
        self.tables = torch.zeros(len(lengths), max(pages) + 3, dtype=torch.int32, device=CUDA)
        shape = (sum(pages) + 1, kv_heads, PAGE, head_dim)
        self.keys, self.values = torch.randn(2, *shape, device=CUDA).to(dtype)
        free = (torch.randperm(sum(pages), device=CUDA) + 1).int()
        for sequence, blocks in enumerate(free.split(pages)):
            self.tables[sequence, : len(blocks)] = blocks
            if lengths[sequence] % PAGE:
                self.keys[blocks[-1].long(), :, lengths[sequence] % PAGE :] = float("nan")
                self.values[blocks[-1].long(), :, lengths[sequence] % PAGE :] = float("nan")
        self.keys[0] = self.values[0] = float("nan")

    def attended(self, q: Tensor, starts: list[int], window: int, softcap: float) -> Tensor:
        """What attention over these pages is, in float64."""
        parts = []
        for sequence, length in enumerate(self.lengths):
            queries = q[starts[sequence] : starts[sequence + 1]].double().transpose(0, 1)  # [heads, n, dim]
            blocks = self.tables[sequence, : -(-length // PAGE)].long()
            group = queries.shape[0] // self.keys.shape[1]
            keys, values = (
                cache[blocks].double().transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
                for cache in (self.keys, self.values)
            )
            scores = queries @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            token = torch.arange(length, device=CUDA)
            position = token[length - queries.shape[1] :, None]
            hidden = token > position
            if window:
                hidden |= token <= position - window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            parts.append((weights @ values).transpose(0, 1))
        return torch.cat(parts)


def check_attention(
    cache: Cache, q: Tensor, plan: AttentionPlan, starts: list[int], window: int, softcap: float
) -> None:
    with poisoned():
        arguments = (q, cache.keys, cache.values, plan, q.shape[-1] ** -0.5, window, softcap)
        got, again = paged_attention(*arguments), paged_attention(*arguments)
    assert relative_rms(got, cache.attended(q, starts, window, softcap)) < RELATIVE_RMS[q.dtype]
    assert torch.equal(got, again), "run to run"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "window", "softcap"), SHAPES)
def test_decode(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int, softcap: float
) -> None:
    """Alone and few, with many splits; many, without any."""
    for lengths in ([640], [1, 16, 17, 4100, 63], [torch.randint(1, 900, ()).item() for _ in range(150)]):
        counts = [int(length) for length in lengths]
        cache = Cache(counts, kv_heads, head_dim, dtype)
        q = torch.randn(len(counts), heads, head_dim, device=CUDA).to(dtype)
        on_device = torch.tensor(counts, dtype=torch.int32, device=CUDA)
        plan = decode_plan(cache.tables, on_device)
        check_attention(cache, q, plan, list(range(len(counts) + 1)), window, softcap)


@pytest.mark.parametrize("last", [1500, 2500])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "window", "softcap"), SHAPES)
def test_mixed_batch(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int, softcap: float, last: int
) -> None:
    """Decode rows, whole prompts, chunks behind a prefix, one long chunk; then a context of larger tiles."""
    lengths = [5, 700, 1, 40, 1030, 2, 512, last]
    chunks = [1, 1, 1, 40, 1030, 2, 100, 17]
    cache = Cache(lengths, kv_heads, head_dim, dtype)
    starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    q = torch.randn(starts[-1], heads, head_dim, device=CUDA).to(dtype)
    check_attention(cache, q, plan_attention(cache.tables, starts, lengths, 3), starts, window, softcap)


def test_padded_rows_of_a_decode_are_zeros() -> None:
    cache = Cache([40, 700], 8, 128, torch.float16)
    q = torch.randn(2, 32, 128, device=CUDA).half()
    plan = decode_plan(cache.tables, torch.tensor([0, 700], dtype=torch.int32, device=CUDA))
    with poisoned():
        got = paged_attention(q, cache.keys, cache.values, plan, 0.1)
    assert not got[0].any()
    assert torch.isfinite(got[1]).all()


def assert_rounded_alike(got: Tensor, want: Tensor, atol: float = 1e-6, roundings: int = 1) -> None:
    """One value in a hundred may lie one step off for each rounding: sums are added in another order."""
    steps = 8 if want.dtype == torch.float32 else roundings
    torch.testing.assert_close(got, want, rtol=steps * torch.finfo(want.dtype).eps, atol=atol)
    if want.dtype != torch.float32:
        assert (got != want).float().mean() < 0.01


@pytest.mark.parametrize("dtype", RELATIVE_RMS)
@pytest.mark.parametrize("width", [576, 1536, 2048, 3072, 4096])
def test_norm_and_gate(width: int, dtype: torch.dtype) -> None:
    weight = torch.rand(width, device=CUDA).to(dtype) + 0.5
    for rows in (1, 7, 256, 1024):
        hidden, delta = torch.randn(2, rows, width, device=CUDA).to(dtype)
        gate_up = (torch.randn(rows, 2 * width, device=CUDA) * 4).to(dtype)
        with poisoned():
            total, normed = add_rms_norm(hidden, delta, weight, 1e-5)
            copied, _ = add_rms_norm(hidden, None, weight, 1e-5)
            gated = gated_silu(gate_up)
        want_total, want_normed = norm_reference.add_rms_norm(hidden, delta, weight, 1e-5)
        assert torch.equal(total, want_total)
        assert torch.equal(copied, hidden)
        assert_rounded_alike(normed, want_normed, roundings=2)  # the second turns a step into up to two
        assert_rounded_alike(gated, silu_reference.gated_silu(gate_up))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype"), [shape[:4] for shape in SHAPES])
def test_rotary_kv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norms: bool) -> None:
    for tokens in (1, 300):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=CUDA).to(dtype)
        cos, sin = torch.rand(2, 4096, head_dim, device=CUDA) * 2 - 1
        q_norm, k_norm = torch.rand(2, head_dim, device=CUDA).to(dtype) + 0.5 if norms else (None, None)
        positions = torch.randint(0, 4096, (tokens,), device=CUDA)
        slots = torch.randperm(64 * PAGE, device=CUDA)[:tokens]
        ours = torch.zeros(2, 64, kv_heads, PAGE, head_dim, dtype=dtype, device=CUDA)
        theirs = torch.zeros_like(ours)
        arguments = (qkv, cos, sin, positions, slots, q_norm, k_norm, 1e-5)
        with poisoned():
            q = rotary_kv(*arguments, *ours)
        # a step of a normed value, before the rotation makes it small
        atol = 8 * torch.finfo(dtype).eps if norms else 1e-6
        assert_rounded_alike(q, rotary_reference.rotary_kv(*arguments, *theirs), atol)
        assert_rounded_alike(ours, theirs, atol)


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [128256, 49152, 151669])
def test_chosen_tokens(vocab: int, dtype: torch.dtype, rows: int) -> None:
    """Draws are the CPU's but where a random number falls within rounding of a border."""
    logits = (torch.randn(rows, vocab, device=CUDA) * 2).to(dtype)
    if rows > 1:
        logits[3, vocab - 1] = float("nan")
        logits[4, 0] = float("inf")
        logits[5, 70] = logits[5, vocab - 2] = 100.0
    temperature = torch.rand(rows, device=CUDA) + 0.2
    temperature[::5] = 0
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=CUDA)
    positions, samples = torch.randint(0, 2**20, (2, rows), device=CUDA)
    with poisoned():
        likeliest = greedy(logits)
        drawn = sample(logits, temperature, seeds, positions, samples)
    assert torch.equal(likeliest.cpu(), greedy_reference.greedy(logits.float().cpu()))
    on_cpu = [tensor.cpu() for tensor in (logits.float(), temperature, seeds, positions, samples)]
    want = sample_reference.sample(*on_cpu)
    assert (drawn.cpu() == want).float().mean() >= 0.99
    assert torch.equal(drawn.cpu()[::5], want[::5])
    if rows > 1:
        assert drawn[3:6].tolist() == [-1, -1, int(drawn[5])]
        assert likeliest[5] == 70


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256), (2048, 8192)],
)
def test_linear_for_few_rows(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """Against float32; alone and together the same, and again and again, whoever comes last."""
    weight = (torch.randn(out_features, in_features, device=CUDA) * 0.02).to(dtype)
    bias = torch.randn(out_features, device=CUDA).to(dtype)
    x = torch.randn(16, in_features, device=CUDA).to(dtype)
    with poisoned():
        got = dense_linear(x, weight, bias)
        for rows in (1, 7):
            assert torch.equal(dense_linear(x[:rows], weight, bias), got[:rows])
        for _ in range(20):
            assert torch.equal(dense_linear(x, weight, bias), got), "run to run"
        without = dense_linear(x, weight)
    want = x.double() @ weight.double().t()
    assert relative_rms(got, want + bias.double()) < RELATIVE_RMS[dtype]
    assert relative_rms(without, want) < RELATIVE_RMS[dtype]


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_captured_decode_equals_the_eager_one(rows: int) -> None:
    """All kernels of a decode step in one graph, replayed for other contents of the same tensors."""
    heads, kv_heads, head_dim, vocab = 32, 8, 128, 128256
    hidden_size, width = heads * head_dim, (heads + 2 * kv_heads) * head_dim
    lengths = [int(length) for length in torch.randint(1, 600, (rows,))]
    cache = Cache([640] * rows, kv_heads, head_dim, torch.float16)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    hidden, delta = torch.randn(2, rows, hidden_size, device=CUDA).half()
    qkv = torch.randn(rows, width, device=CUDA).half()
    gate_up = torch.randn(rows, 2 * 14336, device=CUDA).half()
    logits = torch.randn(rows, vocab, device=CUDA)
    weight = torch.ones(hidden_size, device=CUDA).half()
    projection = (torch.randn(hidden_size, hidden_size, device=CUDA) * 0.02).half()
    cos, sin = torch.rand(2, 1024, head_dim, device=CUDA)
    seeds = torch.arange(rows, device=CUDA)
    temperature = torch.ones(rows, device=CUDA)

    def step() -> list[Tensor]:
        positions = on_device.long() - 1
        blocks = cache.tables.gather(1, (positions // PAGE).unsqueeze(1)).squeeze(1)
        slots = blocks.long() * PAGE + positions % PAGE
        total, normed = add_rms_norm(hidden, delta, weight, 1e-5)
        q = rotary_kv(qkv, cos, sin, positions, slots, None, None, 1e-5, cache.keys, cache.values)
        plan = decode_plan(cache.tables, on_device)
        attended = paged_attention(q, cache.keys, cache.values, plan, 0.1)
        drawn = sample(logits, temperature, seeds, positions, seeds)
        projected = dense_linear(normed, projection)
        return [total, normed, projected, q, attended, gated_silu(gate_up), greedy(logits), drawn]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (hidden, delta, qkv, gate_up, logits):
        tensor.normal_()
    on_device.add_(37)
    eager = [tensor.clone() for tensor in step()]
    for tensor in captured:
        tensor.fill_(-7)
    graph.replay()
    for ours, theirs in zip(captured, eager, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_dependent", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_captured_chain_of_layers_equals_the_eager_one(
    rows: int, is_dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel reads what the one before has written: one that begins too early would show."""
    heads, kv_heads, head_dim, hidden_size, inner, num_layers = 32, 8, 128, 4096, 14336, 3
    shapes = [((heads + 2 * kv_heads) * head_dim, hidden_size), (hidden_size, hidden_size)]
    shapes += [(2 * inner, hidden_size), (hidden_size, inner)]
    layers = [
        [(torch.randn(shape, device=CUDA) * 0.02).half() for shape in shapes] for _ in range(num_layers)
    ]
    caches = [Cache([640] * rows, kv_heads, head_dim, torch.float16) for _ in range(num_layers)]
    lengths = torch.randint(1, 600, (rows,), device=CUDA, dtype=torch.int32)
    weight = torch.ones(hidden_size, device=CUDA).half()
    cos, sin = torch.rand(2, 1024, head_dim, device=CUDA)
    start = torch.randn(rows, hidden_size, device=CUDA).half()
    positions = lengths.long() - 1

    def step() -> Tensor:
        hidden, delta = start, None
        for (qkv, o, gate_up, down), cache in zip(layers, caches, strict=True):
            plan = decode_plan(cache.tables, lengths)
            blocks = cache.tables.gather(1, (positions // PAGE).unsqueeze(1)).squeeze(1)
            slots = blocks.long() * PAGE + positions % PAGE
            hidden, x = add_rms_norm(hidden, delta, weight, 1e-5)
            x = dense_linear(x, qkv)
            q = rotary_kv(x, cos, sin, positions, slots, None, None, 1e-5, cache.keys, cache.values)
            attended = paged_attention(q, cache.keys, cache.values, plan, 0.1)
            delta = dense_linear(attended.view(rows, -1), o)
            hidden, x = add_rms_norm(hidden, delta, weight, 1e-5)
            delta = dense_linear(gated_silu(dense_linear(x, gate_up)), down)
        return add_rms_norm(hidden, delta, weight, 1e-5)[1]

    want = step().clone()
    monkeypatch.setattr(launch, "DEPENDENT", is_dependent)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(20):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, want)
