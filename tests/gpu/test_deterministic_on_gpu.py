"""A deterministic engine on a CUDA device: the same bits in every company. `pytest -m gpu`, by hand.

What is asked of it is what tests/engine/test_deterministic.py asks of a CPU; graphs, padding and steps ahead
come in addition, and the kernels over real shapes.
"""

import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.engine.engine import Engine
from service.engine.startup import start
from service.errors import PrecisionError
from service.kernels import awq_linear
from service.kernels.awq_linear import reference as awq_reference
from service.kernels.dense_linear.triton import arrivals
from service.kernels.fixed_linear import fixed_linear
from service.kernels.fixed_linear import triton as fixed
from service.kernels.paged_attention import decode_plan, paged_attention, plan_attention
from service.messages import EngineConfig
from tests.engine.test_deterministic import answers, neighbours, watched
from tests.gpu.test_kernels_on_gpu import RELATIVE_RMS, Cache, relative_rms
from tests.tiny_models import make_checkpoint

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# out, in, dtype
LINEARS = [
    (6144, 4096, torch.float16),  # Llama-3.1-8B
    (4096, 4096, torch.bfloat16),
    (28672, 4096, torch.float16),
    (4096, 14336, torch.float16),
    (128256, 4096, torch.float16),
    (960, 576, torch.bfloat16),  # the demo model
    (49152, 576, torch.bfloat16),
    (2560, 1024, torch.float32),
    (130, 100, torch.float16),  # ragged
    (50257, 768, torch.float32),
]
ROWS = (1, 5, 16, 17, 63, 64, 65, 130, 448, 512, 1000)
MOST_ROWS = 1024


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("out_features", "in_features", "dtype"), LINEARS)
def test_a_row_of_a_linear_is_the_same_in_any_company(
    out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x = torch.randn(MOST_ROWS, in_features, device=CUDA).to(dtype)
    weight = (torch.randn(out_features, in_features, device=CUDA) * 0.02).to(dtype)
    bias = torch.randn(out_features, device=CUDA).to(dtype)
    together = fixed_linear(x, weight, bias)
    want = F.linear(x[:64].double(), weight.double(), bias.double())
    assert relative_rms(together[:64], want) < RELATIVE_RMS[dtype]
    for rows in ROWS:
        for part in (slice(rows), slice(MOST_ROWS - rows, MOST_ROWS), slice(7, 7 + rows)):
            assert torch.equal(fixed_linear(x[part], weight, bias), together[part])
    if dtype != torch.float32:  # whichever tiles serve a number of rows
        few, many = (fixed.fixed_linear(x, weight, bias, tiles=tiles) for tiles in (fixed.FEW, fixed.MANY))
        assert torch.equal(few, many)
    assert not arrivals(x.device).any(), "the next launch counts from zero"


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (32, 8, 128, torch.float16),
        (9, 3, 64, torch.bfloat16),
        (16, 8, 256, torch.float16),
        (9, 3, 64, torch.float32),
    ],
)
def test_attention_knows_its_own_sequence_alone(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int
) -> None:
    lengths = [1, 255, 256, 257, 640, 4096, 9000]
    cache = Cache(lengths, kv_heads, head_dim, dtype)
    scale = head_dim**-0.5

    def attended(q: Tensor, plan: object) -> Tensor:
        return paged_attention(q, cache.keys, cache.values, plan, scale, window)  # type: ignore[arg-type]

    q = torch.randn(len(lengths), heads, head_dim, device=CUDA).to(dtype)
    told = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    together = attended(q, decode_plan(cache.tables, told, deterministic=True))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        table = cache.tables[one, : -(-length // 16)].contiguous()
        alone = attended(q[one].contiguous(), decode_plan(table, told[one], deterministic=True))
        assert torch.equal(alone, together[one])

    sequence, length = 4, 640
    q = torch.randn(length, heads, head_dim, device=CUDA).to(dtype)
    table = cache.tables[sequence : sequence + 1]

    def cut(*cuts: int) -> Tensor:
        parts = []
        for start_, stop in pairwise(cuts):
            plan = plan_attention(table, [0, stop - start_], [stop], 0, deterministic=True)
            parts.append(attended(q[start_:stop].contiguous(), plan))
        return torch.cat(parts)

    whole = cut(0, length)
    assert torch.equal(cut(0, 1, 38, 64, 65, 129, 500, 639, length), whole)
    assert torch.equal(cut(0, 100, 351, length), whole)


def engine_of(folder: Path, precision: str, graphs: str, max_batch_tokens: int) -> Engine:
    config = EngineConfig(
        model_path=str(folder),
        precision=precision,
        device="cuda",
        cuda_graphs=graphs,  # type: ignore[arg-type]
        kv_tokens=16384,
        max_batch_tokens=max_batch_tokens,
        max_batch_requests=min(96, max_batch_tokens),
        deterministic=True,
    )
    return start(config, lambda _: None, 0.0).engine


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "int8"])
def test_a_request_is_the_same_beside_1_7_64_256_others(tmp_path: Path, family: str, precision: str) -> None:
    """Replayed or launched one by one, padded, a step ahead, in parts of a prompt, behind a cached prefix."""
    make_checkpoint(tmp_path, family, eos_token_id=None, head_dim=64)
    engine = engine_of(tmp_path, precision, "on", 2048)
    expected = [answers(engine, [submit])[submit.id] for submit in watched()]
    assert engine.runner.graphs is not None
    for number in (1, 7, 64, 256):
        others = neighbours(number)
        told = answers(engine, [*others[: number // 2], *watched(), *others[number // 2 :]])
        assert [told[submit.id] for submit in watched()] == expected
    engine = engine_of(tmp_path, precision, "off", 24)
    told = answers(engine, [*neighbours(64), *watched()])
    assert [told[submit.id] for submit in watched()] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 6144), (14336, 4096), (576, 960)])
def test_so_is_a_row_of_awq_s_linear(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    groups = in_features // (128 if in_features % 128 == 0 else 64)
    scales = torch.rand(groups, out_features, device=CUDA).half() * 0.02

    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, out_features // 8), device=CUDA, dtype=torch.int32)

    weight = words(in_features), words(groups), scales
    x = torch.randn(MOST_ROWS, in_features, device=CUDA).to(dtype)
    linear = awq_linear.bind(*weight, None, deterministic=True)
    assert linear is not None
    together = linear(x)
    want = x[:64].double() @ awq_reference.dequantize(*weight).double()
    assert relative_rms(together[:64], want) < RELATIVE_RMS[dtype]
    for rows in ROWS:
        for part in (slice(rows), slice(MOST_ROWS - rows, MOST_ROWS), slice(7, 7 + rows)):
            assert torch.equal(linear(x[part]), together[part])


@pytest.mark.parametrize("precision", ["nf4", "int8:outliers=batch"])
def test_what_cannot_be_is_refused(tmp_path: Path, precision: str) -> None:
    make_checkpoint(tmp_path, "llama", intermediate_size=128)
    with pytest.raises(PrecisionError, match="deterministic"):
        engine_of(tmp_path, precision, "on", 256)
