"""Penalties and logit bias: what each request has said so far, and how that changes its next logits.

runner --seat, at a request's start--> Penalties --shape--> logits for the sampler; --record--> what was drawn

Everything lies on the device, a row for each running request: a step may be launched before the host knows
what the one before it drew. A row that asks for nothing has neutral factors, which leave its logits as they
are, so neighbours that ask change nothing. What the numbers mean: kernels/shape_logits.
"""

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.request import Request
from service.kernels.shape_logits import GENERATED, IN_PROMPT, NEUTRAL, count_tokens, shape_logits
from service.messages import Sampling

MAX_BIASES = 300  # token ids of one request; the API takes no more


class Penalties:
    """Rows 0 to `num_rows` - 1; one of them may be for padding."""

    occurrences: Tensor  # int32 [rows, vocab], IN_PROMPT + GENERATED * times in the answer
    factors: Tensor  # float32 [rows, 4]: repetition, frequency, presence, and whether the row asks
    bias_ids: Tensor  # int64 [rows, MAX_BIASES], unused places are id 0 with bias 0
    biases: Tensor  # float32 [rows, MAX_BIASES]

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.occurrences = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)
        self.factors = torch.tensor([NEUTRAL], device=device).repeat(num_rows, 1)
        self.bias_ids = torch.zeros(num_rows, MAX_BIASES, dtype=torch.int64, device=device)
        self.biases = torch.zeros(num_rows, MAX_BIASES, device=device)
        self.asking = np.zeros(num_rows, np.bool_)  # by row: does its tenant shape logits?

    @property
    def bytes(self) -> int:
        tables = (self.occurrences, self.factors, self.bias_ids, self.biases)
        return sum(table.numel() * table.element_size() for table in tables)

    def seat(self, request: Request) -> None:
        """The request takes its row, with all tokens that it has; none of them may be on its way."""
        row, sampling = request.row, request.sampling
        if not sampling.shapes_logits:
            if self.asking[row]:
                self._set(row, Sampling(0))
            self.asking[row] = False
            return
        self.asking[row] = True
        self._set(row, sampling)
        tokens = devices.upload(np.array(request.tokens, np.int64), self.device)
        prompt, answer = tokens.split([request.num_prompt_tokens, len(tokens) - request.num_prompt_tokens])
        occurrences = self.occurrences[row]
        occurrences.zero_().index_fill_(0, prompt, IN_PROMPT)
        occurrences.index_add_(0, answer, torch.full_like(answer, GENERATED, dtype=torch.int32))

    def _set(self, row: int, sampling: Sampling) -> None:
        """Factors and biases of one row."""
        biases = sampling.logit_bias
        assert len(biases) <= MAX_BIASES
        ids = np.zeros(MAX_BIASES, np.int64)
        values = np.zeros(4 + MAX_BIASES, np.float32)
        ids[: len(biases)] = list(biases)
        values[:3] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        values[3] = sampling.shapes_logits
        values[4 : 4 + len(biases)] = list(biases.values())
        uploaded = devices.upload(values, self.device)
        self.bias_ids[row] = devices.upload(ids, self.device)
        self.factors[row], self.biases[row] = uploaded.split([4, MAX_BIASES])

    def shape(self, logits: Tensor, rows: Tensor) -> None:
        """Changes float32 [n, vocab] for the rows int32 [n]; nothing in it looks at a value on the host."""
        shape_logits(logits, rows, self.occurrences, self.factors, self.bias_ids, self.biases)

    def record(self, rows: Tensor, token_ids: Tensor) -> None:
        """int32 [n], int64 [n]: what was drawn for these rows; BAD_ROW is nothing, for its request ends."""
        count_tokens(self.occurrences, rows, self.factors, token_ids)
