"""What CI's machine cannot show: the same definitions on a CUDA device. `pytest -m gpu`, by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from service.engine.sampler import SamplingRows, Variant, draw
from service.engine.startup import start
from service.kernels.awq_linear import reference
from service.kernels.paged_attention import paged_attention, plan_attention
from service.kernels.paged_attention.reference import paged_attention_reference
from service.kernels.philox import uniform
from service.messages import EngineConfig, Sampling, Submit
from service.model.batch import BLOCK_TOKENS
from service.model.checkpoint import DTYPES
from service.model.device_reader import DeviceReader, places
from service.precision import load_backend
from service.precision.base import LinearGroup, QuantLinear
from service.precision.linear import LinearSpec
from tests.tiny_models import make_checkpoint

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# (in, out): the demo model, Llama-3.1-8B, a ragged edge
SHAPES = [(576, 960), (1536, 576), (4096, 6144), (14336, 4096), (192, 72)]
RELATIVE_RMS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_rms(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - want.double()).norm() / want.double().norm())


def awq_tensors(in_features: int, out_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(0, 16, (in_features, out_features), dtype=torch.int32)
    zeros = torch.randint(0, 16, (in_features // group, out_features), dtype=torch.int32)
    scales = (torch.rand(in_features // group, out_features) * 0.01 + 0.001).half()
    return reference.pack(codes), reference.pack(zeros), scales


@pytest.mark.parametrize("dtype", RELATIVE_RMS)
@pytest.mark.parametrize("rows", [1, 8, 16, 33, 64, 257])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_awq_kernel_agrees_with_the_reference(
    in_features: int, out_features: int, rows: int, dtype: torch.dtype
) -> None:
    group = 128 if in_features % 128 == 0 and in_features > 1536 else 64
    tensors = awq_tensors(in_features, out_features, group)
    weight = reference.dequantize(*tensors).double()
    x = torch.randn(rows, in_features).to(dtype)
    # what the allocator hands out next is poisoned: an element that is not written stays NaN
    torch.full((8, rows, out_features), float("nan"), device=CUDA)
    on_gpu = [t.to(CUDA) for t in tensors]
    got = torch.ops.halftone.awq_linear(x.to(CUDA), *on_gpu)
    assert relative_rms(got.cpu(), x.double() @ weight) < RELATIVE_RMS[dtype]
    assert torch.equal(got, torch.ops.halftone.awq_linear(x.to(CUDA), *on_gpu)), "run to run"


def built(precision: str, dtype: torch.dtype, device: torch.device) -> QuantLinear:
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"part{i}.weight": (torch.randn(out, 576, generator=generator) * 0.05).bfloat16()
        for i, out in enumerate((576, 192, 192))
    }
    parts = tuple(LinearSpec(f"part{i}", 576, w.shape[0]) for i, w in enumerate(weights.values()))
    return load_backend(precision).build(LinearGroup("qkv_proj", parts, device, dtype), weights.__getitem__)


@pytest.mark.parametrize("rows", [1, 7, 33, 257])
@pytest.mark.parametrize(
    ("precision", "dtype", "bound"),
    [
        ("fp16", torch.float16, 1e-3),
        ("bf16", torch.bfloat16, 6e-3),
        ("int8", torch.float16, 0.012),
        ("int8", torch.bfloat16, 0.013),
        ("int8:threshold=0", torch.float16, 0.012),
        ("int8:outliers=row", torch.float16, 0.012),
        ("int8:outliers=row", torch.bfloat16, 0.013),
        ("nf4", torch.float16, 1e-3),
        ("nf4", torch.bfloat16, 6e-3),
        ("nf4:double_quant=off", torch.bfloat16, 6e-3),
        ("fp8", torch.bfloat16, 0.04),
    ],
)
def test_forward_agrees_with_dense(precision: str, dtype: torch.dtype, bound: float, rows: int) -> None:
    layer = built(precision, dtype, CUDA)
    x = torch.randn(rows, 576, generator=torch.Generator().manual_seed(rows)).to(dtype)
    if precision != "int8:threshold=0":
        x[:, 5] *= 20  # an outlier feature, which only the decomposition bears
    weight = torch.cat([layer.dense(part) for part in range(3)])
    assert relative_rms(layer(x.to(CUDA)).cpu(), F.linear(x.double(), weight.double())) < bound


@pytest.mark.parametrize("precision", ["int8", "nf4", "nf4:double_quant=off", "fp8"])
def test_codes_are_those_of_the_cpu(precision: str) -> None:
    """bitsandbytes rounds int8 ties differently on its two devices: one step, in one weight of thousands."""
    cpu = torch.device("cpu")
    on_gpu, on_cpu = built(precision, torch.bfloat16, CUDA), built(precision, torch.bfloat16, cpu)
    for part in range(3):
        got, want = on_gpu.dense(part), on_cpu.dense(part)
        if precision == "int8":
            step = want.abs().amax(1, keepdim=True) / 127
            differs = (got - want).abs() > 1e-3 * step
            assert differs.float().mean() < 1e-3
            assert ((got - want).abs() <= 1.001 * step).all()
        else:
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 33])
def test_paged_attention_agrees_with_the_reference(dtype: torch.dtype, window: int) -> None:
    decode, prefill = [1, 40, 300], [(0, 70), (35, 20)]
    lengths = decode + [before + new for before, new in prefill]
    pages = [-(-length // BLOCK_TOKENS) for length in lengths]
    order = (torch.randperm(sum(pages)) + 1).tolist()
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    keys, values = torch.full((2, sum(pages) + 1, 3, BLOCK_TOKENS, 64), float("nan"), dtype=dtype)
    for sequence, length in enumerate(lengths):
        blocks = torch.tensor([order.pop() for _ in range(pages[sequence])])
        tables[sequence, : len(blocks)] = blocks
        at = torch.arange(length)
        k, v = torch.randn(2, length, 3, 64).to(dtype)
        places = (blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS)
        keys.transpose(1, 2).index_put_(places, k)
        values.transpose(1, 2).index_put_(places, v)
    new = [1] * len(decode) + [count for _, count in prefill]
    starts = [sum(new[:i]) for i in range(len(new) + 1)]
    q = torch.randn(starts[-1], 9, 64).to(dtype)
    want = paged_attention_reference(q, keys, values, tables, starts, lengths, 64**-0.5, window)
    plan = plan_attention(tables.to(CUDA), starts, lengths, len(decode))
    got = paged_attention(q.to(CUDA), keys.to(CUDA), values.to(CUDA), plan, 64**-0.5, window)
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert relative_rms(got.cpu(), want) < bound


def test_random_numbers_and_draws_are_those_of_the_cpu() -> None:
    seeds = torch.tensor([0, -1, 1 << 40, 12345], dtype=torch.int64)
    places = torch.tensor([0, 5, 1 << 20, 7], dtype=torch.int64)
    samples = torch.tensor([0, 1, 2, 3], dtype=torch.int64)
    on_cpu = uniform(seeds, places, samples)
    assert torch.equal(on_cpu, uniform(seeds.to(CUDA), places.to(CUDA), samples.to(CUDA)).cpu())
    # far from a tie, so that the order in which a device sums probabilities cannot decide
    logits = torch.full((4, 1000), -30.0)
    logits[torch.arange(4), torch.tensor([3, 999, 0, 500])] = 30.0
    variants: tuple[Variant, ...] = ("greedy", "temperature", "full")
    for variant in variants:
        drawn = []
        for device in (torch.device("cpu"), CUDA):
            floor = torch.full((4,), 0.0, dtype=torch.float64)
            rest = (seeds, places, samples, torch.full((4,), 50), floor + 0.9, floor)
            rows = SamplingRows(variant, torch.ones(4).to(device), *(t.to(device) for t in rest))
            drawn.append(draw(logits.to(device), rows).cpu())
        assert torch.equal(*drawn), variant


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_engine_equals_transformers_in_float32(family: str, tmp_path: Path) -> None:
    """The whole engine on the GPU, chunked and batched; TF32 would show."""
    theirs = make_checkpoint(tmp_path, family)
    config = EngineConfig(
        model_path=str(tmp_path),
        precision="fp32",
        device="cuda",
        kv_tokens=512,
        max_batch_tokens=24,
        max_batch_requests=8,
    )
    engine = start(config, lambda _: None, 0.0).engine
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 6, 40, 17, 64)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]
    answers: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(Submit(i, prompt, Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)))
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.finish_reason != "error", output.error
            answers[output.id] += output.token_ids
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            want = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
            )
        assert answers[i] == want[0, len(prompt) :].tolist()


def test_loading_ahead_brings_the_files_own_bytes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensors = {
        f"model.layers.{layer}.w": torch.randn(1 + 700 * layer, 4096).to(dtype)
        for layer, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.bfloat16))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = places(tmp_path, "a.safetensors", DTYPES)
    reader = DeviceReader(tmp_path, found, CUDA, ahead_bytes=8 << 20)
    try:
        for _ in range(3):  # places on the device are used again while copies are under way
            for name, want in tensors.items():
                got = reader.read(name)
                assert got.is_cuda
                assert torch.equal((got * 1).cpu(), want), name
    finally:
        reader.close()
