"""A request's tokens do not depend on what runs beside it: 1, 7, 64 and 256 neighbours of all kinds.

The model is a tiny one in float32 on a CPU, so the sums behind its logits, kernels for few rows and for many,
are those of a real one.
"""

import random

import msgspec
import pytest
import torch
from tiny_models import load_instance, make_checkpoint

from service.engine.engine import Engine, Limits
from service.messages import Sampling, Submit
from service.model.instance import ModelInstance

NEW_TOKENS = 24
KINDS = {
    "greedy": Sampling(NEW_TOKENS, temperature=0, ignore_eos=True),
    "temperature": Sampling(NEW_TOKENS, temperature=0.9, seed=11, ignore_eos=True),
    "full": Sampling(NEW_TOKENS, temperature=1.1, top_k=40, top_p=0.9, min_p=0.01, seed=12, ignore_eos=True),
    "penalties": Sampling(
        NEW_TOKENS,
        temperature=0.8,
        seed=13,
        ignore_eos=True,
        frequency_penalty=0.6,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={5: 2.0, 9: -100.0},
    ),
    "greedy with penalties": Sampling(
        NEW_TOKENS, temperature=0, ignore_eos=True, frequency_penalty=0.6, repetition_penalty=1.2
    ),
    "held back": Sampling(NEW_TOKENS, temperature=1, seed=14, min_tokens=12, stop_token_ids=(7, 8, 21)),
}
LENGTHS = (5, 16, 33, 47, 64, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInstance:
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, "llama", eos_token_id=None)
    return load_instance(folder)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=length)


def watched() -> list[Submit]:
    """One request of each kind."""
    asked = zip(KINDS.values(), LENGTHS, strict=True)
    return [Submit(id, prompt(length, id), sampling) for id, (sampling, length) in enumerate(asked)]


def neighbours(count: int) -> list[Submit]:
    """Of all kinds, of which some tell log-probabilities too."""
    chance = random.Random(count)
    kinds = list(KINDS.values())
    made = []
    for number in range(count):
        max_tokens = chance.randrange(1, NEW_TOKENS)
        sampling = msgspec.structs.replace(
            kinds[number % len(kinds)],
            max_tokens=max_tokens,
            seed=number,
            min_tokens=0,
            logprobs=1 if number % 5 == 0 else -1,
        )
        made.append(Submit(1000 + number, prompt(chance.randrange(1, 40), 1000 + number), sampling))
    return made


def answers(model: ModelInstance, submits: list[Submit], others: list[Submit], depth: int) -> list[list[int]]:
    """Of `submits`, each beside a share of the others that have come before it and after it."""
    limits = Limits(128, 4096, 300, model.config.vocab_size)
    engine = Engine(model, model.new_kv(1500), limits, torch.device("cpu"), prefix_cache=False, depth=depth)
    told: dict[int, list[int]] = {submit.id: [] for submit in submits}
    arriving = [*others]
    arriving[len(others) // 2 : len(others) // 2] = submits
    for number, submit in enumerate(arriving):
        engine.add(submit)
        if number % 64 == 63:
            take(engine, told)
    while engine.has_work:
        take(engine, told)
    return list(told.values())


def take(engine: Engine, told: dict[int, list[int]]) -> None:
    for output in engine.step().outputs:
        assert not output.error
        if output.id in told:
            told[output.id] += output.token_ids


@pytest.fixture(scope="module")
def alone(model: ModelInstance) -> list[list[int]]:
    return [answers(model, [submit], [], depth=0)[0] for submit in watched()]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("count", [1, 7, 64, 256])
def test_neighbours_move_no_token(
    model: ModelInstance, alone: list[list[int]], count: int, depth: int
) -> None:
    together = answers(model, watched(), neighbours(count), depth)
    assert dict(zip(KINDS, together, strict=True)) == dict(zip(KINDS, alone, strict=True))
