"""The same seed asks the same, at the same times."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.workload import DEFAULT_PROMPTS, Prompts, Workload, poisson_arrivals


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.load(DEFAULT_PROMPTS)


def bodies(workload: Workload, count: int = 70) -> list[bytes]:
    return [workload.body(index) for index in range(count)]


def test_our_prompts_are_many_and_distinct(prompts: Prompts) -> None:
    assert len(set(prompts.texts)) == len(prompts.texts) >= 64
    assert len(prompts.sha256) == 64


@pytest.mark.parametrize("input_tokens", [0, 12])
def test_a_seed_fixes_every_body(prompts: Prompts, input_tokens: int) -> None:
    def workload(seed: int) -> Workload:
        return Workload("m", prompts.texts, 8, seed=seed, input_tokens=input_tokens, vocab_size=100)

    assert bodies(workload(3)) == bodies(workload(3))
    assert bodies(workload(3)) != bodies(workload(4))


def test_no_request_starts_like_another(prompts: Prompts) -> None:
    """A shared first block would be served from the prefix cache and time nothing."""
    starts = {str(Workload("m", prompts.texts, 8).prompt(index)).partition(" ")[0] for index in range(200)}
    assert len(starts) == 200


def test_every_prompt_comes_once_a_turn(prompts: Prompts) -> None:
    workload = Workload("m", prompts.texts, 8)
    turn = {str(workload.prompt(index)).partition(" ")[2] for index in range(len(prompts.texts))}
    assert turn == set(prompts.texts)


def test_body_is_what_a_server_understands(prompts: Prompts) -> None:
    body = json.loads(Workload("m", prompts.texts, 8, continuous_usage=True).body(0))
    assert body["max_tokens"] == 8
    assert body["temperature"] == 0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    chat = json.loads(Workload("m", prompts.texts, 8, endpoint="chat", ignore_eos=False).body(0))
    assert chat["messages"][0]["role"] == "user"
    assert "ignore_eos" not in chat
    assert chat["stream_options"] == {"include_usage": True}


@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 99))
def test_random_prompts_have_as_many_ids_as_asked_all_in_the_vocabulary(
    vocab_size: int, input_tokens: int, index: int
) -> None:
    prompt = Workload("m", (), 8, input_tokens=input_tokens, vocab_size=vocab_size).prompt(index)
    assert len(prompt) == input_tokens
    assert all(isinstance(id, int) and 0 <= id < vocab_size for id in prompt)


def test_arrivals_are_poisson_seeded_and_scale_with_the_rate() -> None:
    slow, fast = poisson_arrivals(4000, 2.0, seed=1), poisson_arrivals(4000, 8.0, seed=1)
    assert slow == poisson_arrivals(4000, 2.0, seed=1)
    assert slow != poisson_arrivals(4000, 2.0, seed=2)
    assert fast == pytest.approx([due_s / 4 for due_s in slow])
    gaps = [b - a for a, b in pairwise(slow)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.5, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)  # an exponential's standard deviation is its mean


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', '{"prompt": ""}', "[1]"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        Prompts.load(path)
