"""A KV cache of 8-bit codes on a CUDA device: codes, attention over them, and whole engines.

`pytest -m gpu`, by hand. What the interpreter shows of the kernels is shown again here over real shapes, with
the assembly run by the machine that it was written for.
"""

import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.engine.engine import Engine
from service.engine.startup import start
from service.kernels.coded_attention import coded_attention, workspace_bytes
from service.kernels.kv_codes import dequantized, quantized
from service.kernels.paged_attention import AttentionPlan, decode_plan, plan_attention
from service.kernels.paged_attention import plan as plans
from service.kernels.rotary_kv import coded, rotary_kv
from service.messages import EngineConfig, Sampling, Submit
from tests.engine.test_deterministic import answers as told
from tests.engine.test_deterministic import neighbours, watched
from tests.gpu.test_graphs_on_gpu import NEW_TOKENS, answers, prompts
from tests.gpu.test_kernels_on_gpu import PAGE, SHAPES, Cache, poisoned, relative_rms
from tests.tiny_models import load_instance, make_checkpoint, one_sequence

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CODES = pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
NAMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# of queries, weights and results: codes are the same on both sides. bf16's result alone is 2e-3
RELATIVE_RMS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
# a token may differ from the CPU's in float32 where its logit is this close to the largest, in deviations of
# the row: rounding puts values on the other side of a code's border, in bf16 on a CPU worth 0.08 and 0.20
TIE = {"int8": 0.15, "fp8": 0.4}


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()
    torch.cuda.empty_cache()


class CodedCache(Cache):
    """The same pages as codes; `keys` and `values` are what they mean; what nobody owns has scales of NaN."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, codes: torch.dtype
    ) -> None:
        super().__init__(lengths, kv_heads, head_dim, dtype)
        self.key_codes, key_scales = quantized(self.keys, codes)
        self.value_codes, value_scales = quantized(self.values, codes)
        self.scales = torch.stack((key_scales, value_scales), -1)
        self.keys, self.values = (
            dequantized(self.key_codes, key_scales),
            dequantized(self.value_codes, value_scales),
        )

    def attend(self, q: Tensor, plan: AttentionPlan, window: int, softcap: float) -> Tensor:
        caches = self.key_codes, self.value_codes, self.scales
        return coded_attention(q, *caches, plan, q.shape[-1] ** -0.5, window, softcap)

    def check(self, q: Tensor, plan: AttentionPlan, starts: list[int], window: int, softcap: float) -> None:
        with poisoned():
            got, again = (self.attend(q, plan, window, softcap) for _ in range(2))
        assert relative_rms(got, self.attended(q, starts, window, softcap)) < RELATIVE_RMS[q.dtype]
        assert torch.equal(got, again), "run to run"


@CODES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "window", "softcap"), SHAPES)
def test_decode(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
    codes: torch.dtype,
) -> None:
    """Alone and few, with many splits; many, without any."""
    for lengths in ([640], [1, 16, 17, 4100, 63], [int(torch.randint(1, 900, ())) for _ in range(150)]):
        cache = CodedCache(lengths, kv_heads, head_dim, dtype, codes)
        q = torch.randn(len(lengths), heads, head_dim, device=CUDA).to(dtype)
        plan = decode_plan(cache.tables, torch.tensor(lengths, dtype=torch.int32, device=CUDA))
        cache.check(q, plan, list(range(len(lengths) + 1)), window, softcap)


@CODES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "window", "softcap"), SHAPES)
def test_mixed_batch(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
    codes: torch.dtype,
) -> None:
    """Decode rows, whole prompts, chunks behind a prefix, one long chunk; codes copied, and read in place."""
    lengths = [5, 700, 1, 40, 1030, 2, 512, 1500]
    chunks = [1, 1, 1, 40, 1030, 2, 100, 17]
    cache = CodedCache(lengths, kv_heads, head_dim, dtype, codes)
    starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    q = torch.randn(starts[-1], heads, head_dim, device=CUDA).to(dtype)
    for copied_tokens in (sum(lengths[3:]), 0):
        monkeypatch.setattr(plans, "COPIED_TOKENS", copied_tokens)
        cache.check(q, plan_attention(cache.tables, starts, lengths, 3), starts, window, softcap)


@pytest.mark.parametrize("dtype", RELATIVE_RMS)
def test_prompts_take_the_workspace_that_was_told(dtype: torch.dtype) -> None:
    lengths = [plans.COPIED_TOKENS // 2, plans.COPIED_TOKENS // 2]
    cache = CodedCache(lengths, 2, 64, dtype, torch.int8)
    q = torch.randn(6, 4, 64, device=CUDA).to(dtype)
    plan = plan_attention(cache.tables, [0, 3, 6], lengths, 0)
    cache.attend(q, plan, 0, 0.0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cache.attend(q, plan, 0, 0.0)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0 <= taken - workspace_bytes(2, 64, dtype, CUDA) < 1 << 16


@CODES
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(32, 8, 128, torch.float16), (9, 3, 64, torch.bfloat16), (16, 8, 256, torch.float16)],
)
def test_deterministic_attention_knows_its_own_sequence_alone(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int, codes: torch.dtype
) -> None:
    lengths = [1, 255, 256, 257, 640, 4096, 9000]
    cache = CodedCache(lengths, kv_heads, head_dim, dtype, codes)
    q = torch.randn(len(lengths), heads, head_dim, device=CUDA).to(dtype)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    together = cache.attend(q, decode_plan(cache.tables, on_device, deterministic=True), window, 0.0)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        table = cache.tables[one, : -(-length // PAGE)].contiguous()
        plan = decode_plan(table, on_device[one], deterministic=True)
        assert torch.equal(cache.attend(q[one].contiguous(), plan, window, 0.0), together[one])

    length, table = 640, cache.tables[4:5]
    q = torch.randn(length, heads, head_dim, device=CUDA).to(dtype)

    def cut(*cuts: int) -> Tensor:
        parts = []
        for begin, stop in pairwise(cuts):
            plan = plan_attention(table, [0, stop - begin], [stop], 0, deterministic=True)
            parts.append(cache.attend(q[begin:stop].contiguous(), plan, window, 0.0))
        return torch.cat(parts)

    whole = cut(0, length)
    assert torch.equal(cut(0, 1, 38, 64, 65, 129, 500, 639, length), whole)
    assert torch.equal(cut(0, 100, 351, length), whole)


@CODES
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype"), [shape[:4] for shape in SHAPES])
def test_what_is_written(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norms: bool, codes: torch.dtype
) -> None:
    """The definition's codes, but for values that rounding has put on the other side of a code's border."""
    for tokens in (1, 300):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=CUDA).to(dtype)
        cos, sin = torch.rand(2, 4096, head_dim, device=CUDA) * 2 - 1
        q_norm, k_norm = torch.rand(2, head_dim, device=CUDA).to(dtype) + 0.5 if norms else (None, None)
        positions = torch.randint(0, 4096, (tokens,), device=CUDA)
        slots = torch.randperm(64 * PAGE, device=CUDA)[:tokens]
        arguments = (qkv, cos, sin, positions, slots, q_norm, k_norm, 1e-5)
        shape = (64, kv_heads, PAGE, head_dim)
        ours, theirs = (
            [
                *torch.zeros(2, *shape, device=CUDA).to(codes),
                torch.zeros(*shape[:3], 2, device=CUDA).bfloat16(),
            ]
            for _ in range(2)
        )
        with poisoned():
            rotary_kv(*arguments, *ours)
        coded.rotary_kv(*arguments, *theirs)
        for part in (0, 1):
            got, want = (dequantized(pages[part], pages[2][..., part]) for pages in (ours, theirs))
            # one value in a hundred is rounded to the other side before, and moves a code or a whole scale
            assert relative_rms(got, want) < 5e-3
            assert (got != want).float().mean() < 0.03
        assert torch.equal(ours[2][..., 1], theirs[2][..., 1]), "scales of V, which is only moved"


def test_broken_values_are_seen() -> None:
    qkv = torch.ones(1, 6 * 64, device=CUDA).half()
    qkv[0, 4 * 64 + 5] = float("nan")
    qkv[0, 5 * 64 + 5] = float("inf")
    zero = torch.zeros(1, dtype=torch.int64, device=CUDA)
    for codes in NAMES.values():
        keys, values = torch.zeros(2, 1, 1, PAGE, 64, device=CUDA).to(codes)
        scales = torch.zeros(1, 1, PAGE, 2, device=CUDA).bfloat16()
        rotary_kv(qkv, None, None, zero, zero, None, None, 1e-5, keys, values, scales)
        assert bool(keys.float().isfinite().all())
        assert bool(values.float().isfinite().all())
        for part, cache in enumerate((keys, values)):
            assert bool(dequantized(cache, scales[..., part])[0, 0, 0].isnan().all())


def engine_of(
    folder: Path, precision: str, kv_dtype: str, graphs: str = "on", **changes: int | bool
) -> Engine:
    limits = {"kv_tokens": 8192, "max_batch_tokens": 96, "max_batch_requests": 20} | changes
    config = EngineConfig(
        model_path=str(folder),
        precision=precision,
        device="cuda",
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        cuda_graphs=graphs,  # type: ignore[arg-type]
        **limits,  # type: ignore[arg-type]
    )
    return start(config, lambda _: None, 0.0).engine


@pytest.mark.parametrize("kv_dtype", NAMES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_64_prompts_together_are_the_cpu_s_in_float32(tmp_path: Path, precision: str, kv_dtype: str) -> None:
    """Of a model whose cache holds the same codes; what differs is nearly a tie."""
    make_checkpoint(tmp_path, "qwen3", head_dim=64)
    sampling = Sampling(NEW_TOKENS, temperature=0, ignore_eos=True)
    submits = [Submit(i, prompt, sampling) for i, prompt in enumerate(prompts(64))]
    engine = engine_of(tmp_path, precision, kv_dtype)
    assert engine.runner.graphs is not None
    found = answers(engine, submits)
    reference = load_instance(tmp_path, kv_dtype=NAMES[kv_dtype])
    kv = reference.new_kv(16)
    for submit in submits:
        tokens = submit.prompt + found[submit.id]
        logits = reference.forward(one_sequence(tokens[:-1], 0, kv), kv)[len(submit.prompt) - 1 :]
        drawn = logits.gather(1, torch.tensor(found[submit.id]).unsqueeze(1)).squeeze(1)
        assert ((logits.amax(1) - drawn) / logits.std(1)).max() <= TIE[kv_dtype]


@pytest.mark.parametrize("kv_dtype", NAMES)
def test_deterministic_engines_have_codes_too(tmp_path: Path, kv_dtype: str) -> None:
    make_checkpoint(tmp_path, "llama", eos_token_id=None, head_dim=64)
    limits = {"kv_tokens": 16384, "max_batch_requests": 24, "deterministic": True}
    engine = engine_of(tmp_path, "fp16", kv_dtype, max_batch_tokens=2048, **limits)
    expected = [told(engine, [submit])[submit.id] for submit in watched()]
    for number in (7, 64):
        others = neighbours(number)
        found = told(engine, [*others[: number // 2], *watched(), *others[number // 2 :]])
        assert [found[submit.id] for submit in watched()] == expected
    engine = engine_of(tmp_path, "fp16", kv_dtype, "off", max_batch_tokens=24, **limits)
    found = told(engine, [*neighbours(64), *watched()])
    assert [found[submit.id] for submit in watched()] == expected
