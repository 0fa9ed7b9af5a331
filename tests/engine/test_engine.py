"""The loop by example: finish reasons, refusals, faults, prefixes, fairness, figures."""

import math

import fake_model
import pytest
import torch
from fake_model import UNSAID, VOCAB_SIZE, Client, FakeModel, expected_answer, fake_engine, prefix_logits

from service.engine import request
from service.messages import (
    BAD_TOKEN,
    EMPTY_PROMPT,
    MODEL_ERROR,
    NO_MEMORY,
    STEP_ERROR,
    TOO_LONG,
    Sampling,
    Submit,
)

GREEDY = Sampling(8, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True, params=[0, 1], ids=["in turn", "ahead"])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The whole file is true of an engine that runs one step ahead of its results too."""
    monkeypatch.setattr(fake_model, "DEPTH", request.param)
    return int(request.param)


def prompt(num_tokens: int, start: int = 1) -> list[int]:
    return [(start + i * i) % (VOCAB_SIZE - 3) for i in range(num_tokens)]


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens, temperature=0, ignore_eos=True)


def test_max_tokens_ends_with_length() -> None:
    engine = fake_engine()
    engine.add(Submit(1, prompt(5), GREEDY))
    client = Client().run(engine)
    assert client.endings[1].finish_reason == "length"
    assert client.answers[1] == expected_answer(Submit(1, prompt(5), GREEDY), 1000)[0]
    assert len(client.answers[1]) == 8


def test_a_stop_id_is_the_last_token() -> None:
    wanted = expected_answer(Submit(1, prompt(5), greedy(30)), 1000)[0]
    stop = wanted[7]
    engine = fake_engine()
    engine.add(Submit(1, prompt(5), Sampling(30, temperature=0, ignore_eos=True, stop_token_ids=(stop,))))
    client = Client().run(engine)
    assert client.endings[1].finish_reason == "stop"
    assert client.answers[1] == wanted[: wanted.index(stop) + 1]


@pytest.mark.parametrize(("ignore_eos", "reason"), [(False, "stop"), (True, "length")])
def test_eos_ends_unless_ignored(ignore_eos: bool, reason: str) -> None:
    first = expected_answer(Submit(1, prompt(5), greedy(1)), 1000)[0][0]
    engine = fake_engine(eos=first)
    engine.add(Submit(1, prompt(5), Sampling(3, temperature=0, ignore_eos=ignore_eos)))
    assert Client().run(engine).endings[1].finish_reason == reason


def test_min_tokens_holds_the_stop_back() -> None:
    first = expected_answer(Submit(1, prompt(5), greedy(1)), 1000)[0][0]
    engine = fake_engine(eos=first)
    engine.add(Submit(1, prompt(5), Sampling(3, temperature=0, min_tokens=2)))
    answer = Client().run(engine).answers[1]
    assert len(answer) >= 2
    assert first not in answer[:2]


def test_the_context_limit_ends_with_length() -> None:
    engine = fake_engine(max_context_tokens=20)
    engine.add(Submit(1, prompt(15), greedy(100)))
    client = Client().run(engine)
    assert len(client.answers[1]) == 5
    assert client.endings[1].finish_reason == "length"


def test_a_request_that_fills_the_cache_alone_is_served() -> None:
    engine = fake_engine(num_blocks=4)
    engine.add(Submit(1, prompt(47), greedy(5)))
    assert len(Client().run(engine).answers[1]) == 1


@pytest.mark.parametrize(
    ("token_ids", "error"),
    [
        ([], EMPTY_PROMPT),
        (prompt(48), TOO_LONG),
        ([1, VOCAB_SIZE + 1], BAD_TOKEN),
        ([-1], BAD_TOKEN),
        ([2**63], BAD_TOKEN),
    ],
    ids=["empty", "long", "large id", "negative id", "64-bit id"],
)
def test_what_can_never_run_is_refused_at_once(token_ids: list[int], error: str) -> None:
    engine = fake_engine(num_blocks=4)
    engine.add(Submit(1, token_ids, GREEDY))
    [output] = engine.step().outputs
    assert (output.finish_reason, output.error, output.token_ids) == ("error", error, [])
    assert not engine.has_work


def test_an_abort_ends_waiting_and_running_once() -> None:
    engine = fake_engine(max_batch_requests=1)
    client = Client()
    for request_id in (1, 2):
        engine.add(Submit(request_id, prompt(5), greedy(50)))
    client.take(engine.step())
    engine.abort([1, 2, 3])
    engine.abort([1])
    client.run(engine)
    assert {i: output.finish_reason for i, output in client.endings.items()} == {1: "abort", 2: "abort"}
    assert engine.cache.num_held == 0


def test_scoring_gives_each_prompt_token_its_logprob() -> None:
    """`max_tokens` 0 and chunks smaller than the prompt; nothing is drawn."""
    engine = fake_engine(max_batch_tokens=8)
    text = prompt(37)
    for request_id in (1, 2):  # the second must not skip what the first left in the cache
        engine.add(Submit(request_id, text, Sampling(0, prompt_logprobs=3)))
        client = Client().run(engine)
        output = client.endings[request_id]
        assert (output.finish_reason, output.token_ids, output.cached_tokens) == ("length", [], 0)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == 37
        for position, entry in enumerate(output.prompt_logprobs[1:], 1):
            logprobs = prefix_logits(text[:position]).log_softmax(-1)
            assert entry is not None
            assert entry.token_id == text[position]
            assert math.isclose(entry.logprob, logprobs[text[position]], rel_tol=1e-6)
            assert entry.rank == 1 + (logprobs > logprobs[text[position]]).sum()
            assert entry.top_ids == logprobs.topk(3).indices.tolist()


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    """Temperature, filters and withheld stops move the draw, not what is told about it."""
    sampling = Sampling(6, temperature=0.3, top_k=2, seed=5, min_tokens=6, logprobs=1)
    engine = fake_engine()
    engine.add(Submit(1, prompt(9), sampling))
    text, outputs = prompt(9), []
    while engine.has_work:
        outputs += engine.step().outputs
    for output in outputs:
        logprobs = prefix_logits(text).log_softmax(-1)
        assert output.logprobs is not None
        [entry] = output.logprobs
        assert entry.token_id == output.token_ids[0]
        assert math.isclose(entry.logprob, logprobs[entry.token_id], rel_tol=1e-6)
        assert math.isclose(entry.top_logprobs[0], logprobs.max(), rel_tol=1e-6)
        text += output.token_ids


@pytest.mark.parametrize(
    ("fault", "error"), [(RuntimeError("poisoned"), STEP_ERROR), (torch.OutOfMemoryError(), NO_MEMORY)]
)
def test_an_exception_takes_only_the_guilty_request(fault: Exception, error: str) -> None:
    engine = fake_engine(model=FakeModel(poison=UNSAID, fault=fault))
    submits = [Submit(i, prompt(20, i), greedy(12)) for i in range(4)]
    for submit in submits:
        engine.add(submit)
    engine.add(Submit(9, [*prompt(18), UNSAID], GREEDY))
    client = Client().run(engine)
    assert (client.endings[9].finish_reason, client.endings[9].error) == ("error", error)
    for submit in submits:
        assert client.endings[submit.id].finish_reason == "length"
        assert client.answers[submit.id] == expected_answer(submit, 1000)[0]


def test_broken_numbers_end_one_request_and_are_never_reused() -> None:
    """NaN gives an error, not a token; its K and V, full blocks of it too, are not found by the next one."""
    model = FakeModel(broken=UNSAID)
    engine = fake_engine(model=model)
    engine.add(Submit(1, [UNSAID, *prompt(40)], GREEDY))
    engine.add(Submit(2, prompt(40), greedy(2)))
    client = Client().run(engine)
    assert (client.endings[1].finish_reason, client.endings[1].error) == ("error", MODEL_ERROR)
    assert client.answers[1] == []
    assert client.endings[2].finish_reason == "length"
    engine.add(Submit(3, [UNSAID, *prompt(40)], GREEDY))
    assert Client().run(engine).endings[3].finish_reason == "error"
    assert 41 in [len(batch.token_ids) for batch in model.batches[-2:]]


def test_a_repeated_prefix_computes_one_block_and_its_tail() -> None:
    model = FakeModel()
    engine = fake_engine(num_blocks=100, max_batch_tokens=1024, model=model)
    for request_id, tail in ((1, 0), (2, 0), (3, 9)):
        engine.add(Submit(request_id, prompt(512) + [5] * tail, greedy(1)))
        client = Client().run(engine)
        computed = 512 + tail - client.firsts[request_id].cached_tokens
        assert len(model.batches[-1].token_ids) == computed
        assert computed == {1: 512, 2: 16, 3: 9}[request_id]


@pytest.mark.parametrize("num_tokens", [28, 29, 30])  # 47, 48 and 49 tokens are computed, the last is not
def test_the_next_turn_of_a_chat_finds_the_answer(num_tokens: int) -> None:
    engine = fake_engine()
    engine.add(Submit(1, prompt(20), greedy(num_tokens)))
    answer = Client().run(engine).answers[1]
    engine.add(Submit(2, [*prompt(20), *answer, 5, 6], greedy(1)))
    assert Client().run(engine).firsts[2].cached_tokens == (32 if num_tokens == 28 else 48)


def test_answers_to_one_prompt_compute_it_once() -> None:
    """`n` submits of the same prompt at the same time: the others wait a step and share."""
    engine = fake_engine(num_blocks=100, max_batch_tokens=1024)
    for index in range(4):
        engine.add(Submit(index, prompt(160), Sampling(3, seed=1, sample_index=index, ignore_eos=True)))
    client = Client().run(engine)
    assert sum(step.stats.num_prefill_tokens for step in client.steps) == 160 + 3 * 16
    assert sum(step.stats.num_cached_tokens for step in client.steps) == 3 * 144


def test_a_salt_keeps_prefixes_apart() -> None:
    engine = fake_engine()
    for request_id, salt in enumerate([b"a", b"b", b"a"]):
        engine.add(Submit(request_id, prompt(40), greedy(1), salt))
        assert Client().run(engine).firsts[request_id].cached_tokens == (32 if request_id == 2 else 0)


def test_a_short_request_after_a_long_one_ends_first() -> None:
    engine = fake_engine(num_blocks=200, max_batch_tokens=32)
    engine.add(Submit(1, prompt(1600), greedy(2)))
    client = Client()
    for _ in range(3):
        client.take(engine.step())
    engine.add(Submit(2, prompt(20, 7), greedy(4)))
    client.run(engine)
    assert client.order == [2, 1]


def test_what_the_oldest_leaves_goes_to_the_shortest() -> None:
    engine = fake_engine(num_blocks=300, max_batch_tokens=32)
    for request_id, num_tokens in enumerate([1600, 800, 60]):
        engine.add(Submit(request_id, prompt(num_tokens, request_id), greedy(1)))
    client = Client()
    for _ in range(4):
        client.take(engine.step())
    assert client.order == [2]
    assert client.run(engine).order == [2, 1, 0]


def test_a_stream_of_short_requests_cannot_starve_a_long_one() -> None:
    """With two new short prompts before each step, 320 tokens still pass in 320 / (budget / 2) steps."""
    engine = fake_engine(num_blocks=200, max_batch_tokens=32, max_batch_requests=4)
    client = Client()
    engine.add(Submit(0, prompt(320), greedy(1)))
    for step in range(1, 22):
        for index in (0, 1):
            engine.add(Submit(2 * step + index, prompt(20, step), greedy(1)))
        client.take(engine.step())
    assert 0 in client.endings


def test_a_crowd_is_served_in_larger_steps_until_it_is_none() -> None:
    """Prompts for more than 48 steps, of at least half as many requests as decode."""
    engine = fake_engine(num_blocks=400, max_batch_tokens=16, max_batch_requests=16, crowd_batch_tokens=64)
    for index in range(16):
        engine.add(Submit(index, prompt(64, index), Sampling(40, ignore_eos=True)))
    client = Client().run(engine)
    steps = [step.stats for step in client.steps if step.stats.num_prefill_tokens]
    sizes = [stats.num_prefill_tokens + stats.num_decode_tokens for stats in steps]
    num_large = sizes.count(64)
    assert sizes[:num_large] == [64] * num_large
    assert set(sizes[num_large:-1]) == {16}
    queued = 16 * 64 - sum(stats.num_prefill_tokens for stats in steps[:num_large])
    assert 48 * 16 - 64 < queued <= 48 * 16 + 2 * 64  # a step, and two prompts that wait no more
    assert len(client.endings) == 16


def test_steps_are_shorter_while_few_decode() -> None:
    """Up to an eighth of a step's tokens; nobody waits for a step without any."""
    engine = fake_engine(num_blocks=400, max_batch_tokens=64, max_batch_requests=16, few_batch_tokens=32)
    client = Client()
    for index in range(12):
        engine.add(Submit(index, prompt(100, index), Sampling(60, ignore_eos=True)))
    sizes: dict[int, set[int]] = {}
    for step in client.run(engine).steps:
        if step.stats.num_prefill_tokens:
            decoding = step.stats.num_decode_tokens
            sizes.setdefault(decoding, set()).add(decoding + step.stats.num_prefill_tokens)
    assert set(sizes) >= {0, 8, 9}
    for decoding, found in sizes.items():
        assert max(found) == (32 if 0 < decoding <= 8 else 64) or decoding == max(sizes)


def test_no_crowd_where_many_decode() -> None:
    engine = fake_engine(num_blocks=400, max_batch_tokens=16, max_batch_requests=16, crowd_batch_tokens=64)
    client = Client()
    for index in range(8):
        engine.add(Submit(index, prompt(2, index), Sampling(60, ignore_eos=True)))
    for _ in range(3):
        client.take(engine.step())
    for index in range(8, 11):
        engine.add(Submit(index, prompt(300, index), Sampling(1, ignore_eos=True)))
    for step in client.run(engine).steps:
        assert step.stats.num_prefill_tokens + step.stats.num_decode_tokens <= 16


def test_a_large_prompt_gets_its_turn_when_blocks_are_short() -> None:
    """While the oldest waits for room, later ones that would fit do not pass it."""
    engine = fake_engine(num_blocks=12, max_batch_tokens=64, max_batch_requests=4)
    client = Client()
    engine.add(Submit(0, prompt(20, 3), greedy(40)))
    client.take(engine.step())
    engine.add(Submit(1, prompt(150), greedy(1)))
    for request_id in range(2, 40):
        engine.add(Submit(request_id, prompt(20, request_id), greedy(5)))
    client.run(engine)
    assert client.order.index(1) < 3


def test_figures_add_up(depth: int) -> None:
    engine = fake_engine()
    for request_id in range(3):
        engine.add(Submit(request_id, prompt(33, request_id), greedy(5)))
    client = Client().run(engine)
    stats = [step.stats for step in client.steps]
    assert sum(s.num_prefill_tokens + s.num_decode_tokens for s in stats) == 3 * (33 + 4)
    assert stats[0].num_running == 2 + depth
    assert stats[0].num_waiting == 1 - depth
    assert stats[-1].kv_used_tokens == 0
    assert stats[-1].kv_cached_tokens == 3 * 32
    assert all(s.step_seconds > 0 for s in stats)
    assert engine.heartbeat().stats.step_seconds == 0


class Clock:
    """Stands for the module `time`: it is as late as the test says."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(request, "time", clock)
    return clock


def test_seconds_in_each_phase_are_told_once_at_the_end(clock: Clock) -> None:
    """A second before each step. The first has two steps of prompt and two of answer, the second two of
    prompt, the third is given up in the queue."""
    engine = fake_engine(max_batch_tokens=20, max_batch_requests=1)
    engine.add(Submit(1, prompt(33), greedy(3)))
    engine.add(Submit(2, prompt(33, 5), greedy(1)))
    engine.add(Submit(3, prompt(5), greedy(1)))
    told = []
    for step in range(6):
        clock.now += 1
        if step == 5:
            engine.abort([3])
        told.append(engine.step().stats.ended_phase_seconds)
    assert told == [[], [], [], [[1, 1, 2]], [], [[6], [5, 1]]]
    assert engine.heartbeat().stats.ended_phase_seconds == []
