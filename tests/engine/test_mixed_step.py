"""Steps with prompts as they are captured: their shapes, their padding, and who goes without."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NoReturn

import numpy as np
import pytest
import torch
from fake_model import (
    CPU,
    VOCAB_SIZE,
    Client,
    FakeCaptured,
    FakeGraphPool,
    FakeModel,
    expected_answer,
    fake_engine,
    fake_kv,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service import device as devices
from service.engine import graphs as graphs_module
from service.engine.engine import Engine
from service.engine.graphs import SPARE_BYTES, GraphMemory, MixedGraph
from service.engine.mixed_step import (
    MOST_ENDS,
    MOST_PROMPTS,
    MOST_ROWS,
    MixedInputs,
    MixedShape,
    MixedSteps,
    decode_sizes,
    row_sizes,
)
from service.engine.runner import Runner
from service.engine.state import DeviceState
from service.kernels.paged_attention import COPIED_TOKENS, SHORT_PROMPT_TOKENS
from service.messages import Sampling, Submit
from service.model.batch import PagedKV

MAX_CONTEXT_TOKENS = 63 * 16  # of a fake engine


def shapes_of(engine: Engine) -> set[tuple[int, int, bool]]:
    """Rows, those that decode, and whether a context is long."""
    assert engine.runner.graphs is not None
    return {(shape.num_rows, shape.num_decode, shape.is_long) for shape in engine.runner.graphs._mixed}


def steps(max_step_tokens: int = 2048, max_requests: int = 256) -> MixedSteps:
    state = DeviceState(max_requests, 4096, CPU)
    return MixedSteps(FakeModel(), fake_kv(4), state, max_step_tokens, max_requests)


def test_sizes_cover_what_is_asked() -> None:
    assert row_sizes(2048) == [*range(64, 385, 64), *range(512, 769, 64), 896, 1024, 1536, 2048]
    assert row_sizes(100) == [64, 128]
    assert decode_sizes(256) == [0, 16, 64, 256]
    assert decode_sizes(20) == [0, 16, 20]
    assert decode_sizes(3) == [0, 3]


@given(st.integers(1, 5000), st.integers(1, 600))
def test_the_largest_shape_holds_every_step(max_step_tokens: int, max_requests: int) -> None:
    largest = steps(max_step_tokens, max_requests).largest
    assert largest.num_decode == max_requests
    assert largest.num_rows >= min(max_step_tokens, MOST_ROWS)
    assert largest.num_logits < largest.num_rows


def test_a_step_of_a_known_shape_is_replayed() -> None:
    engine = fake_engine(captured=True, max_batch_tokens=128)
    for number, length in enumerate((70, 65, 100, 120)):
        engine.add(Submit(number, [number + 1] * length, Sampling(1, temperature=0, ignore_eos=True)))
        Client().run(engine)
    assert shapes_of(engine) == {(128, 0, False), (128, 8, False)}


def test_long_contexts_have_a_shape_of_their_own() -> None:
    engine = fake_engine(num_blocks=200, captured=True, max_batch_tokens=4096)
    for number, length in enumerate((SHORT_PROMPT_TOKENS - 1, SHORT_PROMPT_TOKENS + 1)):
        submit = Submit(number, [number + 1] * length, Sampling(2, temperature=0, ignore_eos=True))
        engine.add(submit)
        client = Client().run(engine)
        assert client.answers[number] == expected_answer(submit, 3200)[0]
    assert (2048, 0, False) in shapes_of(engine)
    assert not any(is_long for _, _, is_long in shapes_of(engine)), "2,049 rows are more than are captured"
    engine = fake_engine(num_blocks=200, captured=True, max_batch_tokens=1024)
    engine.add(Submit(1, [1] * (SHORT_PROMPT_TOKENS + 9), Sampling(1, temperature=0, ignore_eos=True)))
    Client().run(engine)
    assert {(1024, 0, False), (64, 0, True)} <= shapes_of(engine)


def test_many_short_prompts_run_kernel_by_kernel() -> None:
    count = MOST_PROMPTS + 4
    engine = fake_engine(200, 128, count, captured=True)
    before = shapes_of(engine)
    submits = [Submit(i, [i % 20, 3], Sampling(1, seed=i, ignore_eos=True)) for i in range(count)]
    for submit in submits:
        engine.add(submit)
    client = Client()
    client.take(engine.step())
    assert shapes_of(engine) == before
    client.run(engine)
    for submit in submits:
        assert client.answers[submit.id] == expected_answer(submit, MAX_CONTEXT_TOKENS)[0]


def test_usual_shapes_are_captured_while_nobody_asks() -> None:
    engine = fake_engine(captured=True, max_batch_tokens=300)
    assert engine.runner.graphs is not None
    engine.add(Submit(1, [3] * 30, Sampling(3, seed=1, ignore_eos=True)))
    Client().run(engine)  # one of them is known
    while engine.may_prepare:
        engine.prepare()
    rows = (64, 128, 192, 256, 320)
    assert shapes_of(engine) == {(count, decode, False) for count in rows for decode in (0, 8)}
    known = engine.runner.graphs.memory
    engine.add(Submit(2, [4] * 100, Sampling(3, seed=1, ignore_eos=True)))
    Client().run(engine)
    assert engine.runner.graphs.memory == known
    assert not fake_engine().may_prepare


def test_a_step_of_which_too_much_is_asked_runs_kernel_by_kernel() -> None:
    """Prompts that end in it have logits, of which a shape has room for so many."""
    engine = fake_engine(200, 256, 64, captured=True)
    for number in range(MOST_ENDS + 1):
        engine.add(Submit(number, [number, 3], Sampling(1, seed=number, ignore_eos=True)))
    before = shapes_of(engine)
    Client().run(engine)
    assert shapes_of(engine) == before


def test_no_more_shapes_are_captured_than_memory_is_kept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MOST_MIXED", 2)
    engine = fake_engine(captured=True, max_batch_tokens=512)
    for number, length in enumerate((40, 100, 200, 400)):
        submit = Submit(number, [number + 1] * length, Sampling(3, seed=1, ignore_eos=True))
        engine.add(submit)
        assert Client().run(engine).answers[number] == expected_answer(submit, MAX_CONTEXT_TOKENS)[0]
    assert len(shapes_of(engine)) == 2


class Full(FakeGraphPool):
    def capture(self, run: Callable[[], Tensor], *, is_known: bool = False) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")


def no_room(self: MixedSteps, shape: MixedShape) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


def fail_captures(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    patch.setattr(engine.runner.graphs, "_pool", Full())


def fail_inputs(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    patch.setattr(MixedSteps, "make", no_room)


def leave_little(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    patch.setattr(devices, "memory_free_bytes", lambda device: SPARE_BYTES - 1)


@pytest.mark.parametrize("is_idle", [False, True], ids=["by a step", "while nobody asks"])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [(fail_captures, "OutOfMemoryError"), (fail_inputs, "OutOfMemoryError"), (leave_little, "255 MiB")],
)
def test_a_capture_that_cannot_be_while_serving_is_told_and_stops_nobody(
    harm: Callable[[pytest.MonkeyPatch, Engine], None],
    reason: str,
    is_idle: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever asks for nothing must not end the engine, and what was captured is still replayed."""
    engine = fake_engine(captured=True, max_batch_tokens=128)
    graphs = engine.runner.graphs
    assert graphs is not None
    known = graphs._mixed.copy()
    harm(monkeypatch, engine)
    replays: list[int] = []
    replay = MixedGraph.replay
    monkeypatch.setattr(
        MixedGraph,
        "replay",
        lambda graph, inputs: replays.append(inputs.num_tokens) or replay(graph, inputs),
    )
    with caplog.at_level(logging.WARNING):
        while is_idle and engine.may_prepare:
            engine.prepare()
        for number, length in enumerate((30, 40, 100)):  # two of 64 rows, and one as the largest is
            submit = Submit(number, [number] * length, Sampling(3, seed=1, ignore_eos=True))
            engine.add(submit)
            client = Client().run(engine)
            assert client.answers[number] == expected_answer(submit, MAX_CONTEXT_TOKENS)[0]
        # beside a row that decodes it is of the largest shape
        engine.add(Submit(8, [8] * 9, Sampling(9, seed=1, ignore_eos=True)))
        client.take(engine.step())
        engine.add(Submit(9, [9] * 100, Sampling(1, seed=1, ignore_eos=True)))
        client.run(engine)
    assert replays == [101]
    assert graphs._mixed == known
    assert not engine.may_prepare
    [record] = caplog.records
    assert "what is not captured yet runs kernel by kernel from now on" in record.getMessage()
    assert reason in record.getMessage()


def test_a_forward_pass_that_cannot_be_captured_runs_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Log-probabilities were an error then, though nothing was wrong with the request."""
    engine = fake_engine(captured=True)
    fail_captures(monkeypatch, engine)
    submit = Submit(1, [3, 1, 4], Sampling(9, seed=2, top_k=3, logprobs=1, ignore_eos=True))
    engine.add(submit)
    with caplog.at_level(logging.WARNING):
        client = Client().run(engine)
    assert client.answers[1] == expected_answer(submit, MAX_CONTEXT_TOKENS)[0]
    [record] = caplog.records
    assert "OutOfMemoryError" in record.getMessage()


@pytest.mark.parametrize(("grown_bytes", "own_bytes"), [(2 << 20, 2 << 20), (500 << 20, 0), (-7, 0)])
def test_what_another_process_takes_meanwhile_is_not_the_graphs(
    grown_bytes: int, own_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are captured for a second behind ready, which is when the next resident engine opens the GPU."""
    engine = fake_engine(captured=True, max_batch_tokens=128)
    graphs = engine.runner.graphs
    assert graphs is not None
    graphs.memory = GraphMemory()
    held = iter([1 << 30, (1 << 30) + grown_bytes])
    monkeypatch.setattr(devices, "memory_used_bytes", lambda device: 0)
    monkeypatch.setattr(devices, "memory_taken_bytes", lambda device: next(held))
    while len(graphs._mixed) == 1:
        engine.prepare()
    assert graphs.memory.driver_bytes == own_bytes


def test_a_coded_cache_is_copied_for_prompts_of_a_captured_step_or_read_in_place() -> None:
    kv = PagedKV(1, 1000, 1, 4, torch.int8, CPU)
    runner_of = partial(Runner, FakeModel(), kv, CPU, 4, 15_984, VOCAB_SIZE, 2048)
    assert runner_of(deterministic=True).mixed_steps is None, "it reads codes in place"
    steps = runner_of().mixed_steps
    assert steps is not None
    none = np.empty(0, np.int64)
    for length, shape in ((COPIED_TOKENS, (64, 0, True)), (COPIED_TOKENS + 1, None)):
        told = np.array([length], np.int64)
        inputs = MixedInputs(np.zeros(9, np.int64), none, none, none, told, np.array([0, 9]), none, 0)
        found = steps.shape_of(replace(inputs, rows=np.zeros(1, np.int64)))
        assert (found and (found.num_rows, found.num_decode, found.is_long)) == shape


def test_what_a_replay_leaves_is_overwritten_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, sequences and tiles of a larger step are padding in a smaller one of the same shape."""
    captures = 0

    class Counting(FakeGraphPool):
        def capture(self, run: Callable[[], Tensor], *, is_known: bool = False) -> FakeCaptured:
            nonlocal captures
            captures += 1
            return super().capture(run)

    engine = fake_engine(captured=True, max_batch_tokens=64)
    assert engine.runner.graphs is not None
    monkeypatch.setattr(engine.runner.graphs, "_pool", Counting())
    monkeypatch.setattr(devices, "GraphPool", None)
    for number, lengths in enumerate(((20, 20, 20), (50,), (1, 2), (64,), (9, 9))):
        submits = [
            Submit(10 * number + i, [number, i] + [7] * length, Sampling(1, seed=i, ignore_eos=True))
            for i, length in enumerate(lengths)
        ]
        for submit in submits:
            engine.add(submit)
        client = Client().run(engine)
        for submit in submits:
            assert client.answers[submit.id] == expected_answer(submit, MAX_CONTEXT_TOKENS)[0]
    assert captures <= 2


@pytest.mark.parametrize("max_requests", [5, 6])
def test_what_kernels_read_begins_where_they_are_compiled_for(max_requests: int) -> None:
    model = FakeModel()
    fake_engine(model=model, captured=True, max_batch_requests=max_requests)
    batch = model.batches[0]
    assert batch.tiles is not None
    for tensor in (batch.token_ids, batch.positions, batch.slots, batch.logit_rows, batch.logit_slots):
        assert tensor is not None
        assert tensor.data_ptr() % 16 == 0
