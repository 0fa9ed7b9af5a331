"""A decode step as a function of tensors alone: the rows' state -> one more token for each row.

runner, graphs --num_rows--> DecodeStep --> drawn token ids; lengths and last tokens have moved on

Nothing in it looks at a value on the host, so that it can be captured once and replayed for other requests,
and so that it can be launched before the step that it continues is done.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from service.engine.penalties import Penalties
from service.engine.sampler import SamplingRows, Variant, draw
from service.engine.state import (
    LENGTH,
    MIN_P,
    SAMPLE_INDEX,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    DeviceState,
)
from service.kernels.row_state import read_rows, write_rows
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch


class Model(Protocol):
    def forward(self, batch: StepBatch, kv: PagedKV) -> Tensor:
        """-> logits [R, vocab] of the rows `batch.logit_rows`, any float type."""
        ...


Draw = Callable[[Tensor, SamplingRows, tuple[Tensor, Tensor] | None], Tensor]  # as the sampler's `draw`


class DecodeStep:
    """Bound to one model, one KV cache and one state, whose `rows` it reads, with its penalties."""

    def __init__(
        self, model: Model, kv: PagedKV, state: DeviceState, penalties: Penalties, draw: Draw = draw
    ) -> None:
        self._model = model
        self._kv = kv
        self._state = state
        self._penalties = penalties
        self._draw = draw
        places = len(state.rows)
        self._starts = torch.arange(places + 1, dtype=torch.int32, device=state.device)
        self._logit_rows = torch.arange(places, device=state.device)
        self._start_list = list(range(places + 1))

    def __call__(self, num_rows: int, variant: Variant) -> Tensor:
        """The whole step for the first `num_rows` places of `state.rows`, as it is captured.

        -> int64 [num_rows], drawn token ids. A greedy step shapes no logits.
        """
        logits = self.logits(num_rows, [])
        if variant != "greedy":
            logits = logits.float()
        return self.draw(logits, variant, shapes_logits=variant != "greedy", keeps_logits=False)

    def logits(self, num_rows: int, context_lengths: list[int]) -> Tensor:
        """-> [num_rows, vocab], any float type; K and V of the rows' last tokens are in the cache.

        `context_lengths` are the rows' after this step, or empty: then it may be captured.
        """
        state = self._state
        tables = state.tables_for(max(context_lengths)) if context_lengths else state.tables
        token_ids, positions, slots, lengths, blocks = read_rows(
            state.fields, tables, state.rows[:num_rows], BLOCK_TOKENS
        )
        batch = StepBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=self._start_list[: num_rows + 1],
            context_lengths=context_lengths,
            block_tables=blocks,
            num_decode=num_rows,
            logit_rows=self._logit_rows[:num_rows],
            lengths=lengths,
            starts=self._starts[: num_rows + 1],
        )
        return self._model.forward(batch, self._kv)

    def draw(
        self,
        logits: Tensor,
        variant: Variant,
        suppressed: tuple[Tensor, Tensor] | None = None,
        *,
        shapes_logits: bool = False,
        keeps_logits: bool = True,
    ) -> Tensor:
        """float32 [rows, vocab] of the first places -> int64 [rows]; lengths and last tokens have moved on.

        A greedy draw that shapes nothing takes logits of any float type.

        `suppressed`: (places, token ids) that may not be drawn. `shapes_logits`: some row has penalties or
        biases. `keeps_logits`: somebody reads them afterwards.
        """
        state = self._state
        rows = state.rows[: len(logits)]
        if shapes_logits:
            if keeps_logits:
                logits = logits.clone()
            self._penalties.shape(logits, rows)
        token_ids = self._draw(logits, sampling_rows(state.fields, rows, None, variant), suppressed)
        write_rows(state.fields, rows, token_ids, state.padding)
        if shapes_logits:
            self._penalties.record(rows, token_ids)
        return token_ids


def sampling_rows(fields: Tensor, rows: Tensor, positions: Tensor | None, variant: Variant) -> SamplingRows:
    """int32 [requests, words] of the state, int [rows] -> what the sampler reads of these rows.

    `positions` int64 [rows] of the tokens to draw; None: behind the one that is computed next.
    """
    if variant == "greedy":
        none = torch.empty(0)
        return SamplingRows(variant, none, none, none, none, none, none, none)
    fields = fields.index_select(0, rows)
    wide = fields.view(torch.int64)
    fractions = fields.view(torch.float64)
    return SamplingRows(
        variant,
        temperature=fields.view(torch.float32)[:, TEMPERATURE],
        seeds=wide[:, SEED],
        positions=fields[:, LENGTH].long() + 1 if positions is None else positions,
        sample_indices=fields[:, SAMPLE_INDEX].long(),
        top_k=fields[:, TOP_K],
        top_p=fractions[:, TOP_P],
        min_p=fractions[:, MIN_P],
    )
