"""Greedy answers of the whole server equal transformers' `generate` in float32, token for token."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_server import prose, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.demo

NEW_TOKENS = 24
# around page boundaries, and past several chunks
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 21, 31, 32, 33, 47, 48, 49, 64, 65, 90, 128, 130, 240, 400, 600)
QUESTIONS = (
    "Why is the sky blue?",
    "Name three colours.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days has a week?",
    "Translate `good morning` into Spanish.",
    "Who wrote Romeo and Juliet?",
    "What is 2 + 2?",
)
ROWS = 8  # that transformers generates at once, at most


@dataclass(frozen=True)
class Case:
    path: str
    body: dict[str, Any]
    prompt: list[int]
    answer: list[int]  # transformers'
    margins: list[float]  # between its likeliest token and the next, logits


def requests(folder: Path) -> list[tuple[str, dict[str, Any], list[int]]]:
    """(path, body, the ids that the model shall see) of 32 requests, 20 of which share a prefix."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prose(folder)
    made: list[tuple[str, dict[str, Any], list[int]]] = []
    for number, length in enumerate(LENGTHS):
        start = 0 if number % 2 else 60 * number  # every second one is a beginning of the same text
        ids = text[start : start + length]
        made.append(("/v1/completions", {"prompt": ids}, ids))
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        made.append(("/v1/chat/completions", {"messages": messages}, ids))
    return made


@pytest.fixture(scope="module")
def cases(demo_model: Path) -> list[Case]:
    made = requests(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    found: dict[int, Case] = {}
    by_length = sorted(range(len(made)), key=lambda index: len(made[index][2]))
    while by_length:
        longest = 2 * len(made[by_length[0]][2])  # more would be mostly padding
        indices = [index for index in by_length[:ROWS] if len(made[index][2]) <= max(longest, 16)]
        del by_length[: len(indices)]
        width = max(len(made[index][2]) for index in indices)
        ids = torch.full((len(indices), width), eos)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            prompt = made[index][2]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with warnings.catch_warnings(), torch.inference_mode():
            generated = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=eos,
                return_dict_in_generate=True,
                output_logits=True,
            )
        top = torch.stack(generated.logits).topk(2).values  # [steps, rows, 2]
        margins = (top[..., 0] - top[..., 1]).t().tolist()
        for row, index in enumerate(indices):
            answer = generated.sequences[row, width:].tolist()
            if eos in answer:
                answer = answer[: answer.index(eos) + 1]
            path, body, prompt = made[index]
            found[index] = Case(path, body, prompt, answer, margins[row][: len(answer)])
    return [found[index] for index in range(len(made))]


def check(cases: list[Case], **settings: Any) -> tuple[float, float]:
    """Sends all at once to a server with these settings -> its preemptions, prompt tokens from the cache."""
    with serving(**settings) as server:
        asked = {"max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
        answers = server.post_all([(case.path, {**case.body, **asked}) for case in cases])
        differing = []
        for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
            [choice] = answer["choices"]
            assert choice["prompt_token_ids"] == case.prompt
            if choice["token_ids"] != case.answer:
                same = [
                    ours == theirs for ours, theirs in zip(choice["token_ids"], case.answer, strict=False)
                ]
                at = same.index(False) if False in same else len(same)
                differing.append(f"request {number} from token {at}, margin {case.margins[at:][:1]}")
        assert not differing
        return server.metric("halftone_preemptions_total"), server.metric(
            "halftone_tokens_total", kind="cached"
        )


def test_a_batch_in_small_chunks(demo_model: Path, cases: list[Case]) -> None:
    """A budget of 96 tokens cuts prompts of 600 in seven and more; shared beginnings are computed once."""
    preemptions, cached = check(
        cases, folder=demo_model, precision="fp32", max_batch_tokens=96, max_batch_requests=32
    )
    assert cached > 0
    assert preemptions == 0


def test_a_batch_in_too_small_a_cache(demo_model: Path, cases: list[Case]) -> None:
    """Requests lose their place and begin again, and no answer tells.

    Short prompts are let in side by side, and their answers need more blocks than there are.
    """
    short = [case for case in cases if len(case.prompt) <= 120]
    assert sum(len(case.prompt) + NEW_TOKENS for case in short) > 3 * 160
    preemptions, cached = check(short, folder=demo_model, precision="fp32", kv_tokens=160, prefix_cache=False)
    assert preemptions > 0
    assert cached == 0
