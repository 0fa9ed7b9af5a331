"""Penalties, biases and counts on a CUDA device, alone and in a captured step. `pytest -m gpu`, by hand."""

import pytest
import torch
from torch import Tensor

from service import device as devices
from service.engine.penalties import Penalties
from service.engine.request import Request
from service.kernels.shape_logits import reference
from service.messages import Sampling, Submit

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
VOCAB = 128_256
ROWS = 256


def seated(device: torch.device) -> Penalties:
    """Every other row asks, each for something else; the last row is padding."""
    penalties = Penalties(ROWS + 1, VOCAB, device)
    generator = torch.Generator().manual_seed(1)
    for row in range(0, ROWS, 2):
        prompt = torch.randint(0, VOCAB, (512,), generator=generator).tolist()
        answer = torch.randint(0, 50, (200,), generator=generator).tolist()
        sampling = Sampling(
            1,
            presence_penalty=row / 128 - 1,
            frequency_penalty=1 - row / 128,
            repetition_penalty=0.5 + row / 100,
            logit_bias={token: float(token - 150) / 3 for token in range(row, row + 300)},
        )
        request = Request(Submit(row, prompt, sampling), row, frozenset(), 10_000)
        request.tokens += answer
        request.row = row
        penalties.seat(request)
    return penalties


def tables(penalties: Penalties) -> list[Tensor]:
    return [penalties.occurrences, penalties.factors, penalties.bias_ids, penalties.biases]


def test_a_gpu_agrees_with_the_reference_in_any_company() -> None:
    on_cpu, on_gpu = seated(torch.device("cpu")), seated(CUDA)
    for mine, theirs in zip(tables(on_cpu), tables(on_gpu), strict=True):
        assert torch.equal(mine, theirs.cpu())
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(2)) * 8
    rows = torch.randperm(ROWS).to(torch.int32)
    want, got = logits.clone(), logits.to(CUDA)
    on_cpu.shape(want, rows)
    on_gpu.shape(got, rows.to(CUDA))
    torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=2e-5)
    neutral = rows % 2 == 1
    assert torch.equal(got.cpu()[neutral], logits[neutral])
    for place in range(0, ROWS, 37):
        alone = logits[place : place + 1].to(CUDA)
        on_gpu.shape(alone, rows[place : place + 1].to(CUDA))
        assert torch.equal(alone[0], got[place])
    drawn = torch.randint(-1, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))
    on_cpu.record(rows, drawn)
    on_gpu.record(rows.to(CUDA), drawn.to(CUDA))
    assert torch.equal(on_cpu.occurrences, on_gpu.occurrences.cpu())


def test_a_captured_step_reads_the_rows_of_its_replay() -> None:
    penalties = seated(CUDA)
    logits = torch.zeros(8, VOCAB, device=CUDA)
    rows = torch.full((8,), ROWS, dtype=torch.int32, device=CUDA)  # padding
    given = torch.zeros_like(logits)
    drawn = torch.zeros(8, dtype=torch.int64, device=CUDA)

    def step() -> Tensor:
        logits.copy_(given)
        penalties.shape(logits, rows)
        drawn.copy_(logits.argmax(-1))
        penalties.record(rows, drawn)
        return drawn

    with torch.inference_mode():
        before = penalties.occurrences.clone()
        captured = devices.GraphPool().capture(step)
        assert torch.equal(penalties.occurrences, before)
        given.normal_()
        rows.copy_(torch.tensor([4, 1, 0, 6, 3, ROWS, ROWS, ROWS], dtype=torch.int32))
        want = given.cpu()
        cpu_tables = [table.cpu() for table in tables(penalties)]
        reference.shape_logits(want, rows.cpu(), *cpu_tables)
        got = captured.replay().clone()
        torch.testing.assert_close(logits.cpu(), want, rtol=2e-6, atol=2e-5)
        changed = (penalties.occurrences - before).nonzero().tolist()
        assert changed == sorted([row, int(got[place])] for place, row in ((0, 4), (2, 0), (3, 6)))
