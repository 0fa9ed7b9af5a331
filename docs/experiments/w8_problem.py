"""One W8A8 linear for w8_tile.cu: operands as kernels before it would leave them, and what they must come to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

THRESHOLD, FP8_MOST = 6.0, 448.0


@dataclass
class Problem:
    """x [rows, K] with outliers in `count` columns, each in about half of the rows; random weights.

    The operands of int8: codes with zeros for outliers, x16 (16 bits, with the outliers), and the bitmap of columns.
    """

    rows: int
    n: int
    k: int
    count: int
    device: str
    like: "Problem | None" = None  # whose weights are taken
    threshold: float = THRESHOLD
    bf16: int = 0
    w: Tensor = field(init=False)
    w8: Tensor = field(init=False)
    w_steps: Tensor = field(init=False)
    x16: Tensor = field(init=False)
    codes: Tensor = field(init=False)
    steps: Tensor = field(init=False)
    bitmap: Tensor = field(init=False)
    x8: Tensor = field(init=False)
    x8_steps: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.device
        if self.like is not None:
            self.w, self.w8, self.w_steps = self.like.w, self.like.w8, self.like.w_steps
        else:
            self.w = torch.randint(-127, 128, (self.n, self.k), device=device, dtype=torch.int8)
            self.w8 = (self.w.float() * (FP8_MOST / 127)).to(torch.float8_e4m3fn)
            self.w_steps = torch.rand(self.n, device=device) * 1e-3 + 1e-4
        x = torch.randn(self.rows, self.k, device=device).clamp_(-5.5, 5.5)
        listed = torch.randperm(self.k, device=device)[: self.count].sort().values
        has = (
            torch.arange(self.rows, device=device)[:, None] + torch.arange(self.count, device=device)[None, :]
        ) % 2 == 0
        lifted = torch.empty(has.shape, device=device).uniform_(6, 60) * torch.where(x[:, listed] < 0, -1, 1)
        x[:, listed] = torch.where(has, lifted, x[:, listed])
        self.x16 = x.to(self.dtype)
        outlier = self.x16.float().abs() >= self.threshold
        regular = torch.where(outlier, 0, self.x16.float())
        self.steps = regular.abs().amax(1) / 127
        self.codes = (regular / self.steps[:, None]).round().to(torch.int8)
        self.bitmap = bits(outlier.any(0))
        self.x8_steps = x.abs().amax(1) / FP8_MOST
        self.x8 = (x / self.x8_steps[:, None]).to(torch.float8_e4m3fn)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16

    def operands(self, fp8: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> weight, activations (both 8 bits), steps of the activations' rows."""
        return (self.w8, self.x8, self.x8_steps) if fp8 else (self.w, self.codes, self.steps)

    def want(self, fp8: int) -> Tensor:
        """float64 [rows, n], in parts of the outputs."""
        w, x, steps = self.operands(fp8)
        wide = x.double() * steps.double()[:, None]
        if not fp8:
            x16 = self.x16.double()
            wide = wide + torch.where(x16.abs() >= self.threshold, x16, 0)
        parts = [
            wide @ part.double().t() * scale.double()
            for part, scale in zip(w.split(4096), self.w_steps.split(4096), strict=True)
        ]
        return torch.cat(parts, 1)


def bits(columns: Tensor) -> Tensor:
    """bool [K] -> int32 [K / 32 rounded up], bit i of word j for column 32 j + i."""
    padded = torch.zeros(-(-len(columns) // 32) * 32, dtype=torch.int64, device=columns.device)
    padded[: len(columns)] = columns
    words = (padded.view(-1, 32) << torch.arange(32, device=columns.device)).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
