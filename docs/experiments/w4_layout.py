"""One order of 4-bit weights for every number of rows: what w4_few.cu and w4_tile.cu read.

A tile is 16 outputs x 64 input features, 512 bytes: lane l of a warp reads 16 of them, one word for each of four
fragments of mma.m16n8k16, which are also those of wgmma.m64nNk16's register operand (a warp holds 16 of its 64 rows).

    codes   uint8 [N/16, K/64, 32 lanes, 4 fragments s, 4 bytes]
    lane l  g = l / 4, t = l % 4
    word s  register r = 2 * (k half) + (row half) holds row g + 8 * (r % 2), k = 16 s + 8 * (r / 2) + 2t and 2t + 1

            nibble  7     6     5     4     3     2     1     0
    NF4             r3 hi r3 lo r2 hi r2 lo r1 hi r1 lo r0 hi r0 lo     a byte is a pair: one look-up
    affine          r3 hi r2 hi r1 hi r0 hi r3 lo r2 lo r1 lo r0 lo     (word >> 4r) & 0x000f000f: one register

What belongs to a row lies by K first, the 16 rows of a block interleaved as g, g + 8:

    scales  float16 [K/128, N/16, 8 g, 2]          affine, groups of 128
    zeros   uint8   [K/128, N/16, 8 g]             low nibble row g, high nibble row g + 8
    absmax  uint8   [K/64, N/16, 8 g, 2]           NF4; nested absmax and offset of each part as bitsandbytes has them
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_ROWS, TILE_K = 16, 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of AutoAWQ's word holds this column of its eight


def _fragments(codes: Tensor) -> Tensor:
    """[N, K] -> view [block, tile, g, t, s, k half, row half, pair]."""
    n, k = codes.shape
    view = codes.view(n // TILE_ROWS, 2, 8, k // TILE_K, 4, 2, 4, 2)
    return view.permute(0, 3, 2, 6, 4, 5, 1, 7)


def _pack(nibbles: Tensor, n: int, k: int) -> Tensor:
    flat = nibbles.reshape(n // TILE_ROWS, k // TILE_K, 32, 4, 4, 2)
    return flat[..., 0] | flat[..., 1] << 4


def _unpack(packed: Tensor) -> Tensor:
    """-> nibbles [block, tile, g, t, s, 8]."""
    blocks, tiles = packed.shape[:2]
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(blocks, tiles, 8, 4, 4, 8)


def _matrix(fragments: Tensor) -> Tensor:
    """Inverse of `_fragments`."""
    blocks, tiles = fragments.shape[:2]
    return fragments.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(blocks * TILE_ROWS, tiles * TILE_K)


def pack_pairs(codes: Tensor) -> Tensor:
    """uint8 [N, K], 0..15 -> NF4's tiles."""
    return _pack(_fragments(codes), *codes.shape)


def unpack_pairs(packed: Tensor) -> Tensor:
    return _matrix(_unpack(packed).unflatten(-1, (2, 2, 2)))


def pack_apart(codes: Tensor) -> Tensor:
    """uint8 [N, K], 0..15 -> the affine tiles."""
    return _pack(_fragments(codes).permute(0, 1, 2, 3, 4, 7, 5, 6), *codes.shape)


def unpack_apart(packed: Tensor) -> Tensor:
    return _matrix(_unpack(packed).unflatten(-1, (2, 2, 2)).permute(0, 1, 2, 3, 4, 6, 7, 5))


def by_block(values: Tensor) -> Tensor:
    """[N, groups] -> [groups, N/16, 8 g, 2]."""
    return values.view(-1, 2, 8, values.shape[1]).permute(3, 0, 2, 1).contiguous()


def from_block(values: Tensor) -> Tensor:
    """Inverse of `by_block`."""
    return values.permute(1, 3, 2, 0).reshape(-1, values.shape[0])


def _awq_words(words: Tensor) -> Tensor:
    """int32 [rows, columns / 8] -> uint8 [rows, columns]."""
    nibbles = words[..., None] >> torch.arange(0, 32, 4, device=words.device) & 15
    order = torch.tensor(AWQ_ORDER, device=words.device).argsort()
    return nibbles[..., order].to(torch.uint8).flatten(-2)


def _to_awq_words(values: Tensor) -> Tensor:
    nibbles = values.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].to(torch.int64)
    words = (nibbles << torch.arange(0, 32, 4, device=values.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AutoAWQ's GEMM layout, int32 [K, N/8], int32 [K/g, N/8], float16 [K/g, N] -> codes, scales, zeros."""
    zeros = by_block(_awq_words(qzeros).t().contiguous())
    codes = pack_apart(_awq_words(qweight).t().contiguous())
    return codes, by_block(scales.t().contiguous()), zeros[..., 0] | zeros[..., 1] << 4


def unpack_awq(codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows_of_zeros = from_block(torch.stack((zeros & 15, zeros >> 4), dim=-1)).t()
    return (
        _to_awq_words(unpack_apart(codes).t()),
        _to_awq_words(rows_of_zeros),
        from_block(scales).t().contiguous(),
    )


def pack_nf4(codes: Sequence[Tensor], absmax: Sequence[Tensor], outs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """bitsandbytes' parts, uint8 [out * K / 2] (earlier weight in the high nibble) and their 8-bit absmax
    [out * K / 64 and padding, which is left out] -> codes, absmax. The rest stays as it is."""
    rows, scales = [], []
    for part, part_absmax, out in zip(codes, absmax, outs, strict=True):
        pairs = part.view(out, -1)
        rows.append(torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1))
        blocks = rows[-1].numel() // 64
        scales.append(part_absmax[:blocks].view(out, -1))
    return pack_pairs(torch.cat(rows)), by_block(torch.cat(scales))


def unpack_nf4(codes: Tensor, absmax: Tensor, outs: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse of `pack_nf4`, without padding."""
    rows = unpack_pairs(codes).split(list(outs))
    bytes_ = [(part[:, 0::2] << 4 | part[:, 1::2]).reshape(-1) for part in rows]
    return bytes_, [part.reshape(-1) for part in from_block(absmax).split(list(outs))]


def check() -> None:
    """Round trips on random bits, bit for bit; a weight's place in the drawing above."""
    torch.manual_seed(0)
    n, k = 96, 512
    awq = (
        torch.randint(-(1 << 31), 1 << 31, (k, n // 8)).to(torch.int32),
        torch.randint(-(1 << 31), 1 << 31, (k // 128, n // 8)).to(torch.int32),
        torch.rand(k // 128, n).half(),
    )
    assert all(torch.equal(a, b) for a, b in zip(awq, unpack_awq(*pack_awq(*awq)), strict=True))
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert _awq_words(word).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    outs = (32, 16, 48)
    parts = [torch.randint(0, 256, (out * k // 2,)).to(torch.uint8) for out in outs]
    absmax = [torch.randint(0, 256, (-(-out * k // 64 // 256) * 256,)).to(torch.uint8) for out in outs]
    back, back_absmax = unpack_nf4(*pack_nf4(parts, absmax, outs), outs)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))
    assert all(torch.equal(a[: b.numel()], b) for a, b in zip(absmax, back_absmax, strict=True))
    codes = torch.randint(0, 16, (n, k)).to(torch.uint8)
    pairs, apart = pack_pairs(codes), pack_apart(codes)
    for lane in (0, 5, 31):
        for s in range(4):
            for r in range(4):
                row, column = 16 + lane // 4 + 8 * (r % 2), 128 + 16 * s + 8 * (r // 2) + 2 * (lane % 4)
                low, high = codes[row, column], codes[row, column + 1]
                assert pairs[1, 2, lane, s, r] == low | high << 4
                bits = int(apart[1, 2, lane, s].view(torch.int32)) & 0xFFFFFFFF
                assert (bits >> 4 * r & 0xF000F) == int(low) | int(high) << 16


if __name__ == "__main__":
    check()
    print("layout: round trips from AutoAWQ and bitsandbytes are exact")
