"""The same seed asks the same, at the same times."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from loadtest.workload import DEFAULT_PROMPTS, Prompts, Workload, poisson_arrivals


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.load(DEFAULT_PROMPTS)


def bodies(workload: Workload, count: int = 70) -> list[bytes]:
    return [workload.body(index, ignore_eos=True, continuous_usage=True) for index in range(count)]


def test_our_prompts_are_many_and_distinct(prompts: Prompts) -> None:
    assert len(set(prompts.texts)) == len(prompts.texts) >= 64
    assert len(prompts.sha256) == 64


@pytest.mark.parametrize("prompt_tokens", [0, 12])
def test_a_seed_fixes_every_body(prompts: Prompts, prompt_tokens: int) -> None:
    def workload(seed: int) -> Workload:
        return Workload("m", prompts, 8, seed=seed, prompt_tokens=prompt_tokens, vocab_size=100)

    assert bodies(workload(3)) == bodies(workload(3))
    assert bodies(workload(3)) != bodies(workload(4))


def test_no_request_starts_like_another(prompts: Prompts) -> None:
    """A shared first block would be served from the prefix cache and time nothing."""
    starts = {str(Workload("m", prompts, 8).prompt(index)).partition(" ")[0] for index in range(200)}
    assert len(starts) == 200


def test_every_prompt_comes_once_a_turn(prompts: Prompts) -> None:
    workload = Workload("m", prompts, 8)
    turn = {str(workload.prompt(index)).partition(" ")[2] for index in range(len(prompts.texts))}
    assert turn == set(prompts.texts)


def test_body_is_what_a_server_understands(prompts: Prompts) -> None:
    body = json.loads(Workload("m", prompts, 8).body(0, ignore_eos=True, continuous_usage=True))
    assert body["max_tokens"] == 8
    assert body["temperature"] == 0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    chat = json.loads(
        Workload("m", prompts, 8, endpoint="chat").body(0, ignore_eos=False, continuous_usage=False)
    )
    assert chat["messages"][0]["role"] == "user"
    assert "ignore_eos" not in chat
    assert chat["stream_options"] == {"include_usage": True}


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
