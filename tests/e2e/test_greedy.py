"""Greedy answers of the whole server are transformers' own in float32, token for token.

64 requests at once on the demo model, in chunks, with shared beginnings, and with too little room.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_server import ENGINE_AHEAD, prose, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.front.supervisor import ENGINE_COMMAND

pytestmark = pytest.mark.demo

NEW_TOKENS = 24
# around page boundaries, and past several chunks
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 21, 31, 32, 33, 47, 48, 49, 64, 65, 90, 128, 130, 240, 600)
SHORT = tuple(range(1, 34))
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


@dataclass(frozen=True)
class Case:
    path: str
    body: dict[str, Any]
    prompt: list[int]  # the ids that the model shall see


def make_cases(folder: Path) -> list[Case]:
    """64 requests, half of which share a prefix."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prose(folder)
    made = []
    for number, length in enumerate((*LENGTHS, *SHORT)):
        start = 0 if number % 2 else 25 * number  # every second one is a beginning of the same text
        ids = text[start : start + length]
        made.append(Case("/v1/completions", {"prompt": ids}, ids))
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        made.append(Case("/v1/chat/completions", {"messages": messages}, ids))
    return made


class Greedy:
    """transformers in float32, and what it takes for the likeliest token.

    One forward pass over a prompt and its answer shows the choice behind every token: where all are the
    answer's own, this is the answer that `generate` gives, for which it makes a pass a token.
    """

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.eos: int = self.model.generation_config.eos_token_id
        self._seen: dict[tuple[int, ...], str] = {}

    def difference(self, prompt: list[int], answer: list[int]) -> str:
        """Where it would have gone on otherwise; empty for its own answer."""
        key = (*prompt, *answer)
        if key not in self._seen:
            self._seen[key] = self._difference(prompt, answer)
        return self._seen[key]

    @torch.inference_mode()
    def _difference(self, prompt: list[int], answer: list[int]) -> str:
        ids = torch.tensor([prompt + answer[:-1]])
        logits = self.model(ids, logits_to_keep=len(answer)).logits[0]
        wanted = logits.argmax(-1).tolist()
        if wanted != answer:
            at = next(index for index, token in enumerate(wanted) if token != answer[index])
            first, second = logits[at].topk(2).values.tolist()
            return f"token {at} is {answer[at]}, not {wanted[at]}, whose margin is {first - second:.2g}"
        is_whole = len(answer) == NEW_TOKENS or answer[-1] == self.eos
        return "" if is_whole and self.eos not in answer[:-1] else f"{len(answer)} tokens"


@pytest.fixture(scope="module")
def greedy(demo_model: Path) -> Greedy:
    return Greedy(demo_model)


@pytest.fixture(scope="module")
def cases(demo_model: Path) -> list[Case]:
    return make_cases(demo_model)


def check(greedy: Greedy, cases: list[Case], **settings: Any) -> tuple[float, float]:
    """Sends all at once to a server with these settings -> its preemptions, prompt tokens from the cache."""
    with serving(**settings) as server:
        asked = {"max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
        answers = server.post_all([(case.path, {**case.body, **asked}) for case in cases])
        preemptions = server.metric("halftone_preemptions_total")
        cached = server.metric("halftone_tokens_total", kind="cached")
    for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        [choice] = answer["choices"]
        assert choice["prompt_token_ids"] == case.prompt
        assert not greedy.difference(case.prompt, choice["token_ids"]), f"request {number}"
    return preemptions, cached


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(ENGINE_COMMAND, id="in turn"),
        pytest.param(ENGINE_AHEAD, id="ahead", marks=pytest.mark.slow),
    ],
)
def test_64_together(demo_model: Path, greedy: Greedy, cases: list[Case], command: tuple[str, ...]) -> None:
    """A budget of 96 tokens cuts prompts in up to seven and more, shared beginnings are computed once, and
    who finds no room loses his place and begins again; no answer tells."""
    assert len(cases) == 64
    preemptions, cached = check(
        greedy,
        cases,
        folder=demo_model,
        command=command,
        cuda_graphs="off",
        precision="fp32",
        max_batch_tokens=96,
        max_batch_requests=32,
        kv_tokens=640,
    )
    assert preemptions > 1
    assert cached > 0
