"""10,000 requests, three in ten given up at a random moment, leave nothing in the engine behind."""

import gc
import random
import sys
from collections import defaultdict

import pytest
import torch
from fake_model import CPU, VOCAB_SIZE, FakeGraphPool, fake_kv
from torch import Tensor

from service import device as devices
from service.engine.engine import Engine, Limits
from service.messages import Sampling, Submit
from service.model.batch import PagedKV, StepBatch

MIB = 1 << 20
NUM_REQUESTS = 10_000
SETTLED_AT = 4_000  # requests after which everything has its lasting size
NUM_ROWS = 48
SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "logprobs": 1},
    {"temperature": 0, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}},
    {"temperature": 0, "prompt_logprobs": 0, "min_tokens": 2},
)


class Table:
    """A model whose logits follow from a row's own token: nothing is computed, and nothing kept."""

    def __init__(self) -> None:
        self._logits = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3

    def forward(self, batch: StepBatch, kv: PagedKV) -> Tensor:
        return self._logits[batch.token_ids[batch.logit_rows]]


def held() -> tuple[int, int]:
    """Blocks of Python's allocator, resident bytes."""
    gc.collect()
    return sys.getallocatedblocks(), devices.memory_used_bytes(CPU)


def test_10_000_requests_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, row and entry is back, and the last 6,000 took no memory that the first had not taken."""
    monkeypatch.setattr(devices, "GraphPool", FakeGraphPool)
    num_blocks = 100
    limits = Limits(256, 256, NUM_ROWS, VOCAB_SIZE)
    engine = Engine(Table(), fake_kv(num_blocks), limits, CPU, frozenset([0]), depth=1)
    engine.runner.capture()
    chance = random.Random(3)
    shared = [chance.randrange(VOCAB_SIZE) for _ in range(64)]
    open_ids: set[int] = set()
    endings = dict.fromkeys(("stop", "length", "abort", "error"), 0)
    doomed: defaultdict[int, list[int]] = defaultdict(list)  # step -> who is given up before it
    num_added = num_steps = num_preemptions = 0
    settled = (0, 0)
    while num_added < NUM_REQUESTS or engine.has_work:
        while num_added < NUM_REQUESTS and len(open_ids) < NUM_ROWS + 8:
            is_long = num_added % 1000 < NUM_ROWS  # they come together, and outgrow the cache
            prompt = chance.choices(range(VOCAB_SIZE), k=chance.randrange(1, 20))
            prompt = prompt if is_long else shared[: chance.randrange(48)] + prompt
            asked = SAMPLINGS[num_added % len(SAMPLINGS)]
            sampling = Sampling(60 if is_long else chance.randrange(1, 5), seed=num_added, **asked)
            engine.add(Submit(num_added, prompt, sampling, b"other" if chance.random() < 0.2 else b""))
            open_ids.add(num_added)
            num_added += 1
            if chance.random() < 0.43:
                doomed[num_steps + chance.randrange(6)].append(num_added - 1)
        engine.abort(doomed.pop(num_steps, []))  # some have not been in a step, some have ended
        num_steps += 1
        step = engine.step()
        num_preemptions += step.stats.num_preemptions
        for output in step.outputs:
            if output.finish_reason:
                endings[output.finish_reason] += 1
                open_ids.remove(output.id)
        if not settled[0] and num_added >= SETTLED_AT:
            settled = held()
    assert sum(endings.values()) == NUM_REQUESTS
    assert endings["error"] == 0
    assert 0.27 < endings["abort"] / NUM_REQUESTS < 0.33
    assert num_preemptions > 20

    assert not open_ids
    engine.check()
    assert engine.cache.num_held == 0
    scheduler = engine.scheduler
    for kept in (engine._requests, engine._launched, engine._outputs, scheduler.waiting, scheduler.running):
        assert not kept
    assert sorted(scheduler._free_rows) == list(range(NUM_ROWS))
    blocks, resident = held()
    assert blocks - settled[0] < 2_000
    assert resident - settled[1] < 4 * MIB
