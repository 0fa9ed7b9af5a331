"""The scheduler's chunks -> a StepBatch -> logits -> the sampler -> one result a chunk.

What a request keeps for its whole life (block table, sampling parameters) lies in tables with one row for
each running request, so a step gathers rows instead of building lists.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.engine.request import Request
from service.engine.sampler import BAD_ROW, SamplingRows, Variant, draw, logprobs
from service.engine.scheduler import Chunk
from service.messages import TokenLogprobs
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch

Ints = npt.NDArray[np.int64]


class Model(Protocol):
    def forward(self, batch: StepBatch, kv: PagedKV) -> Tensor:
        """-> logits [R, vocab] of the rows `batch.logit_rows`, any float type."""
        ...


@dataclass(slots=True)
class StepResult:
    """By chunk, in the chunks' order; the dictionaries hold only the chunks that asked."""

    token_ids: list[int | None]  # None: nothing was drawn; BAD_ROW: the logits are broken
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Runner:
    """Runs steps of a model over one KV cache; `max_context_tokens` bounds a request's block table."""

    def __init__(
        self,
        model: Model,
        kv: PagedKV,
        device: torch.device,
        max_batch_requests: int,
        max_context_tokens: int,
    ) -> None:
        self.model = model
        self.kv = kv
        self.device = device
        self._blocks = np.zeros((max_batch_requests, -(-max_context_tokens // BLOCK_TOKENS)), np.int32)
        self._seeds = np.zeros(max_batch_requests, np.int64)
        self._sample_indices = np.zeros(max_batch_requests, np.int64)
        self._top_k = np.zeros(max_batch_requests, np.int64)
        # temperature, top_p, min_p
        self._fractions = np.zeros((3, max_batch_requests), np.float64)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> StepResult:
        """One forward pass over all chunks; those of one token come first."""
        rows = np.array([chunk.request.row for chunk in chunks], np.int64)
        batch, wanted = self._batch(chunks, rows)
        result = StepResult([None] * len(chunks))
        logits = self.model.forward(batch, self.kv)
        if not wanted.num_rows:
            return result
        logits = logits.float()
        if wanted.drawn:
            self._draw(logits, chunks, rows, wanted, result)
        for index, start, stop in wanted.scored:
            self._score_prompt(logits[start:stop], chunks[index], index, result)
        return result

    def _batch(self, chunks: list[Chunk], rows: Ints) -> tuple[StepBatch, "_Wanted"]:
        wanted = _Wanted()
        token_ids: list[int] = []
        computed: list[int] = []
        query_starts = [0]
        context_lengths: list[int] = []
        logit_rows: list[int] = []
        num_decode = end = 0
        for index, chunk in enumerate(chunks):
            request, count = chunk.request, chunk.num_tokens
            if len(request.blocks) != request.num_tabled_blocks:
                self._table(request)
            tokens, start = request.tokens, request.num_computed_tokens
            stop = start + count
            if count == 1:
                token_ids.append(tokens[start])
                num_decode += 1
            else:
                token_ids += tokens[start:stop]
            computed.append(start)
            context_lengths.append(stop)
            end += count
            query_starts.append(end)
            is_last = stop == len(tokens)
            if request.scores_prompt:
                num_scored = count - is_last  # the last token's row predicts the answer
                if num_scored:
                    wanted.scored.append((index, len(logit_rows), len(logit_rows) + num_scored))
                    logit_rows += range(end - count, end - count + num_scored)
            if is_last and request.sampling.max_tokens:
                wanted.drawn.append(index)
                wanted.drawn_rows.append(len(logit_rows))
                logit_rows.append(end - 1)
        wanted.num_rows = len(logit_rows)
        max_blocks = -(-max(context_lengths) // BLOCK_TOKENS)

        positions = np.array(computed, np.int64)
        row_of_token = rows
        if num_decode < len(chunks):
            starts = np.array(query_starts, np.int64)
            repeats = np.diff(starts)
            positions = np.repeat(positions - starts[:-1], repeats) + np.arange(end)
            row_of_token = np.repeat(rows, repeats)
        slots = self._blocks[row_of_token, positions // BLOCK_TOKENS] * np.int64(BLOCK_TOKENS)
        slots += positions % BLOCK_TOKENS
        # one array, so that a device gets one copy
        packed = np.concatenate((np.array(token_ids + logit_rows, np.int64), positions, slots))
        parts = torch.from_numpy(packed).to(self.device, non_blocking=True)
        tokens, wanted_rows, places, targets = parts.split([end, len(logit_rows), end, end])
        batch = StepBatch(
            token_ids=tokens,
            positions=places,
            slots=targets,
            query_starts=query_starts,
            context_lengths=context_lengths,
            block_tables=self._to_device(self._blocks[rows, :max_blocks]),
            num_decode=num_decode,
            logit_rows=wanted_rows,
        )
        return batch, wanted

    def _table(self, request: Request) -> None:
        """Brings the request's row of the tables up to date."""
        row, known = request.row, request.num_tabled_blocks
        if known == 0:
            sampling = request.sampling
            seed = sampling.seed & 0xFFFFFFFFFFFFFFFF
            self._seeds[row] = seed - (seed >> 63 << 64)
            self._sample_indices[row] = sampling.sample_index
            self._top_k[row] = sampling.top_k
            self._fractions[:, row] = sampling.temperature, sampling.top_p, sampling.min_p
        self._blocks[row, known : len(request.blocks)] = request.blocks[known:]
        request.num_tabled_blocks = len(request.blocks)

    def _draw(
        self, logits: Tensor, chunks: list[Chunk], rows: Ints, wanted: "_Wanted", result: StepResult
    ) -> None:
        if wanted.num_rows != len(wanted.drawn):
            logits = logits[wanted.drawn_rows]
        requests = [chunks[index].request for index in wanted.drawn]
        if len(requests) != len(chunks):
            rows = rows[wanted.drawn]
        drawn = draw(logits, self._sampling_rows(requests, rows), suppressed_stops(requests))
        token_ids: list[int] = drawn.tolist()
        asking = [i for i, request in enumerate(requests) if request.sampling.logprobs >= 0]
        asking = [i for i in asking if token_ids[i] != BAD_ROW]
        if asking:
            counts = [requests[i].sampling.logprobs for i in asking]
            entries = described(logits[asking], [token_ids[i] for i in asking], counts)
            result.logprobs = {wanted.drawn[i]: entry for i, entry in zip(asking, entries, strict=True)}
        for index, token_id in zip(wanted.drawn, token_ids, strict=True):
            result.token_ids[index] = token_id

    def _sampling_rows(self, requests: list[Request], rows: Ints) -> SamplingRows:
        fractions = self._fractions[:, rows]
        temperature, top_p, min_p = fractions
        top_k = self._top_k[rows]
        variant: Variant = "greedy"
        if temperature.any():
            variant = "full" if top_k.any() or (top_p < 1).any() or min_p.any() else "temperature"
        none = torch.empty(0)
        if variant == "greedy":
            return SamplingRows(variant, none, none, none, none, none, none, none)
        positions = np.array([len(request.tokens) for request in requests], np.int64)
        integers = np.stack((self._seeds[rows], positions, self._sample_indices[rows], top_k))
        seeds, places, samples, limits = self._to_device(integers)
        temperatures, nuclei, floors = self._to_device(fractions)
        return SamplingRows(variant, temperatures.float(), seeds, places, samples, limits, nuclei, floors)

    def _score_prompt(self, logits: Tensor, chunk: Chunk, index: int, result: StepResult) -> None:
        request = chunk.request
        first = request.num_computed_tokens + 1
        entries = described(
            logits,
            request.tokens[first : first + len(logits)],
            [request.sampling.prompt_logprobs] * len(logits),
        )
        if all(np.isfinite(entry.logprob) for entry in entries):
            result.prompt_logprobs[index] = entries
        else:
            result.token_ids[index] = BAD_ROW

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


@dataclass(slots=True)
class _Wanted:
    """Which rows of logits are for what."""

    drawn: list[int] = field(default_factory=list)  # chunks that get a token
    drawn_rows: list[int] = field(default_factory=list)  # their rows of logits
    scored: list[tuple[int, int, int]] = field(default_factory=list)  # chunk, first and last + 1 row
    num_rows: int = 0


def suppressed_stops(requests: list[Request]) -> tuple[list[int], list[int]] | None:
    """(row, token id) of each stop id that may not be drawn yet."""
    rows: list[int] = []
    token_ids: list[int] = []
    for row, request in enumerate(requests):
        min_tokens = request.sampling.min_tokens
        if min_tokens and request.num_generated_tokens < min_tokens:
            rows += [row] * len(request.stop_token_ids)
            token_ids += request.stop_token_ids
    return (rows, token_ids) if rows else None


def described(logits: Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """float32 [rows, vocab] and each row's token and number of alternatives -> what the client is told."""
    found = logprobs(logits, torch.tensor(token_ids, device=logits.device), max(counts))
    columns = (found.chosen, found.ranks, found.top_ids, found.top_logprobs)
    chosen, ranks, top_ids, top_logprobs = (column.tolist() for column in columns)
    return [
        TokenLogprobs(token_id, chosen[i], ranks[i], top_ids[i][:count], top_logprobs[i][:count])
        for i, (token_id, count) in enumerate(zip(token_ids, counts, strict=True))
    ]
