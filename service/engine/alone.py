"""A step's rows one at a time: what torch computes for a row is then the same in every company.

runner, decode_step --rows--> the sampler's `draw` and `logprobs`, called for each row by itself

torch may add up one row in another way than many, and a row's place in memory may decide how its sum begins;
of equal log-probabilities at the end of a list of the likeliest, any may be the one that is told. So each row
gets a copy of its own, and a list of its own length. On a CPU that goes for draws too; on a GPU our own
kernels draw, which give each row a program.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from service.engine.sampler import Logprobs, SamplingRows, draw, logprobs

PARAMETERS = [field.name for field in fields(SamplingRows) if field.name != "variant"]


def draw_alone(logits: Tensor, rows: SamplingRows, suppressed: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As `draw`; the likeliest token needs no care."""
    if rows.variant == "greedy":
        return draw(logits, rows, suppressed)
    drawn = []
    for row in range(len(logits)):
        one = slice(row, row + 1)
        its_rows = replace(rows, **{name: getattr(rows, name)[one] for name in PARAMETERS})
        its_suppressed = None
        if suppressed is not None:
            its_ids = suppressed[1][suppressed[0] == row]
            its_suppressed = torch.zeros_like(its_ids), its_ids
        drawn.append(draw(logits[one].clone(), its_rows, its_suppressed))
    return torch.cat(drawn)


def logprobs_alone(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> Logprobs:
    """As `logprobs`, with a number of the likeliest for each row; the others' places hold zeros."""
    found = [
        logprobs(logits[row : row + 1].clone(), token_ids[row : row + 1], count)
        for row, count in enumerate(num_top)
    ]
    widest = max(one.top_ids.shape[1] for one in found)

    def wide(top: Tensor) -> Tensor:
        return pad(top, (0, widest - top.shape[1]))

    return Logprobs(
        torch.cat([one.chosen for one in found]),
        torch.cat([one.ranks for one in found]),
        torch.cat([wide(one.top_ids) for one in found]),
        torch.cat([wide(one.top_logprobs) for one in found]),
    )
