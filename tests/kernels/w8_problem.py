"""8-bit linears as kernels/w8_linear is given them, quantized in torch, and what they must come to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.kernels.fp8_linear.reference import quantize_rows

THRESHOLD = 6.0


@dataclass(frozen=True)
class Problem:
    """Weights, codes and steps; int8's rows have outliers in some columns, each in every second row."""

    codes: Tensor  # int8 or float8_e4m3fn [out, in]
    steps: Tensor  # float32 [out]
    x: Tensor  # 16-bit [T, in]
    x_codes: Tensor  # as `codes` [T, in], 0 for outliers
    x_steps: Tensor  # float32 [T]
    bitmap: Tensor  # int32 [1024]

    @property
    def outliers(self) -> Tensor:
        wide = self.x.double()
        is_outlier = (wide.abs() >= THRESHOLD) & (self.codes.dtype is torch.int8)
        return torch.where(is_outlier, wide, 0)

    def wanted(self) -> Tensor:
        """float64 [T, out]."""
        rows = self.x_codes.double() * self.x_steps.double()[:, None] + self.outliers
        return rows @ (self.codes.double() * self.steps.double()[:, None]).t()


def fp8_problem(num_rows: int, outs: int, width: int, dtype: torch.dtype) -> Problem:
    """On the CPU, random."""
    codes, steps = quantize_rows(torch.randn(outs, width) * 0.05)
    x = torch.randn(num_rows, width) * 2
    x[:, width // 2] *= 30
    x = x.to(dtype)
    return Problem(codes, steps, x, *quantize_rows(x), bits_of(torch.zeros(width)))


def problem(num_rows: int, outs: int, width: int, count: int, dtype: torch.dtype) -> Problem:
    """On the CPU, random, of int8."""
    codes = torch.randint(-127, 128, (outs, width), dtype=torch.int8)
    steps = torch.rand(outs) * 1e-3 + 1e-4
    x = torch.randn(num_rows, width).clamp_(-5.5, 5.5)
    columns = torch.randperm(width)[:count]
    has = (torch.arange(num_rows)[:, None] + torch.arange(count)) % 2 == 0
    lifted = torch.empty(has.shape).uniform_(6, 60).copysign(x[:, columns])
    x[:, columns] = torch.where(has, lifted, x[:, columns])
    x = x.to(dtype)
    is_outlier = x.float().abs() >= THRESHOLD
    regular = x.float().masked_fill(is_outlier, 0)
    x_steps = regular.abs().amax(1) / 127
    x_codes = (regular / x_steps[:, None]).round().to(torch.int8)
    return Problem(codes, steps, x, x_codes, x_steps, bits_of(is_outlier.any(0)))


def bits_of(flags: Tensor) -> Tensor:
    """bool [in] -> int32 [1024], bit i of word j for column 32 j + i."""
    padded = torch.zeros(1 << 15, dtype=torch.int64)
    padded[: len(flags)] = flags
    words = (padded.view(-1, 32) << torch.arange(32)).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
