"""What a launched step gives, once the device has it: tokens and log-probabilities, by chunk.

runner --Pending--> engine --collect--> StepResult
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.device import Readback
from service.engine.sampler import BAD_ROW, Logprobs
from service.messages import TokenLogprobs


@dataclass(slots=True)
class StepResult:
    """By chunk, in the chunks' order; the dictionaries hold only the chunks that asked."""

    token_ids: list[int | None]  # None: nothing was drawn; BAD_ROW: the logits are broken
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass(slots=True)
class Scored:
    """Prompt tokens whose log-probabilities a chunk computes."""

    chunk: int
    token_ids: list[int]
    num_top: int
    found: Logprobs


@dataclass(slots=True)
class Asked:
    """Drawn tokens whose log-probabilities were asked for."""

    places: list[int]  # among the drawn
    num_top: list[int]  # of each
    found: Logprobs


class Pending:
    """A step on its way; `drawn` are the chunks that get a token, in the order of `token_ids`."""

    def __init__(
        self,
        device: torch.device,
        num_chunks: int,
        drawn: list[int],
        token_ids: Tensor | None,
        asked: Asked | None = None,
        scored: list[Scored] | None = None,
    ) -> None:
        self._num_chunks = num_chunks
        self._drawn = drawn
        self._asked = asked
        self._scored = scored or []
        tensors = [] if token_ids is None else [token_ids]
        for found in ([asked.found] if asked else []) + [part.found for part in self._scored]:
            tensors += found.columns()
        # one without results is waited for too, or a long prompt would be launched whole, ahead of all others
        self._readback = Readback(tensors, device)

    def collect(self) -> StepResult:
        """Waits for the step, and for no later one."""
        columns = [tensor.tolist() for tensor in self._readback.wait()]
        drawn: list[int] = columns.pop(0) if self._drawn else []
        result = StepResult([None] * self._num_chunks)
        for chunk, token_id in zip(self._drawn, drawn, strict=True):
            result.token_ids[chunk] = token_id
        if asked := self._asked:
            token_ids = [drawn[place] for place in asked.places]
            entries = told(token_ids, asked.num_top, columns)
            for place, entry in zip(asked.places, entries, strict=True):
                if entry.token_id != BAD_ROW:
                    result.logprobs[self._drawn[place]] = entry
        for part in self._scored:
            entries = told(part.token_ids, [part.num_top] * len(part.token_ids), columns)
            if all(np.isfinite(entry.logprob) for entry in entries):
                result.prompt_logprobs[part.chunk] = entries
            else:
                result.token_ids[part.chunk] = BAD_ROW
        return result


def told(token_ids: list[int], num_top: list[int], columns: list[list[Any]]) -> list[TokenLogprobs]:
    """Tokens, how many alternatives each is told with, and the next four columns, which are used up."""
    chosen, ranks, top_ids, top_logprobs = (columns.pop(0) for _ in range(4))
    return [
        TokenLogprobs(token_id, chosen[i], ranks[i], top_ids[i][:count], top_logprobs[i][:count])
        for i, (token_id, count) in enumerate(zip(token_ids, num_top, strict=True))
    ]
