"""Filtered draws on a CUDA device over real vocabularies. `pytest -m gpu`, by hand."""

import pytest
import torch
from torch import Tensor

from service import device as devices
from service.kernels.sample import sample
from service.kernels.sample.reference import scaled
from service.kernels.sample_likely import kept, reference, sample_likely

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
ROWS = 96
# top-k, top-p, min-p
FILTERS = [
    (0, 1.0, 0.0),
    (50, 1.0, 0.0),
    (0, 0.9, 0.0),
    (20, 0.95, 0.0),
    (0, 1.0, 0.05),
    (5000, 0.8, 0.001),
    (1, 0.5, 0.0),
    (0, 0.999, 0.0),
]


def asked(rows: int) -> list[Tensor]:
    """Temperature, seeds, positions, sample indices, top-k, top-p, min-p."""
    count = torch.arange(rows, device=CUDA)
    top_k, top_p, min_p = zip(*(FILTERS[row % len(FILTERS)] for row in range(rows)), strict=True)
    temperature = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.0, 1.0, 2.0])[torch.arange(rows) % 7].to(CUDA)
    fractions = torch.tensor((top_p, min_p), dtype=torch.float64, device=CUDA)
    tokens = torch.tensor(top_k, dtype=torch.int32, device=CUDA)
    # columns of matrices, as a step has them
    columns = torch.stack((tokens, tokens, tokens), 1)[:, 1], *fractions.t().contiguous().unbind(1)
    return [temperature, count * -977, count * 31, count % 3, *columns]


def logits_of(kind: str, rows: int, vocab: int) -> Tensor:
    logits = torch.randn(rows, vocab, device=CUDA, generator=torch.Generator(CUDA).manual_seed(vocab))
    if kind == "steep":
        logits *= 4
    elif kind == "ties":
        logits = (logits * 4).round()
    elif kind == "alike":
        logits.fill_(3.0)
    elif kind == "half of no mass":
        logits[:, ::2] = -1e30
    return logits


@pytest.mark.parametrize("vocab", [49_152, 128_256, 151_936, 262_144, 7])
@pytest.mark.parametrize("kind", ["flat", "steep", "ties", "alike", "half of no mass"])
def test_filtered_draws(kind: str, vocab: int) -> None:
    """In any company and again and again the same; the reference's but where a sum falls on a border."""
    logits, columns = logits_of(kind, ROWS, vocab), asked(ROWS)
    torch.use_deterministic_algorithms(True)  # memory that is handed out is full of NaN
    try:
        got = sample_likely(logits, *columns)
        for _ in range(5):
            assert torch.equal(sample_likely(logits, *columns), got), "run to run"
    finally:
        torch.use_deterministic_algorithms(False)
    for row in (0, 1, 2, 3, 29, 95):
        alone = sample_likely(logits[row : row + 1], *[column[row : row + 1] for column in columns])
        assert alone == got[row]
    neutral = slice(0, ROWS, len(FILTERS))
    assert torch.equal(got[neutral], sample(logits, *columns[:4])[neutral])
    want = reference.sample_likely(logits.cpu(), *[column.cpu() for column in columns])
    assert (got.cpu() == want).float().mean() >= 0.97
    over = scaled(logits, columns[0])
    # a hair more than what is kept: sums on the border may fall on either side
    wide = kept(over, columns[4].long(), columns[5] + 1e-5 * (columns[5] < 1), columns[6] * (1 - 1e-6))
    drawn = columns[0] > 0
    assert wide.gather(1, got.unsqueeze(1)).squeeze(1)[drawn].all()
    assert torch.equal(got[~drawn], logits.argmax(-1)[~drawn])


def test_shares_of_what_is_kept() -> None:
    """60,000 rows of 16 tokens in steps of a replay's size: each share within five deviations."""
    logits = torch.linspace(0, 3, 16, device=CUDA).flip(0).expand(60_000, 16)
    columns = asked(60_000)
    columns[0].fill_(1.0)
    drawn = sample_likely(logits, *columns)
    for place, (top_k, top_p, min_p) in enumerate(FILTERS):
        one = torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double()
        over = scaled(logits[:1].cpu(), torch.ones(1))
        weights = over.exp().double() * kept(over, *one)
        shares = (weights / weights.sum())[0]
        mine = drawn[place :: len(FILTERS)].cpu()
        found = torch.bincount(mine, minlength=16) / len(mine)
        assert ((found - shares).abs() <= 5 * (shares * (1 - shares) / len(mine)).sqrt() + 1e-12).all()


def test_a_broken_row_is_told_and_moves_no_other() -> None:
    logits, columns = logits_of("steep", ROWS, 128_256), asked(ROWS)
    want = sample_likely(logits, *columns)
    logits[2, 5], logits[3, 128_255], logits[4, 4096] = torch.nan, torch.inf, -torch.inf
    want[2:5] = -1
    assert torch.equal(sample_likely(logits, *columns), want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_captured_draw_takes_the_filters_of_its_replay() -> None:
    logits, columns = logits_of("steep", 24, 128_256), asked(24)
    neutral = [*columns[:4], torch.zeros_like(columns[4]), *columns[5:]]
    neutral[5], neutral[6] = torch.ones_like(columns[5]), torch.zeros_like(columns[6])
    given, held = logits.clone(), [column.clone() for column in neutral]
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = sample_likely(logits, *columns)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        captured = devices.GraphPool().capture(lambda: sample_likely(given, *held))
        for column, wanted in zip(held, columns, strict=True):
            column.copy_(wanted)
        assert torch.equal(captured.replay(), eager)
        given.copy_(logits.flip(1))
        assert torch.equal(captured.replay(), sample_likely(logits.flip(1), *columns))
