"""A decode step as a function of tensors alone: the rows' state -> one more token for each row.

runner, graphs --num_rows--> DecodeStep --> drawn token ids; lengths and last tokens have moved on

Nothing in it looks at a value on the host, so that it can be captured once and replayed for other requests,
and so that it can be launched before the step that it continues is done.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from service.engine.penalties import Penalties
from service.engine.sampler import SamplingRows, Variant, draw
from service.engine.state import (
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


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step leaves on the device."""

    token_ids: Tensor  # int64 [rows], BAD_ROW where the logits are broken
    logits: Tensor  # float32 [rows, vocab]


class DecodeStep:
    """Bound to one model, one KV cache and one state, whose `rows` it reads, with its penalties."""

    def __init__(self, model: Model, kv: PagedKV, state: DeviceState, penalties: Penalties) -> None:
        self._model = model
        self._kv = kv
        self._state = state
        self._penalties = penalties
        places = len(state.rows)
        self._starts = torch.arange(places + 1, dtype=torch.int32, device=state.device)
        self._logit_rows = torch.arange(places, device=state.device)
        self._start_list = list(range(places + 1))

    def __call__(
        self,
        num_rows: int,
        variant: Variant,
        context_lengths: list[int],
        suppressed: tuple[Tensor, Tensor] | None = None,
        *,
        shapes_logits: bool = False,
    ) -> Drawn:
        """One token for each of the first `num_rows` places of `state.rows`.

        `context_lengths` are the rows' after this step, or empty: then the step may be captured.
        `suppressed`: (places, token ids) that may not be drawn. `shapes_logits`: some row has penalties or
        biases.
        """
        state = self._state
        rows = state.rows[:num_rows]
        tables = state.tables
        if context_lengths:
            tables = tables[:, : -(-max(context_lengths) // BLOCK_TOKENS)]
        token_ids, positions, slots, lengths, blocks = read_rows(state.fields, tables, rows, BLOCK_TOKENS)
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
        logits = self._model.forward(batch, self._kv).float()
        shaped = logits
        if shapes_logits:
            # log-probabilities are told of the model's own logits; a captured step tells none
            shaped = logits.clone() if context_lengths else logits
            self._penalties.shape(shaped, rows)
        drawn = draw(shaped, sampling_rows(state.fields, rows, lengths, variant), suppressed)
        write_rows(state.fields, rows, drawn, state.padding)
        if shapes_logits:
            self._penalties.record(rows, drawn)
        return Drawn(drawn, logits)


def sampling_rows(fields: Tensor, rows: Tensor, positions: Tensor, variant: Variant) -> SamplingRows:
    """int32 [requests, words] of the state, int [rows], int [rows] of the tokens to draw -> the sampler's."""
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
        positions=positions.long(),
        sample_indices=fields[:, SAMPLE_INDEX].long(),
        top_k=fields[:, TOP_K].long(),
        top_p=fractions[:, TOP_P],
        min_p=fractions[:, MIN_P],
    )
