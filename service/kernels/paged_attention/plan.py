"""What every layer's attention of one step shares, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Gathered = tuple[Tensor, Tensor | None]  # cache rows, additive mask

SHORT_PROMPT_TOKENS = 2048  # with what is in the cache already: other tiles are the fastest up to here

# of a step's prompts and what they see of the cache, where codes are unpacked for them
COPIED_TOKENS = 16_384


class Copies(NamedTuple):
    """Of the pages of all prompts, one behind another."""

    firsts: Tensor  # int32 [S, 1], number of the first of each sequence
    pages: Tensor  # int32 [copies, 2], sequence and page within it


class PromptTiles:
    """Of a captured step, whose prompts change between its replays: what is planned of them, in as many
    places as ever.

    `fill` is to be called before each replay, when the kernels have asked for their tables. They are made
    here, for what a captured step makes is made anew by each replay.
    """

    def __init__(
        self,
        num_queries: int,
        num_prompts: int,
        nobody: int,
        is_long: bool,
        device: torch.device,
        num_pages: int = 0,
    ) -> None:
        """`nobody`: the last sequence, without queries and keys, of which the places are that are left.
        `is_long`: a prompt may have more than SHORT_PROMPT_TOKENS keys. `num_pages`: of all prompts, at most,
        where they are copied."""
        self.longest_prompt = SHORT_PROMPT_TOKENS + is_long
        self._num_queries = num_queries
        self._num_prompts = num_prompts
        self._nobody = nobody
        self._pairs = torch.zeros(num_queries + num_prompts, 2, dtype=torch.int32, device=device)
        self._pairs[:, 0] = nobody
        self._tables: dict[int, Tensor] = {}
        self._copies = Copies(
            torch.zeros(nobody + 1, 1, dtype=torch.int32, device=device),
            torch.zeros(num_pages, 2, dtype=torch.int32, device=device),
        )
        self._copies.pages[:, 0] = nobody
        self._page_tokens = 0

    @property
    def are_copied(self) -> bool:
        return len(self._copies.pages) > 0

    def copies(self, page_tokens: int) -> Copies:
        """As AttentionPlan.copies says; it stays where it is."""
        assert self.are_copied
        self._page_tokens = page_tokens
        return self._copies

    def table(self, tile_queries: int) -> Tensor:
        """int32 [tiles, 2], as AttentionPlan.tiles says; it stays where it is."""
        if tile_queries not in self._tables:
            begin = sum(map(len, self._tables.values()))
            end = begin + self._num_queries // tile_queries + self._num_prompts
            assert end <= len(self._pairs), "kernels of one step ask for too many kinds of tiles"
            self._tables[tile_queries] = self._pairs[begin:end]
        return self._tables[tile_queries]

    def fill(self, first: int, counts: list[int], lengths: list[int]) -> None:
        """Sequences from number `first` on, of so many queries and, these included, keys."""
        for tile_queries, table in self._tables.items():
            found = cut(first, counts, lengths, tile_queries)
            found += [(self._nobody, 0)] * (len(table) - len(found))
            table.copy_(on_host(found, table.device), non_blocking=True)
        if self._page_tokens:
            firsts, pages = paged(first, lengths, self._page_tokens)
            assert len(pages) <= len(self._copies.pages)
            pages += [(self._nobody, 0)] * (len(self._copies.pages) - len(pages))
            firsts += [0] * (len(self._copies.firsts) - len(firsts))
            for table, told in ((self._copies.firsts.view(-1), firsts), (self._copies.pages, pages)):
                table.copy_(on_host(told, table.device), non_blocking=True)


def paged(first: int, lengths: list[int], page_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Keys of sequences from number `first` on -> number of the first page of each sequence, those before
    included, and sequence and number within it of every page."""
    pages = [
        (sequence, page)
        for sequence, length in enumerate(lengths, first)
        for page in range(-(-length // page_tokens))
    ]
    counts = [-(-length // page_tokens) for length in lengths]
    return [0] * first + [0, *accumulate(counts)][: len(lengths)], pages


def cut(first: int, counts: list[int], lengths: list[int], tile_queries: int) -> list[tuple[int, int]]:
    """Queries, `tile_queries` at a time -> sequence and first query within its chunk.

    Late queries, which see the most keys, come first, so that the longest work is not begun last.
    """
    found = [
        (count - query - length, sequence, query)
        for sequence, (count, length) in enumerate(zip(counts, lengths, strict=True), first)
        for query in range(0, count, tile_queries)
    ]
    return [(sequence, query) for _, sequence, query in sorted(found)]


@dataclass(frozen=True)
class AttentionPlan:
    """S sequences, their queries one behind another; the first `num_decode` have one query each.

    The tensors say what the lists say, on the device. The plan of a captured step, whose tensors' contents
    change between replays, has no lists: `decode_plan` and `mixed_plan` make one.
    """

    block_tables: Tensor  # int32 [S, max blocks], rows padded with 0
    lengths: Tensor  # int32 [S], keys of each sequence, this step's included
    starts: Tensor  # int32 [S + 1], first query of each sequence; the last is T
    num_decode: int
    query_starts: list[int]  # `starts`, or empty
    context_lengths: list[int]  # `lengths`, or empty
    deterministic: bool = False  # a row's result depends on its own sequence alone, bit for bit
    open_tiles: PromptTiles | None = None  # of a captured step with prompts
    first_row: int = 0  # of the step's rows, that `starts` counts from
    _gathered: dict[int, Gathered] = field(default_factory=dict)
    _tiles: dict[int, Tensor] = field(default_factory=dict)
    _over_gathered: list["AttentionPlan"] = field(default_factory=list)  # one or none
    _copies: list[Copies] = field(default_factory=list)  # likewise

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
        return replace(self, block_tables=block_tables, _gathered={}, _over_gathered=[], _copies=[])

    @property
    def prompt_lengths(self) -> list[int]:
        """Keys of each sequence behind the decode."""
        return self.context_lengths[self.num_decode :]

    @property
    def are_copied(self) -> bool:
        """Whether prompts' pages may be copied: their keys are at most COPIED_TOKENS, and how many they are
        may decide for all of them."""
        if self.open_tiles:
            return self.open_tiles.are_copied
        return not self.deterministic and sum(self.prompt_lengths) <= COPIED_TOKENS

    def copies(self, page_tokens: int) -> Copies:
        """Where copies of all prompts' pages are to lie, made once a step; that `are_copied`."""
        if self.open_tiles:
            return self.open_tiles.copies(page_tokens)
        if not self._copies:
            firsts, pages = paged(self.num_decode, self.prompt_lengths, page_tokens)
            device = self.lengths.device
            flat = [number for pair in pages for number in pair]
            self._copies.append(
                Copies(on_device(firsts, device)[:, None], on_device(flat, device).view(-1, 2))
            )
        return self._copies[0]

    @cached_property
    def apart(self) -> tuple["AttentionPlan", "AttentionPlan"]:
        """The decode, which the device alone knows, and the prompts as if nothing were before them.

        Of a captured step, whose number of rows that decode changes, the prompts are where they are.
        """
        count, fixed = self.num_decode, self.deterministic
        decodes = AttentionPlan(
            self.block_tables[:count], self.lengths[:count], self.starts[: count + 1], count, [], [], fixed
        )
        if self.open_tiles:
            return decodes, mixed_plan(
                self.block_tables, self.lengths, self.starts, 0, self.open_tiles, fixed
            )
        prompts = AttentionPlan(
            self.block_tables[count:],
            self.lengths[count:],
            self.starts[count:] - count,
            0,
            [start - count for start in self.query_starts[count:]],
            self.context_lengths[count:],
            fixed,
            first_row=count,
        )
        return decodes, prompts

    @cached_property
    def longest_prompt(self) -> int:
        """Keys of the longest sequence behind the decode; 0 where there is none. Of a captured step's, which
        may be any, at least on the same side of SHORT_PROMPT_TOKENS."""
        if self.open_tiles:
            return self.open_tiles.longest_prompt
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

        -> int32 [tiles, 2], sequence and first query within its chunk, in the order of `cut`.
        """
        if self.open_tiles:
            return self.open_tiles.table(tile_queries)
        if tile_queries not in self._tiles:
            starts = self.query_starts[self.num_decode :]
            counts = [end - start for start, end in pairwise(starts)]
            found = cut(self.num_decode, counts, self.prompt_lengths, tile_queries)
            flat = [number for pair in found for number in pair]
            self._tiles[tile_queries] = on_device(flat, self.lengths.device).view(-1, 2)
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


def mixed_plan(
    block_tables: Tensor,
    lengths: Tensor,
    starts: Tensor,
    num_decode: int,
    tiles: PromptTiles,
    deterministic: bool = False,
) -> AttentionPlan:
    """As `decode_plan`, with prompts behind: int32 [S, max blocks], int32 [S], int32 [S + 1].

    Of a sequence behind the decode `starts` tells the first row and, in the next place, the last + 1; of the
    first `num_decode` any number: each has the row of its own number, and those of length 0 get zeros.
    """
    return AttentionPlan(block_tables, lengths, starts, num_decode, [], [], deterministic, open_tiles=tiles)


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """int32; the host does not wait for the copy."""
    return on_host(numbers, device).to(device, non_blocking=True)


def on_host(numbers: Sequence[object], device: torch.device) -> Tensor:
    """int32, on its way to `device`: from pageable memory a copy would wait for earlier work."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")


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
