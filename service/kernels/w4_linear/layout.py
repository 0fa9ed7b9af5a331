"""The order in memory that the W4 kernels read: AutoAWQ's and bitsandbytes' bits, moved. README.md draws it.

precision/awq, nf4 --pack (once, at load)--> Weight --> cuda.py; reference.py reads it back

Only bits move, so `unpack_awq` and `unpack_nf4` give back exactly what was packed. Repacking takes some rows
at a time, so that loading needs little memory beside the layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["affine", "nf4"]

BLOCK_ROWS, TILE_K = 16, 64  # outputs and input features of 512 bytes of codes
AFFINE_GROUP = 128  # weights of an output under one scale and one zero
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
    """One linear of several parts, resident. `zeros` are affine's, `nested` NF4's."""

    codes: Tensor  # uint8 [out / 16, in / 64, 32, 4, 4]
    scales: Tensor  # affine: float16 [in / 128, out / 16, 8, 2]; NF4: uint8 [in / 64, out / 16, 8, 2]
    zeros: Tensor | None  # uint8 [in / 128, out / 16, 8]
    nested: Nested | None
    outs: tuple[int, ...]  # outputs of each part, multiples of 16

    @property
    def kind(self) -> Kind:
        return "affine" if self.nested is None else "nf4"

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
    """AutoAWQ's int32 [in, out / 8], int32 [in / 128, out / 8], float16 [in / 128, out]."""
    in_features, out_features = qweight.shape[0], scales.shape[1]
    codes = _empty_codes(out_features, in_features, qweight.device)
    for start in range(0, out_features, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, out_features))
        nibbles = _from_words(qweight[:, rows.start // 8 : rows.stop // 8]).t()
        codes[rows.start // BLOCK_ROWS : rows.stop // BLOCK_ROWS] = pack_codes(nibbles, "affine")
    zeros = by_block(_from_words(qzeros).t())
    return Weight(codes, by_block(scales.t()), zeros[..., 0] | zeros[..., 1] << 4, None, tuple(outs))


def unpack_awq(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, qzeros and scales again."""
    assert weight.zeros is not None
    zeros = from_block(torch.stack((weight.zeros & 15, weight.zeros >> 4), dim=-1))
    codes = unpack_codes(weight.codes, "affine")
    return _to_words(codes.t()), _to_words(zeros.t()), from_block(weight.scales).t().contiguous()


def pack_nf4(codes: Tensor, absmax: Sequence[Tensor], nested: Nested, outs: Sequence[int]) -> Weight:
    """bitsandbytes' codes uint8 [out * in / 2] of all parts (the earlier weight in the high nibble) and of
    each part uint8 absmax [out * in / 64] and padding, which is left out."""
    out_features = sum(outs)
    pairs = codes.view(out_features, -1)
    in_features = pairs.shape[1] * 2
    packed = _empty_codes(out_features, in_features, codes.device)
    for start in range(0, out_features, ROWS_AT_ONCE):
        part = pairs[start : start + ROWS_AT_ONCE]
        nibbles = torch.stack((part >> 4, part & 15), dim=-1).flatten(1)
        first = start // BLOCK_ROWS
        packed[first : first + len(part) // BLOCK_ROWS] = pack_codes(nibbles, "nf4")
    blocks = in_features // NF4_BLOCK
    rows = [mine[: out * blocks].view(out, blocks) for mine, out in zip(absmax, outs, strict=True)]
    return Weight(packed, by_block(torch.cat(rows)), None, nested, tuple(outs))


def unpack_nf4(weight: Weight) -> tuple[Tensor, list[Tensor]]:
    """Codes and each part's absmax, without padding."""
    nibbles = unpack_codes(weight.codes, "nf4")
    absmax = from_block(weight.scales).split(list(weight.outs))
    return (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).view(-1), [part.reshape(-1) for part in absmax]


def pack_codes(codes: Tensor, kind: Kind) -> Tensor:
    """uint8 [out, in], values 0..15 -> [out / 16, in / 64, 32 lanes, 4 fragments, 4 bytes]."""
    out_features, in_features = codes.shape
    view = codes.reshape(out_features // BLOCK_ROWS, 2, 8, in_features // TILE_K, 4, 2, 4, 2)
    fragments = view.permute(0, 3, 2, 6, 4, 5, 1, 7)  # block, tile, g, t, s, k half, row half, pair
    if kind == "affine":
        fragments = fragments.permute(0, 1, 2, 3, 4, 7, 5, 6)  # registers beside each other, pairs apart
    flat = fragments.reshape(*fragments.shape[:2], 32, 4, 4, 2)
    return flat[..., 0] | flat[..., 1] << 4


def unpack_codes(packed: Tensor, kind: Kind) -> Tensor:
    """Inverse of `pack_codes`."""
    blocks, tiles = packed.shape[:2]
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(blocks, tiles, 8, 4, 4, 2, 2, 2)
    if kind == "affine":
        nibbles = nibbles.permute(0, 1, 2, 3, 4, 6, 7, 5)
    return nibbles.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(blocks * BLOCK_ROWS, tiles * TILE_K)


def by_block(values: Tensor) -> Tensor:
    """[out, groups] -> [groups, out / 16, 8, 2]: rows g and g + 8 of a block side by side."""
    return values.reshape(-1, 2, 8, values.shape[1]).permute(3, 0, 2, 1).contiguous()


def from_block(values: Tensor) -> Tensor:
    """Inverse of `by_block`."""
    return values.permute(1, 3, 2, 0).reshape(-1, values.shape[0])


def _empty_codes(out_features: int, in_features: int, device: torch.device) -> Tensor:
    shape = (out_features // BLOCK_ROWS, in_features // TILE_K, 32, 4, 4)
    return torch.empty(shape, dtype=torch.uint8, device=device)


# AutoAWQ's words: bits 4i..4i+3 hold column AWQ_COLUMNS[i] of eight; that list is in awq_linear/README.md
def _from_words(words: Tensor) -> Tensor:
    from service.kernels.awq_linear.reference import unpack

    return unpack(words)


def _to_words(values: Tensor) -> Tensor:
    from service.kernels.awq_linear.reference import pack

    return pack(values)
