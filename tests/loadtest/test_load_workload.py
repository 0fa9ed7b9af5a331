"""The same seed asks the same, at the same times."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.prompts import DEFAULT_PROMPTS, Prompt, Prompts
from loadtest.trace import HASH_BLOCK_TOKENS, Traced
from loadtest.workload import Workload, workload_of


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.load(DEFAULT_PROMPTS)


def bodies(workload: Workload, count: int = 70) -> list[bytes]:
    return [workload.body(index) for index in range(count)]


def test_our_prompts_are_many_and_distinct(prompts: Prompts) -> None:
    assert len(set(prompts.texts)) == len(prompts.items) >= 64
    assert len(prompts.sha256) == 64


@pytest.mark.parametrize("input_tokens", [0, 12])
def test_a_seed_fixes_every_body(prompts: Prompts, input_tokens: int) -> None:
    def workload(seed: int) -> Workload:
        return Workload("m", prompts.items, 8, seed=seed, input_tokens=input_tokens, vocab_size=100)

    assert bodies(workload(3)) == bodies(workload(3))
    assert bodies(workload(3)) != bodies(workload(4))


def test_no_request_starts_like_another(prompts: Prompts) -> None:
    """A shared first block would be served from the prefix cache and time nothing."""
    starts = {str(Workload("m", prompts.items, 8).prompt(index)).partition(" ")[0] for index in range(200)}
    assert len(starts) == 200


def test_every_prompt_comes_once_a_turn(prompts: Prompts) -> None:
    workload = Workload("m", prompts.items, 8)
    turn = {str(workload.prompt(index)).partition(" ")[2] for index in range(len(prompts.items))}
    assert turn == set(prompts.texts)


def test_body_is_what_a_server_understands(prompts: Prompts) -> None:
    body = json.loads(Workload("m", prompts.items, 8, continuous_usage=True).body(0))
    assert body["max_tokens"] == 8
    assert body["temperature"] == 0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    chat = json.loads(Workload("m", prompts.items, 8, endpoint="chat", ignore_eos=False).body(0))
    assert chat["messages"][0]["role"] == "user"
    assert "ignore_eos" not in chat
    assert chat["stream_options"] == {"include_usage": True}
    reduced = Workload("m", prompts.items, 8).without(["ignore_eos", "stream_options"])
    assert not json.loads(reduced.body(0)).keys() & {"ignore_eos", "stream_options"}


@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 99))
def test_random_prompts_have_as_many_ids_as_asked_all_in_the_vocabulary(
    vocab_size: int, input_tokens: int, index: int
) -> None:
    prompt = Workload("m", (), 8, input_tokens=input_tokens, vocab_size=vocab_size).prompt(index)
    assert len(prompt) == input_tokens
    assert all(isinstance(id, int) and 0 <= id < vocab_size for id in prompt)


def test_a_prompt_may_be_token_ids_and_ask_for_a_length_of_its_own() -> None:
    workload = Workload("m", (Prompt(token_ids=(5, 6), output_tokens=3), Prompt(text="a")), 8)
    asked = {str(workload.prompt(index)): workload.asked_tokens(index) for index in range(2)}
    text = next(prompt for prompt in asked if prompt.endswith(" a"))
    assert asked == {"[5, 6]": 3, text: 8}


TRACE = (
    Traced(0.0, 4, input_tokens=HASH_BLOCK_TOKENS + 5, hash_ids=(1, 2)),
    Traced(0.5, 2, input_tokens=HASH_BLOCK_TOKENS + 9, hash_ids=(1,)),
    Traced(0.7, 9, text="as it was"),
)


def test_a_trace_has_its_lengths_and_shares_what_was_shared() -> None:
    workload = Workload("m", (), 8, vocab_size=100, trace=TRACE, seed=3)
    first, second = workload.prompt(0), workload.prompt(1)
    assert (len(first), len(second)) == (HASH_BLOCK_TOKENS + 5, HASH_BLOCK_TOKENS + 9)
    assert first[:HASH_BLOCK_TOKENS] == second[:HASH_BLOCK_TOKENS]
    assert first[HASH_BLOCK_TOKENS:] != second[HASH_BLOCK_TOKENS : HASH_BLOCK_TOKENS + 5]
    assert workload.prompt(2) == "as it was"
    assert [workload.asked_tokens(index) for index in range(3)] == [4, 2, 9]
    other = Workload("m", (), 8, vocab_size=100, trace=TRACE, seed=4).prompt(0)
    assert other[:HASH_BLOCK_TOKENS] != first[:HASH_BLOCK_TOKENS]  # no run asks what another has asked


def test_a_file_gives_the_texts_of_a_trace_that_has_lengths_alone() -> None:
    workload = Workload("m", (Prompt(text="mine"),), 8, trace=TRACE)
    assert str(workload.prompt(0)).endswith(" mine")
    assert workload.asked_tokens(0) == 4


def test_a_workload_survives_the_pipe() -> None:
    whole = Workload("m", (Prompt("a"), Prompt(token_ids=(1, 2))), 8, trace=TRACE)
    assert workload_of(orjson.loads(orjson.dumps(whole))) == whole
