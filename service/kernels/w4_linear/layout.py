"""The order in memory that the W4 kernels read: AutoAWQ's, bitsandbytes' or int3's bits. README.md draws it.

precision/awq, nf4, int3 --pack (once, at load)--> Weight --> cuda.py; reference.py reads it back

Only bits move, so `unpack_awq`, `unpack_nf4` and `unpack_int3` give back exactly what was packed. Repacking
takes some rows at a time, so that loading needs little memory beside the layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["affine", "nf4", "int3"]

BLOCK_ROWS, TILE_K = 16, 64  # outputs and input features that lie together: a tile of codes
TILE_BYTES: dict[Kind, int] = {"affine": 512, "nf4": 512, "int3": 384}
PAIR_BYTES = 256  # of an int3 tile, which each lane's first two words take; the third ones follow
NF4_BLOCK, NESTED_BLOCK = 64, 256  # weights under one absmax, absmax values under one nested absmax
ROWS_AT_ONCE = 2048  # outputs that are repacked together: some 16 bytes a weight are in flight


@dataclass(frozen=True)
class Nested:
    """What codes of absmax mean: map[code] * absmax + offset, of the code's block of 256 and of its part.

    Parts stand one behind the other, each beginning a block of its own.
    """

    map: Tensor  # float32 [256]
    absmax: Tensor  # float32 [nested blocks of all parts]
    offsets: Tensor  # float32 [parts]


@dataclass(frozen=True)
class Weight:
    """One linear of several parts, resident. `zeros` are affine's and int3's, `nested` NF4's."""

    kind: Kind
    codes: Tensor  # uint8 [out / 16, in / 64, 32, 4, 4]; int3: [out / 16, in / 64, 384]
    scales: Tensor  # float16 [in / group, out / 16, 8, 2]; NF4: uint8 [in / 64, out / 16, 8, 2]
    zeros: Tensor | None  # uint8 [in / group, out / 16, 8]
    nested: Nested | None
    outs: tuple[int, ...]  # outputs of each part, multiples of 16

    @property
    def group_size(self) -> int:
        """Weights of an output under one scale."""
        return self.in_features // self.scales.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[0] * BLOCK_ROWS

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * TILE_K

    def first_nested(self) -> list[int]:
        """Of each part, the place of its first nested block."""
        blocks = [-(-out * (self.in_features // NF4_BLOCK) // NESTED_BLOCK) for out in self.outs]
        return [sum(blocks[:part]) for part in range(len(blocks))]


def pack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, outs: Sequence[int]) -> Weight:
    """AutoAWQ's int32 [in, out / 8], int32 [in / group, out / 8], float16 [in / group, out]."""
    in_features, out_features = qweight.shape[0], scales.shape[1]
    codes = _empty_codes("affine", out_features, in_features, qweight.device)
    for start in range(0, out_features, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, out_features))
        nibbles = _from_words(qweight[:, rows.start // 8 : rows.stop // 8]).t()
        codes[rows.start // BLOCK_ROWS : rows.stop // BLOCK_ROWS] = pack_codes(nibbles, "affine")
    zeros = pack_zeros(_from_words(qzeros).t())
    return Weight("affine", codes, by_block(scales.t()), zeros, None, tuple(outs))


def unpack_awq(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, qzeros and scales again."""
    assert weight.zeros is not None
    codes, zeros = unpack_codes(weight.codes, "affine"), unpack_zeros(weight.zeros)
    return _to_words(codes.t()), _to_words(zeros.t()), from_block(weight.scales).t().contiguous()


def pack_int3(codes: Tensor, zeros: Tensor, scales: Tensor, outs: Sequence[int]) -> Weight:
    """uint8 [out, in] and [out, in / group], values 0..7, and float16 [out, in / group]."""
    out_features, in_features = codes.shape
    packed = _empty_codes("int3", out_features, in_features, codes.device)
    for start in range(0, out_features, ROWS_AT_ONCE):
        rows, first = codes[start : start + ROWS_AT_ONCE], start // BLOCK_ROWS
        packed[first : first + len(rows) // BLOCK_ROWS] = pack_codes(rows, "int3")
    return Weight("int3", packed, by_block(scales), pack_zeros(zeros), None, tuple(outs))


def unpack_int3(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zeros and scales again."""
    assert weight.zeros is not None
    return unpack_codes(weight.codes, "int3"), unpack_zeros(weight.zeros), from_block(weight.scales)


def pack_nf4(codes: Tensor, absmax: Sequence[Tensor], nested: Nested, outs: Sequence[int]) -> Weight:
    """bitsandbytes' codes uint8 [out * in / 2] of all parts (the earlier weight in the high nibble) and of
    each part uint8 absmax [out * in / 64] and padding, which is left out."""
    out_features = sum(outs)
    pairs = codes.view(out_features, -1)
    in_features = pairs.shape[1] * 2
    packed = _empty_codes("nf4", out_features, in_features, codes.device)
    for start in range(0, out_features, ROWS_AT_ONCE):
        part = pairs[start : start + ROWS_AT_ONCE]
        nibbles = torch.stack((part >> 4, part & 15), dim=-1).flatten(1)
        first = start // BLOCK_ROWS
        packed[first : first + len(part) // BLOCK_ROWS] = pack_codes(nibbles, "nf4")
    blocks = in_features // NF4_BLOCK
    rows = [mine[: out * blocks].view(out, blocks) for mine, out in zip(absmax, outs, strict=True)]
    return Weight("nf4", packed, by_block(torch.cat(rows)), None, nested, tuple(outs))


def unpack_nf4(weight: Weight) -> tuple[Tensor, list[Tensor]]:
    """Codes and each part's absmax, without padding."""
    nibbles = unpack_codes(weight.codes, "nf4")
    absmax = from_block(weight.scales).split(list(weight.outs))
    return (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).view(-1), [part.reshape(-1) for part in absmax]


def pack_codes(codes: Tensor, kind: Kind) -> Tensor:
    """uint8 [out, in], values 0..15 -> [out / 16, in / 64, 32 lanes, 4 fragments, 4 bytes].

    int3's of 0..7 -> [out / 16, in / 64, 384].
    """
    out_features, in_features = codes.shape
    view = codes.reshape(out_features // BLOCK_ROWS, 2, 8, in_features // TILE_K, 4, 2, 4, 2)
    fragments = view.permute(0, 3, 2, 6, 4, 5, 1, 7)  # block, tile, g, t, s, k half, row half, pair
    if kind != "nf4":
        fragments = fragments.permute(0, 1, 2, 3, 4, 7, 5, 6)  # registers beside each other, pairs apart
    flat = fragments.reshape(*fragments.shape[:2], 32, 4, 4, 2)
    packed = flat[..., 0] | flat[..., 1] << 4
    return _apart(packed) if kind == "int3" else packed


def unpack_codes(packed: Tensor, kind: Kind) -> Tensor:
    """Inverse of `pack_codes`."""
    blocks, tiles = packed.shape[:2]
    if kind == "int3":
        packed = _together(packed)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(blocks, tiles, 8, 4, 4, 2, 2, 2)
    if kind != "nf4":
        nibbles = nibbles.permute(0, 1, 2, 3, 4, 6, 7, 5)
    return nibbles.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(blocks * BLOCK_ROWS, tiles * TILE_K)


def _apart(nibbles: Tensor) -> Tensor:
    """[.., 32 lanes, 4 fragments, 4 bytes], bit 3 of each nibble 0 -> [.., 384].

    That bit takes the last fragment's, from the highest on. Two words a lane, then the third of each.
    """
    last = nibbles[..., 3, :]
    bits = torch.stack((last >> 2, last >> 1, last), dim=-2) & 0x11
    words = nibbles[..., :3, :] | bits << 3
    return torch.cat((words[..., :2, :].flatten(-3), words[..., 2, :].flatten(-2)), dim=-1)


def _together(packed: Tensor) -> Tensor:
    """Inverse of `_apart`."""
    pairs = packed[..., :PAIR_BYTES].unflatten(-1, (32, 2, 4))
    words = torch.cat((pairs, packed[..., PAIR_BYTES:].unflatten(-1, (32, 1, 4))), dim=-2)
    high, middle, low = (words >> 3 & 0x11).unbind(-2)
    last = high << 2 | middle << 1 | low
    return torch.cat((words & 0x77, last[..., None, :]), dim=-2)


def pack_zeros(zeros: Tensor) -> Tensor:
    """[out, groups] -> [groups, out / 16, 8]: row g of a block in the low nibble, row g + 8 in the high."""
    pairs = by_block(zeros)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_zeros(zeros: Tensor) -> Tensor:
    """Inverse of `pack_zeros`."""
    return from_block(torch.stack((zeros & 15, zeros >> 4), dim=-1))


def by_block(values: Tensor) -> Tensor:
    """[out, groups] -> [groups, out / 16, 8, 2]: rows g and g + 8 of a block side by side."""
    return values.reshape(-1, 2, 8, values.shape[1]).permute(3, 0, 2, 1).contiguous()


def from_block(values: Tensor) -> Tensor:
    """Inverse of `by_block`."""
    return values.permute(1, 3, 2, 0).reshape(-1, values.shape[0])


def _empty_codes(kind: Kind, out_features: int, in_features: int, device: torch.device) -> Tensor:
    tile = (TILE_BYTES[kind],) if kind == "int3" else (32, 4, 4)
    shape = (out_features // BLOCK_ROWS, in_features // TILE_K, *tile)
    return torch.empty(shape, dtype=torch.uint8, device=device)


# AutoAWQ's words: bits 4i..4i+3 hold column AWQ_COLUMNS[i] of eight; that list is in awq_linear/README.md
def _from_words(words: Tensor) -> Tensor:
    from service.kernels.awq_linear.reference import unpack

    return unpack(words)


def _to_words(values: Tensor) -> Tensor:
    from service.kernels.awq_linear.reference import pack

    return pack(values)
