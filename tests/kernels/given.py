"""What a kernel is given where only its memory accesses count: random, made on the CPU, of exact size.

Made there so that a tool that instruments every kernel of the device has only ours before it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from service.kernels.kv_codes import quantized
from service.kernels.paged_attention import AttentionPlan, decode_plan, plan_attention

PAGE = 16
FAR_BLOCKS = 1 << 16  # behind the last: where nothing is allocated


@dataclass(frozen=True)
class Given:
    """For tensors of one device; the same each time."""

    device: torch.device
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """low <= each < high."""
        made = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64)
        return made.to(dtype).to(self.device)

    def words(self, *shape: int) -> Tensor:
        """int32 of any bits."""
        return self.integers(-(1 << 31), 1 << 31, *shape)

    def scales(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.rand(shape, generator=self.generator) * 0.02 + 0.01
        return made.to(dtype).to(self.device)

    def told(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def pages(
        self,
        lengths: list[int],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        codes: torch.dtype | None = None,
    ) -> "Cache":
        """Pages in a random order; a table names blocks that do not exist behind those of its sequence."""
        pages = [-(-length // PAGE) for length in lengths]
        num_blocks = sum(pages) + 1
        tables = torch.full((len(lengths), max(pages)), num_blocks + FAR_BLOCKS, dtype=torch.int32)
        free = (torch.randperm(sum(pages), generator=self.generator) + 1).int()
        for table, blocks in zip(tables, free.split(pages), strict=True):
            table[: len(blocks)] = blocks
            if not len(blocks):  # a padded row's only block is block 0
                table[0] = 0
        shape = (num_blocks, kv_heads, PAGE, head_dim)
        caches = [torch.randn(shape, generator=self.generator).to(dtype) for _ in range(2)]
        if codes is not None:
            (keys, of_keys), (values, of_values) = (quantized(cache, codes) for cache in caches)
            caches = [keys, values, torch.stack((of_keys, of_values), -1)]
        return Cache(lengths, tables.to(self.device), [cache.to(self.device) for cache in caches])


@dataclass(frozen=True)
class Cache:
    """K and V of sequences in shuffled pages."""

    lengths: list[int]
    tables: Tensor
    caches: list[Tensor]  # and scales where they are codes

    def decode(self, *, deterministic: bool = False) -> AttentionPlan:
        """Lengths that the device alone knows."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32).to(self.tables.device)
        return decode_plan(self.tables, lengths, deterministic=deterministic)

    def plan(self, chunks: list[int], num_decode: int, *, deterministic: bool = False) -> AttentionPlan:
        """`chunks`: queries of each sequence, its last tokens."""
        starts = [sum(chunks[:number]) for number in range(len(chunks) + 1)]
        return plan_attention(self.tables, starts, self.lengths, num_decode, deterministic=deterministic)
