"""A KV cache of 8-bit codes through the whole engine, against transformers' with a cache that rounds."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from service import device as devices
from service.engine import startup
from service.engine.engine import Engine, Limits
from service.engine.evaluate import Evaluation
from service.errors import SettingError
from service.kernels import native
from service.ledger import kv_bytes
from service.messages import EngineConfig, Evaluate, Evaluated, Sampling, Submit
from service.model.instance import ModelInstance
from tests.tiny_models import load_instance, logits_of, make_checkpoint

CPU = torch.device("cpu")
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
NEW_TOKENS = 40
FAMILIES = {
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 24}),
    "norms": ("qwen3", {"head_dim": 32}),
}


class RoundedCache(DynamicCache):
    """Keeps what codes of eight bits would mean, written down here a second time."""

    def __init__(self, codes: str, config: Any) -> None:
        super().__init__(config=config)
        self.codes = codes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(self.rounded(key_states), self.rounded(value_states), layer_idx, *rest, **named)

    def rounded(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        if self.codes == "int8":
            scale = (largest / 127).bfloat16().float()
            return (x / scale).round() * scale
        scale = (largest / 448).bfloat16().float()
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def expected(reference: PreTrainedModel, codes: str, prompt: list[int]) -> list[int]:
    """Greedy, the prompt in one pass."""
    cache, tokens, new = RoundedCache(codes, reference.config), prompt, []
    for _ in range(NEW_TOKENS):
        logits = reference(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
        new.append(int(logits[0, -1].argmax()))
        tokens = new[-1:]
    return new


def prompts() -> list[list[int]]:
    """Six, of which three begin alike for two blocks and more."""
    generator = torch.Generator().manual_seed(3)
    drawn: list[int] = torch.randint(3, 128, (400,), generator=generator).tolist()
    return [drawn[:60], [*drawn[:40], 5], drawn[:33], drawn[100:101], drawn[120:137], drawn[200:290]]


def answers(
    model: ModelInstance, step_tokens: int, num_blocks: int, depth: int = 0
) -> tuple[dict[int, list[int]], dict[str, int]]:
    """-> tokens by request, and what was forced."""
    limits = Limits(140, step_tokens, 8, model.config.vocab_size)
    engine = Engine(model, model.new_kv(num_blocks), limits, CPU, depth=depth)
    told: dict[int, list[int]] = {}
    forced = {"preempted": 0, "cached": 0}
    for id, prompt in enumerate(prompts()):
        engine.add(Submit(id, prompt, Sampling(NEW_TOKENS, temperature=0, ignore_eos=True)))
        if id == 0:  # whose blocks are there when the next two come
            for _ in range(-(-60 // step_tokens)):
                take(engine, told, forced)
    while engine.has_work:
        take(engine, told, forced)
    return told, forced


def take(engine: Engine, told: dict[int, list[int]], forced: dict[str, int]) -> None:
    step = engine.step()
    engine.check()
    forced["preempted"] += step.stats.num_preemptions
    forced["cached"] += step.stats.num_cached_tokens
    for output in step.outputs:
        assert not output.error
        told.setdefault(output.id, []).extend(output.token_ids)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_a_model_whose_cache_rounds(
    tmp_path: Path, family: str, codes: str
) -> None:
    """At ease; with prompts cut, prefixes found and a cache too small for all; and one step ahead."""
    name, changes = FAMILIES[family]
    reference = make_checkpoint(tmp_path, name, **changes)
    model = load_instance(tmp_path, kv_dtype=CODES[codes])
    want = {id: expected(reference, codes, prompt) for id, prompt in enumerate(prompts())}
    at_ease, _ = answers(model, 256, 60)
    assert at_ease == want
    for depth in (0, 1):
        squeezed, forced = answers(model, 24, 15, depth)
        assert squeezed == want
        assert forced["preempted"] > 0
        assert forced["cached"] >= 32


def test_codes_are_not_what_16_bits_would_say(tmp_path: Path) -> None:
    """Else the test above would compare nothing."""
    make_checkpoint(tmp_path, "llama")
    tokens = prompts()[5]
    plain = logits_of(load_instance(tmp_path), tokens)
    for codes, low, high in (("int8", 1e-3, 0.05), ("fp8", 1e-2, 0.3)):
        coded = logits_of(load_instance(tmp_path, kv_dtype=CODES[codes]), tokens)
        assert low < float((coded - plain).norm() / plain.norm()) < high


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_a_decode_is_not_recorded_and_says_so(
    tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
    make_checkpoint(tmp_path, "llama", torch.bfloat16, **shape)
    model = load_instance(tmp_path, precision, kv_dtype=torch.int8)
    with caplog.at_level("INFO", "service.model.recorded"):
        told, _ = answers(model, 64, 60)
    assert [len(tokens) for tokens in told.values()] == [NEW_TOKENS] * 6
    assert ("are not recorded" in caplog.text) is (native.load() is not None)
    assert "dequantizes" in model.kernels()["attention"]


def test_a_cache_of_nan_scales_changes_nothing(tmp_path: Path) -> None:
    """What earlier tenants left: their codes are finite, their scales may be broken."""
    make_checkpoint(tmp_path, "mistral", sliding_window=24)
    model = load_instance(tmp_path, kv_dtype=torch.int8)
    clean, _ = answers(model, 24, 15)
    new_kv = model.new_kv

    def stale(num_blocks: int) -> Any:
        kv = new_kv(num_blocks)
        for scales in kv.scales:
            assert scales is not None
            scales[1:] = torch.nan
        return kv

    model.new_kv = stale  # type: ignore[method-assign]
    assert answers(model, 24, 15)[0] == clean


@pytest.mark.parametrize("codes", CODES)
def test_a_block_s_bytes(tmp_path: Path, codes: str) -> None:
    """A byte an element, and two bytes for each token, head, and K or V."""
    make_checkpoint(tmp_path, "llama", head_dim=32)
    plain, model = load_instance(tmp_path), load_instance(tmp_path, kv_dtype=CODES[codes])
    assert model.kv_block_bytes == 3 * 2 * 2 * 16 * (32 + 2)
    assert plain.kv_block_bytes == 3 * 2 * 2 * 16 * 32 * 4
    assert model.new_kv(7).bytes == 7 * model.kv_block_bytes


def started(folder: Path, **changes: Any) -> startup.Serving:
    config = EngineConfig(model_path=str(folder), device="cpu", **{"precision": "bf16", **changes})
    return startup.start(config, lambda loading: None, time.monotonic())


def test_a_start_tells_type_and_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same memory there is room for nearly twice as many tokens."""
    make_checkpoint(tmp_path, "llama", torch.bfloat16, head_dim=64)
    monkeypatch.setattr(devices, "memory_free_bytes", lambda device: 4_000_000)
    tokens = {}
    for kv_dtype in ("auto", "int8", "fp8"):
        serving = started(tmp_path, kv_dtype=kv_dtype)
        info = serving.info
        assert info.kv_dtype == ("bf16" if kv_dtype == "auto" else kv_dtype)
        assert info.dtype == "bf16"
        assert kv_bytes(info.memory_bytes) == serving.kv.bytes
        tokens[kv_dtype] = info.kv_tokens
    assert tokens["int8"] == tokens["fp8"]
    assert tokens["int8"] / tokens["auto"] == pytest.approx(2 * 64 / (64 + 2), rel=0.02)


def test_deterministic_starts_with_codes(tmp_path: Path) -> None:
    """And looks at a request alone, in company and behind a cached prefix before it is ready."""
    make_checkpoint(tmp_path, "llama")
    info = started(tmp_path, precision="fp32", kv_dtype="int8", deterministic=True).info
    assert info.deterministic
    assert info.kv_dtype == "int8"


def test_an_evaluation_compares_with_a_cache_of_16_bits(tmp_path: Path) -> None:
    """The same precision beside itself: what is left is what the codes cost."""
    make_checkpoint(tmp_path, "llama", torch.bfloat16, head_dim=64)
    divergence = {}
    for kv_dtype in ("auto", "int8"):
        config = EngineConfig(
            model_path=str(tmp_path), device="cpu", precision="bf16", kv_dtype=kv_dtype, kv_tokens=1024
        )
        serving = startup.start(config, lambda loading: None, time.monotonic())
        sent: list[Evaluated] = []
        asked = Evaluate(1, [prompts()[5], prompts()[0]], ["prefill", "decode1"], 20, "bf16")
        Evaluation(asked, serving, config, sent.append).run()
        assert not sent[-1].error
        divergence[kv_dtype] = sent[-1].kl_mean
    assert divergence["auto"] < 1e-6
    assert divergence["int8"] > 1e-4


def test_fp8_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(devices, "device_name", lambda device: "NVIDIA A100")
    config = EngineConfig(model_path="", precision="fp16", kv_dtype="fp8")
    with pytest.raises(SettingError, match="`NVIDIA A100` cannot convert E4M3"):
        startup.check_kv_dtype(config, torch.device("cuda"))
    startup.check_kv_dtype(
        EngineConfig(model_path="", precision="fp16", kv_dtype="int8"), torch.device("cuda")
    )
    startup.check_kv_dtype(config, CPU)
