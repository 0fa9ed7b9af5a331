"""Steps launched before the results of the one before are read, and steps replayed instead of run."""

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import pytest
import torch
from fake_model import (
    CPU,
    UNSAID,
    Client,
    FakeCaptured,
    FakeGraphPool,
    FakeModel,
    expected_answer,
    fake_engine,
)
from torch import Tensor

from service import device as devices
from service.engine.graphs import batch_sizes
from service.engine.state import LAST_TOKEN, LENGTH, DeviceState
from service.errors import DeviceError
from service.messages import Sampling, Submit


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens, temperature=0, ignore_eos=True)


def test_the_next_step_is_launched_before_the_first_is_read() -> None:
    model = FakeModel()
    engine = fake_engine(model=model, depth=1)
    engine.add(Submit(1, [3, 1, 4], greedy(9)))
    assert engine.step().outputs[0].token_ids == expected_answer(Submit(1, [3, 1, 4], greedy(9)), 99)[0][:1]
    assert [len(batch.token_ids) for batch in model.batches] == [3, 1]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_only_an_end_that_nobody_foresaw_leaves_a_surplus_row(depth: int, captured: bool) -> None:
    """The end by `max_tokens` is known before the last token is; a stop token is not."""
    text = expected_answer(Submit(1, [3, 1, 4], greedy(30)), 99)[0]
    stop = text[7]
    stopped = Sampling(30, temperature=0, ignore_eos=True, stop_token_ids=(stop,))
    for sampling, num_surplus in ((greedy(12), 0), (stopped, depth)):
        model = FakeModel()
        engine = fake_engine(model=model, depth=depth, captured=captured)
        for number in (0, 1):  # the first has a step captured
            before, surplus_before = len(model.batches), engine.num_surplus_chunks
            engine.add(Submit(number, [3, 1, 4], sampling))
            client = Client().run(engine)
        assert engine.num_surplus_chunks - surplus_before == num_surplus
        assert len(model.batches) - before == len(client.answers[1]) + num_surplus
        assert not engine.has_work
        assert engine.cache.num_held == 0


@pytest.mark.parametrize("captured", [False, True])
def test_an_aborted_row_may_have_a_new_tenant_at_once(captured: bool) -> None:
    """The step on its way still has the old one in it."""
    engine = fake_engine(max_batch_requests=1, num_blocks=3, depth=1, captured=captured)
    engine.add(Submit(1, [3, 1, 4], greedy(20)))
    client = Client()
    for _ in range(4):
        client.take(engine.step())
    engine.abort([1])
    newcomer = Submit(2, [2, 7, 1, 8], Sampling(20, seed=5, ignore_eos=True))
    engine.add(newcomer)
    client.run(engine)
    assert client.answers[2] == expected_answer(newcomer, 32)[0]
    assert engine.num_surplus_chunks == 1


def test_a_broken_row_is_told_though_the_next_step_has_it_too() -> None:
    engine = fake_engine(model=FakeModel(broken=UNSAID), depth=1, captured=True)
    engine.add(Submit(1, [UNSAID, 5], greedy(9)))
    good = Submit(2, [4, 4], greedy(9))
    engine.add(good)
    client = Client().run(engine)
    assert client.endings[1].finish_reason == "error"
    assert client.answers[2] == expected_answer(good, 99)[0]


def test_log_probabilities_and_held_back_stops_come_with_steps_ahead() -> None:
    """Steps that no graph serves, between steps that one serves."""
    asking = Submit(1, [3, 1, 4], Sampling(12, seed=3, top_k=4, min_tokens=6, logprobs=2))
    plain = Submit(2, [1, 5], greedy(30))
    together, alone = fake_engine(depth=1, captured=True), fake_engine(depth=0)
    answers = []
    for engine, submits in ((together, (asking, plain)), (alone, (asking,))):
        for submit in submits:
            engine.add(submit)
        client = Client().run(engine)
        told = [output.logprobs for step in client.steps for output in step.outputs if output.id == 1]
        answers.append((client.answers[1], told))
    assert answers[0] == answers[1]
    assert answers[0][0] == expected_answer(asking, 999)[0]


@pytest.mark.parametrize("captured", [False, True])
def test_a_steady_decode_uploads_nothing(captured: bool) -> None:
    """Only a new block, a new tenant or another set of rows crosses to the device, and in one copy."""
    engine = fake_engine(depth=1, captured=captured)
    for request_id in range(3):
        engine.add(Submit(request_id, [request_id + 1] * 3, greedy(40)))
    for _ in range(3):
        engine.step()
    state = engine.runner.state
    uploads = []
    for _ in range(28):
        before = state.num_uploads
        engine.step()
        uploads.append(state.num_uploads - before)
    assert sum(uploads) == 2  # two borders of blocks, which all three reach together
    assert max(uploads) == 1


def test_state_reaches_the_device_word_for_word() -> None:
    state = DeviceState(4, 100, CPU)
    sampling = Sampling(1, 0.7, 5, 0.9, 0.05, seed=-(2**63) + 7, sample_index=3)
    state.seat(2, sampling)
    state.extend(2, 0, [9, 8])
    state.extend(2, 2, [7])
    state.resume(2, 33, 11)
    state.select(np.array([2, 0]), 4)
    assert state.num_uploads == 0
    state.flush()
    state.flush()
    assert state.num_uploads == 1
    assert state.tables[2].tolist() == [9, 8, 7, 0, 0, 0, 0]
    assert state.rows.tolist() == [2, 0, 4, 4, 0]
    fields = state.fields[2]
    assert fields[: LAST_TOKEN + 1].tolist() == [33, 11]
    assert fields.view(torch.int64)[3] == -(2**63) + 7
    assert fields.view(torch.float64)[4:].tolist() == [0.9, 0.05]
    assert state.slots(np.array([2, 2]), np.array([17, 32])).tolist() == [8 * 16 + 1, 7 * 16]


def test_a_step_moves_its_rows_on_and_padding_stays() -> None:
    state = DeviceState(2, 64, CPU)
    rows = torch.tensor([1, 2, 2], dtype=torch.int32)
    state.advance(rows, torch.tensor([8, 1, 1]), torch.tensor([-1, 5, 5]))
    assert state.fields[:, LENGTH].tolist() == [0, 8, 0]
    assert state.fields[1, LAST_TOKEN] == 0


def test_batch_sizes_end_at_the_limit() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(33) == [1, 2, 4, 8, 16, 24, 32, 33]


def test_before_it_is_captured_each_kernel_is_launched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw at the largest size, every forward pass under one of the draws."""
    captured = []

    class Pool(FakeGraphPool):
        def capture(self, run: Callable[[], Tensor], *, is_known: bool = False) -> FakeCaptured:
            captured.append(is_known)
            return super().capture(run)

    monkeypatch.setattr(devices, "GraphPool", Pool)
    engine = fake_engine(max_batch_requests=6)  # sizes 6, 4, 2, 1
    engine.runner.capture()
    with_prompts = False
    assert captured == [with_prompts, False, False, *[False, True] * 3]


def test_what_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def capture(self, run: Callable[[], Tensor], **_: bool) -> NoReturn:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(devices, "GraphPool", Refusing)
    with pytest.raises(DeviceError, match="step of 64 rows with prompts cannot be captured"):
        fake_engine().runner.capture()


def test_a_forward_pass_is_captured_when_a_step_first_needs_it() -> None:
    """Log-probabilities have no whole step; the second step of its size finds the graph of the first."""
    engine = fake_engine(depth=1, captured=True)
    graphs = engine.runner.graphs
    assert graphs is not None
    asking = Submit(1, [3, 1, 4], Sampling(9, seed=2, top_k=3, logprobs=1, ignore_eos=True))
    engine.add(asking)
    client = Client()
    client.take(engine.step())
    first = graphs.forward(1)
    assert client.run(engine).answers[1] == expected_answer(asking, 999)[0]
    assert graphs.forward(1) is first


def test_filters_and_temperatures_share_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs a capture in the middle of serving is left to those who ask for more than tokens."""
    engine = fake_engine(depth=1, captured=True)
    graphs = engine.runner.graphs
    assert graphs is not None
    assert graphs.step(2, "full") is graphs.step(2, "temperature")
    monkeypatch.setattr(graphs, "forward", None)
    submits = [
        Submit(1, [3, 1, 4], Sampling(9, seed=2, top_k=3, top_p=0.8, ignore_eos=True)),
        Submit(2, [1, 5], Sampling(12, seed=3, ignore_eos=True)),
        Submit(3, [9], Sampling(7, seed=4, min_p=0.1, temperature=0.6, ignore_eos=True)),
        Submit(4, [2, 7], Sampling(15, temperature=0, ignore_eos=True)),
    ]
    for submit in submits:
        engine.add(submit)
    answers = Client().run(engine).answers
    assert answers == {submit.id: expected_answer(submit, 999)[0] for submit in submits}
