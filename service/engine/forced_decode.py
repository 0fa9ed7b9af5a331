"""Decode steps over known tokens (teacher forcing), by the rows, steps and graphs that serve requests.

evaluate --windows, blocks--> ForcedDecode --position--> logits
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from service.engine.startup import Serving
from service.model.batch import position_batch


class ForcedDecode:
    """Sequences side by side, each token by token. The engine must be idle: its rows lend themselves.

    `blocks` of sequence i take its K and V. More sequences than the engine has rows are computed all the
    same, without its graphs.
    """

    def __init__(self, serving: Serving, sequences: Sequence[list[int]], blocks: Sequence[list[int]]) -> None:
        self._serving = serving
        self._sequences = sequences
        self._blocks = blocks
        state = serving.engine.runner.state
        self._has_rows = len(sequences) <= state.padding
        if self._has_rows:
            for row, held in enumerate(blocks):
                state.extend(row, 0, held)

    def logits(self, count: int, position: int) -> Tensor:
        """Feeds the token at `position` of the first `count` sequences, after all before it.

        -> [count, vocab], any float type, overwritten by the next call.
        """
        model, runner = self._serving.model, self._serving.engine.runner
        if not self._has_rows:
            held = [list(blocks) for blocks in self._blocks[:count]]
            batch = position_batch(list(self._sequences[:count]), held, position, model.device)
            return model.forward(batch, self._serving.kv)
        for row in range(count):
            runner.state.resume(row, position, self._sequences[row][position])
        graph = runner.graphs.forward(count) if runner.graphs else None
        runner.state.select(np.arange(count), graph.num_rows if graph else count)
        runner.state.flush()
        if graph:
            return graph.replay()[:count]
        return runner.decode_step.logits(count, [position + 1] * count)
