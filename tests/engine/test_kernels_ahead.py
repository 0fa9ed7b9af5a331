"""What is compiled ahead is what a whole start launches: its warm-up, and every graph that it captures."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service import device as devices
from service.engine import startup
from service.engine.engine import Engine, Limits
from service.engine.graphs import batch_sizes
from service.engine.kernel_shapes import Shapes, shapes_of
from service.engine.kernels_ahead import META, KernelsAhead, compile_all, cuda_loads, walk
from service.engine.warm_up import warm_up
from service.kernels.w8_linear import AFTER_ROWS, refusal, row_for
from service.kernels.w8_linear.plan import TABLES, Settings
from service.messages import EngineConfig, Loading
from service.model.batch import BLOCK_TOKENS
from service.model.instance import ModelInstance
from service.model.random_weights import Draw, RandomWeights
from service.precision import load_backend
from service.quantize import packing
from tests.kernels.absent_gpu import absent_gpu, recorded, tensors_on_it
from tests.tiny_models import make_checkpoint

pytest.importorskip("triton")

CPU = torch.device("cpu")
MAX_REQUESTS, BATCH_TOKENS, CONTEXT_TOKENS = 40, 512, 4096
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
FAMILIES = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},  # biases
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},  # norms of q and k
    "smollm3": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layers": [1, 0],
    },
}


class RunsOnce:
    """Stands for the pool of graphs: what would be captured is run."""

    def capture(self, run: Callable[[], Tensor], **_: bool) -> object:
        run()
        return object()


def whole_start(
    source: RandomWeights,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    deterministic: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """As startup has it, with a device that is only said to be a GPU."""
    monkeypatch.setattr(devices, "runs_behind", lambda device: True)
    monkeypatch.setattr(devices, "GraphPool", RunsOnce)
    backend = load_backend(precision)
    model = ModelInstance.load(
        source, backend, CPU, torch.float16, deterministic=deterministic, kv_dtype=kv_dtype
    )
    warm_up(model, BATCH_TOKENS, MAX_REQUESTS).runner.rehearse()
    limits = Limits(CONTEXT_TOKENS, BATCH_TOKENS, MAX_REQUESTS, model.config.vocab_size)
    kv = model.new_kv(CONTEXT_TOKENS // BLOCK_TOKENS + 1)
    Engine(model, kv, limits, CPU, depth=1, deterministic=deterministic).runner.capture()


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here is no GPU to bring kernels in CUDA C++ to."""
    for kernels in ("decode_attention", "dense_linear", "gated_linear", "w4_linear", "w8_linear"):
        monkeypatch.setattr(f"service.engine.kernels_ahead.{kernels}.load", lambda variant: None)


@pytest.mark.parametrize(
    ("family", "precision"),
    [*((family, "fp16") for family in FAMILIES), ("llama", "awq"), ("qwen2", "awq"), ("qwen2", "int3")],
)
def test_a_start_launches_what_was_compiled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    monkeypatch.setattr("service.kernels.dense_linear.triton.MIN_WEIGHT_BYTES", 0)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | FAMILIES[family]))
    source = RandomWeights(tmp_path, CPU, Draw())
    backend = load_backend(precision)
    if backend.quantizer:
        source = source.quantized(packing(source.config, backend))
    shapes = shapes_of(
        source, backend, EngineConfig(model_path="", precision=precision), torch.float16, MAX_REQUESTS
    )
    with recorded() as ahead:
        walk(shapes, batch_sizes(MAX_REQUESTS))
    with recorded() as launched, tensors_on_it():
        whole_start(source, precision, monkeypatch)
    assert ahead == launched


@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama", "int8"), ("qwen2", "int8"), ("qwen3", "int8:threshold=0,skip=down_proj"), ("qwen2", "fp8")],
)
def test_so_does_one_of_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    """Steps of prompts have any number of rows, and not each kind of them is met before somebody waits."""
    monkeypatch.setattr("service.kernels.dense_linear.triton.MIN_WEIGHT_BYTES", 0)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | FAMILIES[family]))
    source = RandomWeights(tmp_path, CPU, Draw())
    config = EngineConfig(model_path="", precision=precision)
    shapes = shapes_of(source, load_backend(precision), config, torch.float16, MAX_REQUESTS)
    with recorded() as ahead:
        walk(shapes, batch_sizes(MAX_REQUESTS))
    with recorded() as launched, tensors_on_it():
        whole_start(source, precision, monkeypatch)
    assert launched <= ahead
    assert {kind[0] for kind in ahead - launched} <= {
        "few_rows_kernel",
        "many_rows_kernel",
        "quantize_kernel",
        "list_columns_kernel",
    }


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("qwen2", "int8"),
        ("llama", "int8:outliers=batch"),
        ("llama", "int8:threshold=0,skip=down_proj"),
        ("qwen2", "fp8"),
        ("llama", "fp8"),
    ],
)
def test_so_does_one_whose_many_rows_of_int8_or_few_of_fp8_are_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    """The rows before them are Triton's; every variant of their kernel is loaded. Of fp8 some rows are
    Triton's, and what has a bias."""
    some, more = Settings(16, 1, 10), Settings(64, 1, 8, cuts=True)
    fp8 = (16, (some,) * 3), (32, (None,) * 3), (64, (more,) * 3)
    monkeypatch.setitem(TABLES, "fp8", fp8)
    monkeypatch.setattr("service.kernels.dense_linear.triton.MIN_WEIGHT_BYTES", 0)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | FAMILIES[family]))
    source, backend = RandomWeights(tmp_path, CPU, Draw()), load_backend(precision)
    config = EngineConfig(model_path="", precision=precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.engine.kernel_shapes.absence", lambda: "")
        shapes = shapes_of(source, backend, config, torch.float16, MAX_REQUESTS)
    shapes = replace(shapes, cuda_dense=False, cuda_decode=False)
    loaded: list[Any] = []
    monkeypatch.setattr("service.engine.kernels_ahead.w8_linear.load", loaded.append)
    for load in cuda_loads(shapes):
        load()
    is_fp8 = precision == "fp8"
    assert {variant.tile for variant in loaded} == ({16, 64} if is_fp8 else {32, 64, 128})
    assert len(programs := {variant.program for variant in loaded}) == len(loaded)
    with pytest.MonkeyPatch.context() as patch, recorded() as ahead:
        # its arithmetic on meta tensors would have torch import its compiler
        patch.setattr("service.kernels.w8_linear.reference.int8_linear", None)
        walk(shapes, batch_sizes(MAX_REQUESTS))
    names = {kind[0] for kind in ahead}
    assert not names & {"many_rows_kernel", "list_columns_kernel"}
    assert "few_rows_kernel" in names
    called: set[Any] = set()

    def multiply(self: Any, codes: Tensor, scales: Tensor, x16: Tensor | None) -> Tensor:
        num_rows = len(codes)
        row = row_for(self.rows, num_rows)
        assert row
        assert is_fp8 or num_rows > AFTER_ROWS
        assert is_fp8 == (x16 is None)
        called.add(row.variant.program)
        return codes.new_zeros(num_rows, self.shape.out_features, dtype=self.shape.dtype)

    monkeypatch.setattr(f"service.precision.{backend.name}.serves", lambda group, shape: not refusal(shape))
    monkeypatch.setattr("service.kernels.w8_linear.cuda.multiprocessors", lambda: 132)
    monkeypatch.setattr("service.kernels.w8_linear.cuda.Bound.multiply", multiply)
    with recorded() as launched, tensors_on_it():
        whole_start(source, precision, monkeypatch)
    assert launched <= ahead
    assert called <= programs
    assert bool(called) == ("batch" not in precision)  # which is bitsandbytes' where no GPU is


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_so_does_a_start_with_a_coded_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool, kv_dtype: torch.dtype
) -> None:
    monkeypatch.setattr("service.kernels.dense_linear.triton.MIN_WEIGHT_BYTES", 0)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | FAMILIES["qwen3"]))
    source = RandomWeights(tmp_path, CPU, Draw())
    config = EngineConfig(model_path="", precision="fp16", deterministic=deterministic)
    shapes = shapes_of(source, load_backend("fp16"), config, torch.float16, MAX_REQUESTS, kv_dtype)
    with recorded() as ahead:
        walk(shapes, batch_sizes(MAX_REQUESTS))
    with recorded() as launched, tensors_on_it():
        whole_start(source, "fp16", monkeypatch, deterministic, kv_dtype)
    assert launched <= ahead
    names = {name for name, *_ in launched}
    copied, in_place = {"unpack_kernel", "prefill_kernel"}, {"coded_prefill_kernel"}
    assert {"coded_decode_kernel", "rotary_kv_kernel", *(in_place if deterministic else copied)} <= names
    assert not names & {"decode_kernel", *(copied if deterministic else in_place)}
    assert in_place <= {name for name, *_ in ahead}, "some prompts see too much for copies"


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp16"), ("qwen2", "fp16"), ("qwen2", "awq")])
def test_so_does_a_deterministic_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    """Its linears have a kind for many rows too, which these steps are too short for, and it draws always
    with filters."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | FAMILIES[family]))
    source = RandomWeights(tmp_path, CPU, Draw())
    backend = load_backend(precision)
    if backend.quantizer:
        source = source.quantized(packing(source.config, backend))
    config = EngineConfig(model_path="", precision=precision, deterministic=True)
    shapes = shapes_of(source, backend, config, torch.float16, MAX_REQUESTS)
    with recorded() as ahead:
        walk(shapes, batch_sizes(MAX_REQUESTS))
    with recorded() as launched, tensors_on_it():
        whole_start(source, precision, monkeypatch, deterministic=True)
    assert launched < ahead
    assert {kind[0] for kind in ahead - launched} <= {"fixed_kernel", "mass_kernel", "draw_kernel"}


@pytest.mark.parametrize(
    ("precision", "at_most"),
    [("fp16", 37), ("nf4", 34), ("awq", 40), ("int8", 64), ("fp8", 64), ("int3", 42)],
)
def test_few_kernels_serve_every_number_of_rows(precision: str, at_most: int) -> None:
    """Each takes half a second to compile; AWQ's linear was once compiled for each size that was captured."""
    folder = Path(__file__).parents[2] / "service" / "model" / "presets" / "llama-3.1-8b"
    source = RandomWeights(folder, META, Draw())
    backend = load_backend(precision)
    if backend.quantizer:
        source = source.quantized(packing(source.config, backend))
    shapes = shapes_of(source, backend, EngineConfig(model_path="", precision=precision), torch.float16, 256)
    with recorded() as ahead:
        walk(shapes, batch_sizes(256))
    assert len(ahead) <= at_most


def test_what_was_compiled_ahead_is_launched_without_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    from service.kernels.gated_silu.triton import gated_silu

    compiled: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", lambda src, **_: compiled.append(src.name))

    def walk_twice() -> None:
        for num_rows in (1, 48):
            gated_silu(torch.empty(num_rows, 128, dtype=torch.float16, device=META))

    with absent_gpu():
        assert compile_all(walk_twice) == 1
        for num_rows in (1, 7):
            gated_silu(torch.zeros(num_rows, 128, dtype=torch.float16))
    assert compiled == ["gated_silu_kernel"]


def test_kernels_are_waited_for_behind_the_weights_and_before_the_first_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Ahead:
        def __init__(self, shapes: Shapes, sizes: list[int]) -> None:
            events.append(f"begun for {shapes.linears}, {sizes}")

        def wait(self) -> int:
            events.append("done")
            return 7

    def tell(loading: Loading) -> None:
        if loading.done == loading.total or loading.stage == "check":
            events.append(f"{loading.stage}: {loading.total} {loading.unit}")

    make_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(devices, "runs_behind", lambda device: True)
    monkeypatch.setattr(startup, "KernelsAhead", Ahead)
    config = EngineConfig(
        model_path=str(tmp_path), precision="bf16", device="cpu", kv_tokens=512, cuda_graphs="off",
        max_batch_requests=4,
    )  # fmt: skip
    seconds = startup.start(config, tell, time.monotonic()).info.load_seconds
    stages = list(dict.fromkeys(event.partition(":")[0] for event in events))
    assert stages == ["begun for dense, [1, 2, 4]", "verify", "load", "done", "kernels", "check", "warm"]
    assert "kernels: 7 kernels" in events
    assert {"import", "device", "verify", "load", "kernels", "check", "warm"} == set(seconds)


def test_a_start_goes_on_where_nothing_could_be_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("service.engine.kernels_ahead.walk", fail)
    monkeypatch.setattr("service.engine.kernels_ahead.cuda_loads", lambda shapes: [])
    shapes: Any = None
    with absent_gpu(), caplog.at_level(logging.WARNING):
        assert KernelsAhead(shapes, []).wait() == 0
    assert "no compiler" in caplog.text
