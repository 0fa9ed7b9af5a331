"""A model without weights whose logits are a hash of every token it can see through the KV cache."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.engine import Engine, Limits
from service.engine.sampler import SamplingRows, draw
from service.messages import Output, Sampling, Step, Submit
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch

VOCAB_SIZE = 29
UNSAID = VOCAB_SIZE  # an id that prompts may hold, but no logits speak for
CPU = torch.device("cpu")
TILE_QUERIES = 4  # of a kernel that this model has not
DEPTH = 0  # of engines whose maker does not say


def prefix_logits(token_ids: list[int]) -> Tensor:
    """float32 [VOCAB_SIZE], another one for every other prefix."""
    seed = zlib.crc32(np.array(token_ids, np.int64).tobytes())
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, VOCAB_SIZE)).float()


@dataclass
class FakeModel:
    """Keeps token ids where K would be. `poison` in a prefix raises `fault`, `broken` gives NaN."""

    poison: int = -1
    fault: Exception = field(default_factory=lambda: RuntimeError("poisoned"))
    broken: int = -1
    batches: list[StepBatch] = field(default_factory=list)

    def forward(self, batch: StepBatch, kv: PagedKV) -> Tensor:
        self.batches.append(batch)
        pages = kv.keys[0].view(-1)
        spans = spans_of(batch)
        covered = {row for span in spans.values() for row in range(span.first, span.end)}
        padding = [row for row in range(len(batch.token_ids)) if row not in covered]
        assert not (padding and batch.context_lengths), "only a captured step has padding"
        assert (batch.slots[padding] == 0).all(), "padding is written outside of block 0"
        assert (batch.slots[sorted(covered)] >= BLOCK_TOKENS).all(), "block 0 is written"
        assert (batch.token_ids >= 0).all(), "a broken row's token is looked up"
        pages[batch.slots] = batch.token_ids
        assert len(batch.token_ids) == len(batch.positions)
        if batch.tiles:
            check_tiles(batch.tiles.table(TILE_QUERIES).tolist(), spans, batch.num_decode)
        rows = []
        for row in batch.logit_rows.tolist():
            if row not in covered:
                rows.append(torch.zeros(VOCAB_SIZE))
                continue
            sequence, span = next((i, span) for i, span in spans.items() if span.first <= row < span.end)
            position = int(batch.positions[row])
            assert position == span.length - (span.end - row)
            slots = (batch.block_tables[sequence].long() * BLOCK_TOKENS).unsqueeze(1) + torch.arange(16)
            seen = pages[slots.view(-1)[: position + 1]].tolist()
            if self.poison in seen:
                raise self.fault
            logits = prefix_logits(seen)
            rows.append(torch.full_like(logits, torch.nan) if self.broken in seen else logits)
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)


class Span(NamedTuple):
    """Rows of a sequence in a step, and its tokens behind the step."""

    first: int
    end: int
    length: int


def spans_of(batch: StepBatch) -> dict[int, Span]:
    """By number of the sequence; those that are padding are left out."""
    starts, lengths = batch.query_starts, batch.context_lengths
    if not lengths:  # as it is captured
        assert batch.lengths is not None
        assert batch.starts is not None
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    found = {
        number: Span(number, number + 1, lengths[number])
        for number in range(batch.num_decode)
        if batch.slots[number] >= BLOCK_TOKENS
        and (batch.context_lengths or batch.tiles is None or lengths[number])
    }
    for number in range(batch.num_decode, len(lengths)):
        if starts[number] < starts[number + 1]:
            found[number] = Span(starts[number], starts[number + 1], lengths[number])
    assert batch.context_lengths or all(
        lengths[number] <= 1 for number in set(range(len(lengths))) - set(found)
    )
    return found


def check_tiles(tiles: list[list[int]], spans: dict[int, Span], num_decode: int) -> None:
    """Each query of a prompt is in one tile; what is left is of a sequence that has none."""
    wanted = [
        [number, query]
        for number, span in spans.items()
        if number >= num_decode
        for query in range(0, span.end - span.first, TILE_QUERIES)
    ]
    assert sorted(tile for tile in tiles if tile[0] in spans) == sorted(wanted)


class FakeGraphPool:
    """Stands for `devices.GraphPool`: what a replay would do on a GPU is done by running the step again."""

    def capture(self, run: Callable[[], Tensor], *, is_known: bool = False) -> "FakeCaptured":
        return FakeCaptured(run)


class FakeCaptured:
    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self._result = run()

    def replay(self) -> Tensor:
        return self._result.copy_(self._run())


def fake_kv(num_blocks: int) -> PagedKV:
    kv = PagedKV(1, num_blocks, 1, 1, torch.int64, CPU)
    kv.keys[0].fill_(-7)  # stale content must never be read
    return kv


def fake_engine(
    num_blocks: int = 64,
    max_batch_tokens: int = 64,
    max_batch_requests: int = 8,
    max_context_tokens: int = 0,
    prefix_cache: bool = True,
    eos: int = 0,
    model: FakeModel | None = None,
    depth: int | None = None,
    captured: bool = False,
    deterministic: bool = False,
    few_batch_tokens: int = 0,
    crowd_batch_tokens: int = 0,
) -> Engine:
    limits = Limits(
        max_context_tokens or (num_blocks - 1) * BLOCK_TOKENS,
        max_batch_tokens,
        max_batch_requests,
        VOCAB_SIZE + 1,
        few_batch_tokens,
        crowd_batch_tokens,
    )
    engine = Engine(
        model or FakeModel(),
        fake_kv(num_blocks),
        limits,
        CPU,
        frozenset([eos]),
        prefix_cache=prefix_cache,
        depth=DEPTH if depth is None else depth,
        deterministic=deterministic,
    )
    if captured:
        with patch.object(devices, "GraphPool", FakeGraphPool):
            engine.runner.capture()
    return engine


def sampling_rows(sampling: Sampling, position: int) -> SamplingRows:
    """One row, always under the fullest variant."""
    seed = sampling.seed & (2**64 - 1)
    return SamplingRows(
        "full",
        torch.tensor([sampling.temperature]),
        torch.tensor([seed - (seed >> 63 << 64)]),
        torch.tensor([position]),
        torch.tensor([sampling.sample_index]),
        torch.tensor([sampling.top_k]),
        torch.tensor([sampling.top_p], dtype=torch.float64),
        torch.tensor([sampling.min_p], dtype=torch.float64),
    )


def expected_answer(submit: Submit, max_context_tokens: int, eos: int = 0) -> tuple[list[int], str]:
    """What the request must produce, computed without scheduler, cache or batch."""
    sampling = submit.sampling
    tokens = list(submit.prompt)
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {eos})
    answer: list[int] = []
    while len(answer) < sampling.max_tokens and len(tokens) < max_context_tokens:
        early = len(answer) < sampling.min_tokens
        suppressed = None
        if early and stops:
            suppressed = (torch.zeros(len(stops), dtype=torch.int64), torch.tensor(list(stops)))
        token = int(
            draw(prefix_logits(tokens).unsqueeze(0), sampling_rows(sampling, len(tokens)), suppressed)
        )
        answer.append(token)
        tokens.append(token)
        if token in stops:
            return answer, "stop"
    return answer, "length"


@dataclass
class Client:
    """Collects outputs by request and sees to it that each ends exactly once."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, Output] = field(default_factory=dict)
    firsts: dict[int, Output] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def take(self, step: Step) -> None:
        self.steps.append(step)
        for output in step.outputs:
            assert output.id not in self.endings, f"request {output.id} goes on after its end"
            self.firsts.setdefault(output.id, output)
            self.answers.setdefault(output.id, []).extend(output.token_ids)
            if output.finish_reason:
                self.endings[output.id] = output
                self.order.append(output.id)

    @property
    def num_preemptions(self) -> int:
        return sum(step.stats.num_preemptions for step in self.steps)

    def run(self, engine: Engine, max_steps: int = 5000) -> "Client":
        for _ in range(max_steps):
            if not engine.has_work:
                return self
            self.take(engine.step())
            engine.check()
        raise AssertionError("the engine does not come to an end")
