"""Penalties and bias against a definition in plain Python; rows on their own; requests that come and go."""

import pytest
import torch
from fake_model import VOCAB_SIZE, Client, fake_engine, prefix_logits, sampling_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.penalties import MAX_BIASES, Penalties
from service.engine.request import Request
from service.engine.sampler import BAD_ROW, draw
from service.kernels.shape_logits import GENERATED, IN_PROMPT
from service.messages import Sampling, Submit

VOCAB = 12
CPU = torch.device("cpu")


def by_definition(
    logits: list[float], prompt: list[int], answer: list[int], sampling: Sampling
) -> list[float]:
    """Token by token, as the API's documentation reads."""
    new = []
    for token, logit in enumerate(logits):
        if token in prompt or token in answer:
            rate = sampling.repetition_penalty
            logit = logit / rate if logit > 0 else logit * rate
        logit -= sampling.frequency_penalty * answer.count(token)
        logit -= sampling.presence_penalty * (token in answer)
        new.append(logit + sampling.logit_bias.get(token, 0.0))
    return new


def seated(penalties: Penalties, row: int, prompt: list[int], answer: list[int], sampling: Sampling) -> None:
    request = Request(Submit(row, prompt, sampling), row, frozenset(), 100)
    request.tokens += answer
    request.row = row
    penalties.seat(request)


def shaped(penalties: Penalties, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    new = logits.clone()
    penalties.shape(new, torch.tensor(rows, dtype=torch.int32))
    return new


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=20)
samplings = st.builds(
    Sampling,
    max_tokens=st.just(1),
    presence_penalty=st.floats(-2, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    repetition_penalty=st.floats(0.125, 10, width=32),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32)),
)
NEUTRAL = Sampling(1)
rows_of_logits = st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB)


@settings(max_examples=60)
@given(st.lists(st.tuples(rows_of_logits, tokens, tokens, samplings), min_size=1, max_size=4))
def test_agrees_with_the_definition_in_any_company(
    requests: list[tuple[list[float], list[int], list[int], Sampling]],
) -> None:
    penalties = Penalties(len(requests) + 2, VOCAB, CPU)
    for row, (_, prompt, answer, sampling) in enumerate(requests):
        seated(penalties, row, prompt, answer, sampling)
    logits = torch.tensor([logits for logits, *_ in requests])
    together = shaped(penalties, logits, list(range(len(requests))))
    for row, (given_logits, prompt, answer, sampling) in enumerate(requests):
        alone = shaped(penalties, logits[row : row + 1], [row])
        assert torch.equal(alone[0], together[row])
        wanted = torch.tensor(by_definition(given_logits, prompt, answer, sampling))
        assert torch.allclose(together[row], wanted, rtol=1e-6, atol=1e-4)


@given(rows_of_logits, tokens, samplings)
def test_who_asks_for_nothing_keeps_his_logits(
    logits: list[float], answer: list[int], sampling: Sampling
) -> None:
    penalties = Penalties(2, VOCAB, CPU)
    seated(penalties, 0, [1], answer, sampling)
    seated(penalties, 0, [1, 2], answer, NEUTRAL)  # a new tenant of the row
    seated(penalties, 1, [1], answer, sampling)
    row = torch.tensor([logits, logits])
    assert torch.equal(shaped(penalties, row, [0, 1])[0], row[0])
    assert penalties.asking.tolist() == [False, sampling.shapes_logits]


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), tokens, tokens)
def test_recording_is_seating_with_longer_answers(
    drawn: list[int], prompt: list[int], first: list[int]
) -> None:
    """A request that lost its row is seated again with all its tokens, and goes on as if it had not."""
    sampling = Sampling(1, frequency_penalty=0.5)
    penalties = Penalties(4, VOCAB, CPU)
    seated(penalties, 2, prompt, first, sampling)
    for token in drawn:
        penalties.record(torch.tensor([2, 0], dtype=torch.int32), torch.tensor([token, BAD_ROW]))
    recorded = penalties.occurrences[2].clone()
    seated(penalties, 2, prompt, first + drawn, sampling)
    assert torch.equal(penalties.occurrences[2], recorded)
    assert recorded.tolist() == [
        IN_PROMPT * (token in prompt) + GENERATED * (first + drawn).count(token) for token in range(VOCAB)
    ]
    assert not penalties.occurrences[[0, 1, 3]].any()


def test_broken_logits_stay_broken() -> None:
    penalties = Penalties(1, VOCAB, CPU)
    seated(
        penalties, 0, [1], [2, 2], Sampling(1, presence_penalty=2, repetition_penalty=2, logit_bias={3: 5})
    )
    for broken in (float("nan"), float("inf"), -float("inf")):
        logits = torch.zeros(1, VOCAB)
        logits[0, 2] = broken
        assert not shaped(penalties, logits, [0])[0, 2].isfinite()


def test_as_many_biases_as_the_api_takes() -> None:
    penalties = Penalties(1, 1000, CPU)
    biases = {token: token / 10 for token in range(500, 500 + MAX_BIASES)}
    seated(penalties, 0, [1], [], Sampling(1, logit_bias=biases))
    got = shaped(penalties, torch.zeros(1, 1000), [0])[0]
    assert got.count_nonzero() == MAX_BIASES
    assert got[700] == 70
    assert got[0] == 0


def expected(submit: Submit) -> list[int]:
    """The answer, computed without scheduler, cache, batch or tables."""
    sampling, answer = submit.sampling, list[int]()
    while len(answer) < sampling.max_tokens:
        seen = submit.prompt + answer
        new = by_definition(prefix_logits(seen).tolist(), submit.prompt, answer, sampling)
        answer.append(int(draw(torch.tensor([new]), sampling_rows(sampling, len(seen)))))
    return answer


shaping = st.builds(
    Sampling,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 2**63),
    ignore_eos=st.just(True),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.75, -2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 2.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {5: 100.0}, {2: -100.0, 7: 1.5, 28: -3.0}]),
)
prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(prompts, shaping), min_size=1, max_size=8),
    st.integers(6, 16),
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(0, 1),
    st.booleans(),
)
def test_answers_are_as_if_alone(
    asked: list[tuple[list[int], Sampling]],
    num_blocks: int,
    requests: int,
    more_tokens: int,
    depth: int,
    captured: bool,
) -> None:
    """Rows change tenants, requests lose theirs and come back, and neighbours ask for nothing."""
    engine = fake_engine(num_blocks, requests + more_tokens, requests, depth=depth, captured=captured)
    submits = [Submit(number, *request) for number, request in enumerate(asked)]
    for submit in submits:
        engine.add(submit)
    client = Client().run(engine)
    for submit in submits:
        assert client.answers[submit.id] == expected(submit)


def test_preempted_requests_remember_what_they_said() -> None:
    penalised = Sampling(60, temperature=0, ignore_eos=True, frequency_penalty=1.0, repetition_penalty=1.5)
    submits = [Submit(number, [number + 1, 2, 3], penalised) for number in range(6)]
    engine = fake_engine(12, prefix_cache=False)
    for submit in submits:
        engine.add(submit)
    client = Client().run(engine)
    assert client.num_preemptions > 3
    for submit in submits:
        assert client.answers[submit.id] == expected(submit)


def test_a_failed_step_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may fail behind the draw: its requests are run again, each alone, and draw again."""
    sampling = Sampling(12, temperature=0, ignore_eos=True, frequency_penalty=2.0)
    submits = [Submit(number, [number + 1, 2, 3], sampling) for number in range(3)]
    engine = fake_engine()
    for submit in submits:
        engine.add(submit)
    record, steps = engine.runner.penalties.record, 0

    def fail_once(rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        nonlocal steps
        record(rows, token_ids)
        steps += 1
        if steps == 5:
            raise RuntimeError("behind the draw")

    monkeypatch.setattr(engine.runner.penalties, "record", fail_once)
    client = Client().run(engine)
    assert steps > 5
    for submit in submits:
        assert client.answers[submit.id] == expected(submit)


def test_log_probabilities_are_told_of_the_models_own_logits() -> None:
    biased = Sampling(1, temperature=0, ignore_eos=True, logprobs=0, logit_bias={4: 100.0})
    engine = fake_engine()
    engine.add(Submit(0, [1, 2, 3], biased))
    client = Client().run(engine)
    assert client.answers[0] == [4]
    told = client.endings[0].logprobs
    assert told is not None
    assert told[0].logprob == pytest.approx(float(prefix_logits([1, 2, 3]).log_softmax(-1)[4]), abs=1e-6)
