"""A deterministic engine: tokens and log-probabilities of a request, bit for bit, in every company.

Tiny models on a CPU; on a GPU the same is asked by tests/gpu/test_deterministic_on_gpu.py.
"""

import random
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_models import load_instance, make_checkpoint

from service.engine.engine import Engine, Limits
from service.engine.results import Pending
from service.engine.scheduler import Chunk
from service.engine.startup import start
from service.errors import DeviceError, PrecisionError
from service.kernels import native
from service.kernels.dense_linear.widened import has_products
from service.kernels.paged_attention import by_page
from service.messages import EngineConfig, Sampling, Submit
from service.model.instance import ModelInstance

CPU = torch.device("cpu")
NEW_TOKENS = 12
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp32": ("llama", "fp32", {}),
    "fp32-windows": ("mistral", "fp32", {"sliding_window": 20}),
    "bf16": ("qwen3", "bf16", {"head_dim": 64}),
    "bf16-torch-attention": ("llama", "bf16", {}),
    "int8": ("llama", "int8", {"head_dim": 64}),
}
WATCHED = (  # prompt tokens, sampling
    (1, Sampling(NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=3)),
    (33, Sampling(NEW_TOKENS, temperature=0.9, seed=11, ignore_eos=True, logprobs=0)),
    (90, Sampling(NEW_TOKENS, temperature=1.1, top_k=40, top_p=0.8, seed=12, ignore_eos=True, logprobs=5)),
    (48, Sampling(NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=2)),
    (70, Sampling(NEW_TOKENS, temperature=0.8, seed=13, ignore_eos=True, frequency_penalty=0.6, logprobs=2)),
)
Told = list[Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelInstance]:
    loaded = {}
    for name, (family, precision, changes) in MODELS.items():
        if precision != "fp32" and native.load() is None:
            continue
        folder = tmp_path_factory.mktemp(name)
        make_checkpoint(folder, family, eos_token_id=None, **changes)
        loaded[name] = load_instance(folder, precision, deterministic=True)
    return loaded


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=length)


def watched() -> list[Submit]:
    return [Submit(id, prompt(length, id), sampling) for id, (length, sampling) in enumerate(WATCHED)]


def neighbours(number: int) -> list[Submit]:
    """Of all kinds; a third begin as some watched request does, so that they share its prompt's blocks."""
    chance = random.Random(number)
    made = []
    for index in range(number):
        _, sampling = chance.choice(WATCHED)
        sampling = msgspec.structs.replace(
            sampling, max_tokens=chance.randrange(1, NEW_TOKENS), seed=index, logprobs=chance.randrange(-1, 8)
        )
        token_ids = prompt(chance.randrange(1, 60), 1000 + index)
        if index % 3 == 0:
            token_ids = watched()[index % len(WATCHED)].prompt[: chance.randrange(1, 91)] + token_ids
        made.append(Submit(1000 + index, token_ids, sampling))
    return made


def make_engine(
    model: ModelInstance, step_tokens: int = 4096, num_blocks: int = 700, depth: int = 0, on: bool = True
) -> Engine:
    limits = Limits(160, step_tokens, min(80, step_tokens), model.config.vocab_size)
    return Engine(model, model.new_kv(num_blocks), limits, CPU, depth=depth, deterministic=on)


def answers(engine: Engine, submits: Iterable[Submit]) -> dict[int, Told]:
    """Everything that is told of each: tokens, log-probabilities, the likeliest few, those of the prompt."""
    told: dict[int, Told] = {}
    for number, submit in enumerate(submits):
        engine.add(submit)
        told[submit.id] = []
        if number % 16 == 15:
            take(engine, told)
    while engine.has_work:
        take(engine, told)
    return told


def take(engine: Engine, told: dict[int, Told]) -> None:
    step = engine.step()
    engine.check()
    assert step.stats.num_preemptions == 0
    for output in step.outputs:
        assert not output.error
        told[output.id] += zip(output.token_ids, output.logprobs or [None], strict=True)
        told[output.id] += output.prompt_logprobs or []


def alone(model: ModelInstance) -> list[Told]:
    """Each by itself in one step, in an engine of its own."""
    return [answers(make_engine(model), [submit])[submit.id] for submit in watched()]


@pytest.mark.parametrize("name", MODELS)
def test_a_request_is_the_same_in_every_company(models: dict[str, ModelInstance], name: str) -> None:
    if name not in models:
        pytest.skip(native.absence())
    model = models[name]
    expected = alone(model)
    for number, step_tokens, num_blocks, depth in (
        (1, 17, 700, 0),
        (7, 64, 700, 1),
        (7, 5, 24, 0),  # five tokens a step, and a cache that holds two of them
        (64, 96, 700, 0),
    ):
        others = neighbours(number)
        engine = make_engine(model, step_tokens, num_blocks, depth)
        told = answers(engine, [*others[: number // 2], *watched(), *others[number // 2 :]])
        assert [told[submit.id] for submit in watched()] == expected
        # again, in another order, with their prompts' blocks in the cache
        told = answers(engine, reversed(watched()))
        assert [told[submit.id] for submit in watched()] == expected


def test_without_the_mode_bits_move(tmp_path: Path) -> None:
    """What the test above would see."""
    make_checkpoint(tmp_path, "llama", eos_token_id=None)
    model = load_instance(tmp_path)
    expected = [answers(make_engine(model, on=False), [submit])[submit.id] for submit in watched()]
    told = answers(make_engine(model, 17, on=False), watched())
    assert [told[submit.id] for submit in watched()] != expected


def test_a_later_request_finds_prompts_and_no_answers(models: dict[str, ModelInstance]) -> None:
    """An answer's keys and values are computed as a decode computes them: no prompt's are."""
    engine = make_engine(models["fp32"])
    first = Submit(1, prompt(40, 1), Sampling(24, temperature=0, ignore_eos=True))
    answer = [token_id for token_id, _ in answers(engine, [first])[1]]
    engine.add(Submit(2, first.prompt + answer, Sampling(1, temperature=0)))
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    assert outputs[0].cached_tokens == 32, "the whole blocks of the first prompt"


def test_who_is_admitted_has_room_to_its_end(models: dict[str, ModelInstance]) -> None:
    """Of two requests that would fit for a while, one waits."""
    for on, running in ((True, 1), (False, 2)):
        engine = make_engine(models["fp32"], num_blocks=11, on=on)
        for id in (1, 2):
            engine.add(Submit(id, prompt(30, id), Sampling(80, temperature=0, ignore_eos=True)))
        assert engine.step().stats.num_running == running


@pytest.mark.parametrize("rest", [1, 17])
def test_a_prompt_s_last_token_is_no_decode(
    models: dict[str, ModelInstance], rest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few tokens of it are left: prefill computes it."""
    engine = make_engine(models["fp32"], 16)
    engine.add(Submit(1, prompt(rest, 1), Sampling(3, temperature=0, ignore_eos=True)))
    computed: list[tuple[int, bool]] = []
    launch = engine.runner.launch

    def watch(chunks: list[Chunk]) -> Pending:
        computed.extend((chunk.start, chunk.is_decode) for chunk in chunks)
        return launch(chunks)

    monkeypatch.setattr(engine.runner, "launch", watch)
    while engine.has_work:
        engine.step()
    assert computed[-3:] == [(rest - 1, False), (rest, True), (rest + 1, True)]


def config(folder: Path, **changes: Any) -> EngineConfig:
    settings = {"precision": "bf16", "device": "cpu", "kv_tokens": 512, "deterministic": True}
    return EngineConfig(**{"model_path": str(folder)} | settings | changes)


needs_native = pytest.mark.skipif(native.load() is None, reason=native.absence())


@pytest.mark.parametrize(
    "precision",
    ["fp32", *(pytest.param(name, marks=needs_native) for name in ("bf16", "fp8", "int8", "nf4"))],
)
def test_a_start_says_so(tmp_path: Path, precision: str) -> None:
    make_checkpoint(tmp_path, "llama", intermediate_size=128, head_dim=32)
    serving = start(config(tmp_path, precision=precision), lambda _: None, 0.0)
    assert serving.info.deterministic
    assert serving.engine.deterministic
    assert "by page" in serving.info.kernels["attention"]


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({"precision": "fp16"}, "`qkv_proj` is served by `torch.linear`"),
        pytest.param(
            {"precision": "int8:outliers=batch"},
            "`qkv_proj` is served by `native.avx512.int8_linear",
            marks=needs_native,
        ),
        (
            {"precision": "bf16", "cpu_kernels": "torch"},
            f"`qkv_proj` is served by `{'onednn.packed' if has_products(torch.bfloat16) else 'torch.'}",
        ),
        pytest.param(
            {"head": "int8"}, "`lm_head` is served by `torch._weight_int8pack_mm`", marks=needs_native
        ),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, str], served: str, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: native.choose("auto"))
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(PrecisionError, match=re.escape(served)) as raised:
        start(config(tmp_path, **changes), lambda _: None, 0.0)
    assert "deterministic" in raised.value.message
    assert "--head 16bit" in raised.value.hint


@pytest.mark.parametrize(("chunk", "told"), [(22, "beside other requests"), (13, "behind a cached prefix")])
def test_a_device_that_does_not_keep_the_promise_serves_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, told: str
) -> None:
    """Here one whose attention adds a trifle for prompts cut to a certain size."""
    make_checkpoint(tmp_path, "llama")
    attend = by_page.paged_attention

    def attend_otherwise(q: torch.Tensor, *others: Any) -> None:
        attend(q, *others)
        plan, result = others[2], others[6]
        for first, end in pairwise(plan.query_starts):
            if end - first == chunk:
                result[first:end] *= 1.001

    monkeypatch.setattr(by_page, "paged_attention", attend_otherwise)
    with pytest.raises(DeviceError, match=told):
        start(config(tmp_path, precision="fp32"), lambda _: None, 0.0)
