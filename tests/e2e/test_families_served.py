"""A tiny random model of every family: greedy answers of whole servers are transformers' own in float32.

The servers, one a family, run side by side. Each has its prompts at once, too little room for them, and
budgets that cut them; every second engine launches a step before it reads the one before.
"""

import asyncio
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from demo_server import ENGINE_AHEAD
from tiny_models import make_checkpoint
from transformers import PreTrainedModel

from service.api.app import create_app
from service.config import load_settings
from service.front.host import Host, run_loop
from service.front.supervisor import ENGINE_COMMAND
from service.model.config import FAMILIES
from tests.metric_samples import sample

NEW_TOKENS = 24
NUM_PROMPTS = 64
KEYS = ("first-key", "second-key")
# what sets a family apart is in its checkpoint: windows, layers without positions, norms of q and k, biases
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 2},
}


@dataclass
class Served:
    """What one server gave."""

    reference: PreTrainedModel
    is_ahead: bool
    answers: list[list[int]]
    preemptions: float
    num_shared: float  # prompt tokens that were found in the cache
    cached_tokens: list[int]  # of one prompt under the first key, the second, and the first again


def make_prompts() -> list[list[int]]:
    """64 of 1 to 90 tokens; half of them are beginnings of one text."""
    chance = random.Random(7)
    text = [chance.randrange(3, 128) for _ in range(90)]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 90] + [chance.randrange(1, 60) for _ in range(52)]
    return [
        text[:length] if number % 2 else [chance.randrange(3, 128) for _ in range(length)]
        for number, length in enumerate(lengths)
    ]


async def serve(folder: Path, is_ahead: bool, prompts: list[list[int]], reference: PreTrainedModel) -> Served:
    """One server's life."""
    settings = load_settings(
        model=str(folder),
        served_model_name="m",
        tokenizer="none",
        port=0,
        device="cpu",
        precision="fp32",
        cuda_graphs="off",
        max_batch_tokens=40,
        max_batch_requests=24,
        kv_tokens=256,
        api_key=",".join(KEYS),
    )
    command = ENGINE_AHEAD if is_ahead else ENGINE_COMMAND
    async with (
        Host(settings, folder, create_app, command=command) as host,
        httpx2.AsyncClient(base_url=host.url, timeout=100, verify=False) as http,
    ):
        info = await host.ready()

        async def ask(prompts: list[list[int]], key: str = KEYS[0]) -> dict[str, Any]:
            body = {"model": "m", "prompt": prompts, "temperature": 0, "max_tokens": NEW_TOKENS}
            body |= {"ignore_eos": True, "return_token_ids": True}
            headers = {"authorization": f"Bearer {key}"}
            answer = await http.post("/v1/completions", json=body, headers=headers)
            answered: dict[str, Any] = answer.raise_for_status().json()
            return answered

        together = await ask(prompts)  # in one body: they arrive faster than any engine answers
        preemptions = sample(host.metrics, "halftone_preemptions_total", precision=info.precision)
        num_shared = sample(host.metrics, "halftone_tokens_total", precision=info.precision, kind="cached")
        unseen = [3 + number for number in range(60)]
        again = [await ask([unseen], key) for key in (*KEYS, KEYS[0])]
    return Served(
        reference,
        is_ahead,
        [choice["token_ids"] for choice in together["choices"]],
        preemptions or 0,
        num_shared or 0,
        [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in again],
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    prompts = make_prompts()

    async def all_at_once() -> list[Served]:
        lives = []
        for family, is_ahead in zip(FAMILIES, itertools.cycle((True, False))):
            folder = tmp_path_factory.mktemp(family)
            lives.append(serve(folder, is_ahead, prompts, make_checkpoint(folder, family, **CHANGES[family])))
        return await asyncio.gather(*lives)

    return dict(zip(FAMILIES, run_loop(all_at_once()), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_64_answers_together_are_transformers_own(family: str, served: dict[str, Served]) -> None:
    """One forward pass over prompt and answer shows transformers' own choice behind every token."""
    got = served[family]
    assert got.preemptions > 0
    assert got.num_shared > 0
    for prompt, answer in zip(make_prompts(), got.answers, strict=True):
        assert len(answer) == NEW_TOKENS
        logits = got.reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_two_keys_share_no_prefix(family: str, served: dict[str, Served]) -> None:
    assert served[family].cached_tokens == [0, 0, 48]


def test_engines_of_both_kinds_took_part(served: dict[str, Served]) -> None:
    assert {one.is_ahead for one in served.values()} == {True, False}
