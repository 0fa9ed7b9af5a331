"""What every layer's attention of one step shares, computed once."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

Gathered = tuple[Tensor, Tensor | None]  # cache rows, additive mask


@dataclass(frozen=True)
class AttentionPlan:
    """S sequences, their queries one behind another; the first `num_decode` have one query each.

    The tensors say what the lists say, on the device. A plan that only decodes may have no lists at all:
    `decode_plan` makes one of tensors whose contents change between replays of a captured step.
    """

    block_tables: Tensor  # int32 [S, max blocks], rows padded with 0
    lengths: Tensor  # int32 [S], keys of each sequence, this step's included
    starts: Tensor  # int32 [S + 1], first query of each sequence; the last is T
    num_decode: int
    query_starts: list[int]  # `starts`, or empty
    context_lengths: list[int]  # `lengths`, or empty
    deterministic: bool = False  # a row's result depends on its own sequence alone, bit for bit
    _gathered: dict[int, Gathered] = field(default_factory=dict)
    _tiles: dict[int, Tensor] = field(default_factory=dict)
    _over_gathered: list["AttentionPlan"] = field(default_factory=list)  # one or none
    _over_copies: list["AttentionPlan"] = field(default_factory=list)  # likewise

    @property
    def num_sequences(self) -> int:
        return self.block_tables.shape[0]

    def over_gathered(self) -> "AttentionPlan":
        """The same over pages that were gathered one table behind another, made once a step."""
        if not self._over_gathered:
            tables = torch.arange(
                self.block_tables.numel(), dtype=torch.int32, device=self.block_tables.device
            )
            self._over_gathered.append(self.over(tables.view(self.block_tables.shape)))
        return self._over_gathered[0]

    def over(self, block_tables: Tensor) -> "AttentionPlan":
        """The same where pages lie elsewhere."""
        return replace(self, block_tables=block_tables, _gathered={}, _over_gathered=[], _over_copies=[])

    @property
    def prompt_lengths(self) -> list[int]:
        """Keys of each sequence behind the decode."""
        return self.context_lengths[self.num_decode :]

    def over_copies(self, block_tokens: int) -> "AttentionPlan":
        """The same over copies of the pages of all sequences behind the decode, one behind another from page
        0 on; tables [S, 1] tell the first page of each. Made once a step."""
        if not self._over_copies:
            pages = [-(-length // block_tokens) for length in self.prompt_lengths]
            firsts = [0] * self.num_decode + [0, *accumulate(pages[:-1])]
            self._over_copies.append(self.over(on_device(firsts, self.lengths.device)[:, None]))
        return self._over_copies[0]

    @cached_property
    def apart(self) -> tuple["AttentionPlan", "AttentionPlan"]:
        """The decode, which the device alone knows, and the prompts as if nothing were before them."""
        count, fixed = self.num_decode, self.deterministic
        decodes = AttentionPlan(
            self.block_tables[:count], self.lengths[:count], self.starts[: count + 1], count, [], [], fixed
        )
        prompts = AttentionPlan(
            self.block_tables[count:],
            self.lengths[count:],
            self.starts[count:] - count,
            0,
            [start - count for start in self.query_starts[count:]],
            self.context_lengths[count:],
            fixed,
        )
        return decodes, prompts

    @cached_property
    def longest_prompt(self) -> int:
        """Keys of the longest sequence behind the decode; 0 where there is none, or no lists."""
        return max(self.prompt_lengths, default=0)

    def gathered(self, window: int, kv_heads: int, block_tokens: int, dtype: torch.dtype) -> Gathered:
        """What a decode that gathers its pages needs of this window, made once a step: `gather_plan`."""
        assert self.context_lengths, "a plan of the device's own has no lists to gather by"
        if window not in self._gathered:
            self._gathered[window] = gather_plan(
                self.block_tables,
                self.context_lengths,
                self.num_decode,
                kv_heads,
                block_tokens,
                window,
                dtype,
            )
        return self._gathered[window]

    def tiles(self, tile_queries: int) -> Tensor:
        """The queries behind the decode, `tile_queries` at a time, made once a step.

        -> int32 [tiles, 2], sequence and first query within its chunk; late queries, which see the most
        keys, come first, so that the longest work is not begun last.
        """
        if tile_queries not in self._tiles:
            found = []
            for sequence in range(self.num_decode, self.num_sequences):
                count = self.query_starts[sequence + 1] - self.query_starts[sequence]
                length = self.context_lengths[sequence]
                found += [
                    (count - first - length, sequence, first) for first in range(0, count, tile_queries)
                ]
            pairs = [(sequence, first) for _, sequence, first in sorted(found)]
            self._tiles[tile_queries] = on_device(
                [number for pair in pairs for number in pair], self.lengths.device
            ).view(-1, 2)
        return self._tiles[tile_queries]


def plan_attention(
    block_tables: Tensor,
    query_starts: list[int],
    context_lengths: list[int],
    num_decode: int,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    deterministic: bool = False,
) -> AttentionPlan:
    """The lists are always given; `lengths` and `starts` are copied from them where the caller has none."""
    if lengths is None or starts is None:
        packed = on_device(context_lengths + query_starts, block_tables.device)
        lengths, starts = packed.split([len(context_lengths), len(query_starts)])
    return AttentionPlan(
        block_tables, lengths, starts, num_decode, query_starts, context_lengths, deterministic
    )


def decode_plan(
    block_tables: Tensor, lengths: Tensor, starts: Tensor | None = None, *, deterministic: bool = False
) -> AttentionPlan:
    """One query a sequence, known to the device alone: nothing is copied from it or to it.

    int32 [S, max blocks], int32 [S], int32 [S + 1] counting from 0 (None: made here). A padded row has length
    0 or 1 and block 0.
    """
    sequences = block_tables.shape[0]
    if starts is None:
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=block_tables.device)
    return AttentionPlan(block_tables, lengths, starts, sequences, [], [], deterministic)


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """int32; the host does not wait for the copy, which from pageable memory would wait for earlier work."""
    on_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=on_cuda).to(device, non_blocking=True)


def gather_plan(
    block_tables: Tensor,
    context_lengths: list[int],
    num_decode: int,
    kv_heads: int,
    block_tokens: int,
    window: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """What the gathering decode of one window needs -> (cache rows, additive mask or None).

    Rows are int64 [num_decode * kv_heads * pages]; the mask [num_decode, 1, 1, pages * 16] is None when
    every gathered token is seen by its query.
    """
    device = block_tables.device
    lengths = context_lengths[:num_decode]
    starts = [max(0, length - window) if window else 0 for length in lengths]
    pages = max(
        -(-length // block_tokens) - start // block_tokens
        for start, length in zip(starts, lengths, strict=True)
    )
    first_pages = [start // block_tokens for start in starts]
    tables = block_tables[:num_decode].long()
    if any(first_pages):
        columns = torch.tensor(first_pages, device=device)[:, None] + torch.arange(pages, device=device)
        tables = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
    else:
        tables = tables[:, :pages]
    rows = (tables[:, None, :] * kv_heads + torch.arange(kv_heads, device=device)[:, None]).flatten()
    ends = [length - page * block_tokens for page, length in zip(first_pages, lengths, strict=True)]
    begins = [start - page * block_tokens for page, start in zip(first_pages, starts, strict=True)]
    tokens = pages * block_tokens
    if all(end == tokens for end in ends) and not any(begins):
        return rows, None
    token = torch.arange(tokens, device=device)
    seen = (token < torch.tensor(ends, device=device)[:, None]) & (
        token >= torch.tensor(begins, device=device)[:, None]
    )
    mask = torch.zeros(num_decode, 1, 1, tokens, dtype=dtype, device=device)
    return rows, mask.masked_fill_(~seen[:, None, None], float("-inf"))
