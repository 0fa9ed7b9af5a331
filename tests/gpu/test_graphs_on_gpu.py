"""Captured decode steps on a CUDA device: they give what the same steps give one kernel at a time, and what
the model gives in float32 on a CPU. `pytest -m gpu`, by hand."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.engine import Engine
from service.engine.graphs import CAPTURED, batch_sizes
from service.engine.scheduler import Chunk
from service.engine.startup import start
from service.messages import EngineConfig, Sampling, Submit
from tests.tiny_models import load_instance, make_checkpoint, one_sequence

pytestmark = pytest.mark.gpu
NEW_TOKENS = 24
# a token may differ from the CPU's where its logit is this close to the largest, in deviations of the row
TIE = {"fp32": 1e-4, "fp16": 0.03}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, request.param)
    return path


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def engine_of(folder: Path, precision: str, graphs: bool = True, **changes: int) -> Engine:
    limits = {"kv_tokens": 8192, "max_batch_tokens": 96, "max_batch_requests": 20} | changes
    config = EngineConfig(
        model_path=str(folder),
        precision=precision,
        device="cuda",
        cuda_graphs="on" if graphs else "off",
        **limits,  # type: ignore[arg-type]
    )
    return start(config, lambda _: None, 0.0).engine


def prompts(count: int) -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(3, 128) for _ in range(generator.randrange(1, 90))] for _ in range(count)]


def answers(engine: Engine, submits: list[Submit]) -> dict[int, list[int]]:
    told: dict[int, list[int]] = {submit.id: [] for submit in submits}
    for submit in submits:
        engine.add(submit)
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.finish_reason != "error", output.error
            told[output.id] += output.token_ids
        engine.check()
    return told


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_64_prompts_together_are_the_cpu_s_in_float32(folder: Path, precision: str) -> None:
    """Chunks, mixed steps, padding and every size of batch on the way; what differs is a tie."""
    engine = engine_of(folder, precision)
    assert engine.depth == 1
    sampling = Sampling(NEW_TOKENS, temperature=0, ignore_eos=True)
    submits = [Submit(i, prompt, sampling) for i, prompt in enumerate(prompts(64))]
    told = answers(engine, submits)
    reference = load_instance(folder)
    kv = reference.new_kv(16)
    for submit in submits:
        tokens = submit.prompt + told[submit.id]
        assert len(told[submit.id]) == NEW_TOKENS
        logits = reference.forward(one_sequence(tokens[:-1], 0, kv), kv)[len(submit.prompt) - 1 :]
        drawn = logits.gather(1, torch.tensor(told[submit.id]).unsqueeze(1)).squeeze(1)
        assert ((logits.amax(1) - drawn) / logits.std(1)).max() <= TIE[precision]


@pytest.mark.parametrize("is_prepared", [False, True], ids=["as they come", "ahead"])
def test_replayed_steps_draw_what_steps_kernel_by_kernel_draw(folder: Path, is_prepared: bool) -> None:
    """Greedy and drawn rows beside each other, seeds apart; some steps replay the forward pass alone, and
    those with prompts are captured when they come, or before."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.5},
        {"temperature": 1, "frequency_penalty": 0.7},
        {"temperature": 1, "top_k": 9, "top_p": 0.9},
        {"temperature": 0, "min_tokens": 5, "stop_token_ids": (3, 4, 5)},
        {"temperature": 0, "logprobs": 2},
    ]
    submits = [
        Submit(i, prompt, Sampling(NEW_TOKENS - i % 7, seed=i, ignore_eos=True, **kinds[i // 6]))
        for i, prompt in enumerate(prompts(36))
    ]
    replayed, launched = (engine_of(folder, "fp32", graphs) for graphs in (True, False))
    assert replayed.runner.graphs is not None
    assert launched.runner.graphs is None
    while is_prepared and replayed.may_prepare:
        replayed.prepare()
    known = len(replayed.runner.graphs._mixed)
    assert answers(replayed, submits) == answers(launched, submits)
    assert len(replayed.runner.graphs._mixed) > 1, "steps with prompts were not replayed"
    assert not is_prepared or len(replayed.runner.graphs._mixed) == known


def test_filters_capture_nothing_while_others_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder, "fp16")
    monkeypatch.setattr(engine.runner.graphs, "forward", None)
    submits = [
        Submit(i, prompt, Sampling(NEW_TOKENS, seed=i, top_k=9 * (i % 2), top_p=0.8, ignore_eos=True))
        for i, prompt in enumerate(prompts(20))
    ]
    answers(engine, submits)


def test_every_size_is_captured_before_ready(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    config = EngineConfig(
        model_path=str(folder), precision="fp16", device="cuda", kv_tokens=512, max_batch_requests=20
    )
    start(config, lambda m: told.append((m.done, m.total)) if m.stage == "capture" else None, 0.0)
    total = len(CAPTURED) * len(batch_sizes(20)) + 1  # and the largest step with prompts
    assert told[0] == (0, total)
    assert told[-1] == (total, total)


def test_a_launch_waits_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither replayed nor eager nor mixed; torch raises where the host would wait for the device."""
    engine = engine_of(folder, "fp16")
    launch = engine.runner.launch

    def watched(chunks: list[Chunk]) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(chunks)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.runner, "launch", watched)
    kinds: list[dict[str, Any]] = [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.1}]
    submits = [
        Submit(i, prompt, Sampling(NEW_TOKENS, temperature=i % 2, **kinds[i // 2 % 4]))
        for i, prompt in enumerate(prompts(12))
    ]
    submits.append(Submit(12, prompts(1)[0], Sampling(NEW_TOKENS // 2, logprobs=2)))
    answers(engine, submits)


def test_200_requests_with_aborts_leave_nothing_behind(folder: Path) -> None:
    engine = engine_of(folder, "fp16", kv_tokens=2048)
    generator = random.Random(5)
    held: list[int] = []
    for _ in range(3):
        for index, prompt in enumerate(prompts(200)):
            engine.add(Submit(index, prompt, Sampling(20, temperature=index % 2, seed=index)))
        while engine.has_work:
            engine.step()
            engine.abort([generator.randrange(200)] if generator.random() < 0.3 else [])
            engine.check()
        assert engine.cache.num_held == 0
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]
