"""Any mix of requests, aborts and room gives every request the answer that it would get alone."""

from collections.abc import Sequence

import pytest
from fake_model import VOCAB_SIZE, Client, expected_answer, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from service.messages import Sampling, Submit

tokens = st.integers(0, VOCAB_SIZE - 1)
SHARED = [3, 1, 4, 1, 5, 9, 2, 6] * 10  # prompts start with parts of it, so prefixes meet


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        max_tokens=draw(st.integers(0, 24)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        sample_index=draw(st.integers(0, 3)),
        min_tokens=draw(st.integers(0, 3)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        logprobs=draw(st.sampled_from([-1, -1, 2])),
        prompt_logprobs=draw(st.sampled_from([-1, -1, -1, 1])),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    shared = SHARED[: draw(st.integers(0, len(SHARED)))]
    return [*shared, *draw(st.lists(tokens, min_size=not shared, max_size=20))]


@st.composite
def events(draw: st.DrawFn) -> list[tuple[str, int] | Submit]:
    made: list[tuple[str, int] | Submit] = []
    for request_id in range(draw(st.integers(1, 9))):
        salt = draw(st.sampled_from([b"", b"", b"other"]))
        made.append(Submit(request_id, draw(prompts()), draw(samplings()), salt))
        made.append(("step", draw(st.integers(0, 6))))
        if draw(st.integers(0, 5)) == 0:
            made.append(("abort", draw(st.integers(0, request_id))))
    return made


def play(engine_events: Sequence[tuple[str, int] | Submit], **limits: int | bool) -> Client:
    """Runs the events to the end -> what came out."""
    engine = fake_engine(**limits)  # type: ignore[arg-type]
    client = Client()
    for event in engine_events:
        if isinstance(event, Submit):
            engine.add(event)
        elif event[0] == "abort":
            engine.abort([event[1]])
        else:
            for _ in range(event[1]):
                client.take(engine.step())
        engine.check()
    client.run(engine)
    assert engine.cache.num_held == 0, "blocks outlive their requests"
    return client


@settings(max_examples=60, deadline=None)
@given(
    events(),
    st.integers(3, 16),
    st.integers(1, 6),
    st.integers(0, 40),
    st.booleans(),
    st.integers(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_each_request_is_answered_once_and_as_if_alone(
    made: list[tuple[str, int] | Submit],
    num_blocks: int,
    requests: int,
    more_tokens: int,
    prefix_cache: bool,
    depth: int,
    captured: bool,
    deterministic: bool,
) -> None:
    client = play(
        made,
        num_blocks=num_blocks,
        max_batch_requests=requests,
        max_batch_tokens=requests + more_tokens,
        prefix_cache=prefix_cache,
        depth=depth,
        captured=captured,
        deterministic=deterministic,
    )
    assert not (deterministic and client.num_preemptions)
    room = (num_blocks - 1) * 16
    submits = [event for event in made if isinstance(event, Submit)]
    assert set(client.endings) == {submit.id for submit in submits}
    for submit in submits:
        ending, answer = client.endings[submit.id], client.answers[submit.id]
        wanted, reason = expected_answer(submit, room)
        if ending.finish_reason == "error":
            assert len(submit.prompt) + (submit.sampling.max_tokens > 0) > room
        elif ending.finish_reason == "abort":
            assert ("abort", submit.id) in made
            assert answer == wanted[: len(answer)]
        else:
            assert (answer, ending.finish_reason) == (wanted, reason)
    told = [phases for step in client.steps for phases in step.stats.ended_phase_seconds]
    accepted = [id for id, ending in client.endings.items() if ending.finish_reason != "error"]
    decoded = [
        id for id in accepted if len(client.answers[id]) > (client.endings[id].finish_reason != "abort")
    ]
    assert len(told) == len(accepted)
    assert [len(phases) for phases in told].count(3) == len(decoded)
    assert all(1 <= len(phases) <= 3 and min(phases) >= 0 for phases in told)


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_changes_no_answer(depth: int) -> None:
    """Six growing answers over room for three: blocks run out again and again."""
    submits = [
        Submit(i, [i + 1, 2, 3], Sampling(60, temperature=i % 2, seed=i, ignore_eos=True, logprobs=1))
        for i in range(6)
    ]
    client = play(submits, num_blocks=12, prefix_cache=False, depth=depth)
    assert client.num_preemptions > 3
    for submit in submits:
        assert client.answers[submit.id] == expected_answer(submit, 10_000)[0]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_prompt_score_is_told_once_and_whole(depth: int) -> None:
    """The scored request is the newest, so growth of the others throws it out in the middle of its prompt."""
    growing = [Submit(i, [i + 1], Sampling(90, temperature=0, ignore_eos=True)) for i in range(2)]
    scored = Submit(9, SHARED[:70], Sampling(4, temperature=0, ignore_eos=True, prompt_logprobs=0))
    made = [*growing, ("step", 12), scored]
    client = play(made, num_blocks=10, max_batch_tokens=4, max_batch_requests=3, depth=depth)
    assert client.num_preemptions > 0
    scores = client.firsts[9].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert [score.token_id for score in scores[1:] if score] == SHARED[1:70]
    assert client.answers[9] == expected_answer(scored, 10_000)[0]
