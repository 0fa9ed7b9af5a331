"""Random W4 linears in the layouts of their checkpoints, and what these mean, without our layout."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from service.kernels.w4_linear import Kind, Nested, Weight, pack_awq, pack_int3, pack_nf4
from service.kernels.w4_linear.plan import GROUPS

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight, that nibble 0, 1, ... of AutoAWQ's word holds
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip


@dataclass
class Awq:
    qweight: Tensor  # int32 [in, out / 8]
    qzeros: Tensor  # int32 [in / group, out / 8]
    scales: Tensor  # float16 [in / group, out]

    def pack(self, outs: tuple[int, ...]) -> Weight:
        return pack_awq(self.qweight, self.qzeros, self.scales, outs)

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        group_size = len(self.qweight) // len(self.scales)
        centred = nibbles(self.qweight) - nibbles(self.qzeros).repeat_interleave(group_size, dim=0)
        return (centred * self.scales.float().repeat_interleave(group_size, dim=0)).t().contiguous()


def nibbles(words: Tensor) -> Tensor:
    """int32 [rows, words] -> float32 [rows, 8 words]."""
    out = torch.empty(*words.shape, 8, device=words.device)
    for place, column in enumerate(AWQ_COLUMNS):
        out[..., column] = (words >> 4 * place & 15).float()
    return out.flatten(-2)


@dataclass
class Nf4:
    codes: Tensor  # uint8 [out * in / 2] of all parts
    absmax: list[Tensor]  # of each part uint8 [out * in / 64] and padding up to 256
    nested: Nested
    outs: tuple[int, ...]
    in_features: int

    def pack(self, outs: tuple[int, ...]) -> Weight:
        return pack_nf4(self.codes, self.absmax, self.nested, outs)

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        levels = torch.tensor(NF4, device=self.codes.device)
        values = levels[torch.stack((self.codes >> 4, self.codes & 15), dim=-1).long()].view(-1, 64)
        scales, first = [], 0
        for out, codes, offset in zip(self.outs, self.absmax, self.nested.offsets, strict=True):
            blocks = out * self.in_features // 64
            nested = self.nested.absmax[first : first + len(codes) // 256].repeat_interleave(256)
            scales.append((self.nested.map[codes.long()] * nested + offset)[:blocks])
            first += len(codes) // 256
        return (values * torch.cat(scales)[:, None]).view(sum(self.outs), self.in_features)


@dataclass
class Int3:
    codes: Tensor  # uint8 [out, in], values 0..7
    zeros: Tensor  # uint8 [out, in / group], likewise
    scales: Tensor  # float16 [out, in / group]

    def pack(self, outs: tuple[int, ...]) -> Weight:
        return pack_int3(self.codes, self.zeros, self.scales, outs)

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        group_size = self.codes.shape[1] // self.zeros.shape[1]
        centred = self.codes.float() - self.zeros.float().repeat_interleave(group_size, dim=1)
        return centred * self.scales.float().repeat_interleave(group_size, dim=1)


def random_awq(outs: tuple[int, ...], in_features: int, device: str = "cpu", group_size: int = 128) -> Awq:
    out_features, groups = sum(outs), in_features // group_size

    def words(rows: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (rows, out_features // 8), device=device).int()

    scales = torch.rand(groups, out_features, device=device) * 0.01 + 0.002
    return Awq(words(in_features), words(groups), scales.half())


def random_nf4(outs: tuple[int, ...], in_features: int, device: str = "cpu") -> Nf4:
    """The map is no more than like bitsandbytes' own: it is one of the kernels' arguments."""

    def some(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), device=device).to(torch.uint8)

    padded = [-(-out * in_features // 64 // 256) * 256 for out in outs]
    nested = Nested(
        torch.linspace(-1, 1, 256, device=device) ** 3,
        torch.rand(sum(padded) // 256, device=device) * 0.02 + 0.01,
        torch.arange(len(outs), device=device) * 0.005 + 0.03,
    )
    codes = some(sum(outs) * in_features // 2)
    return Nf4(codes, [some(count) for count in padded], nested, outs, in_features)


def random_int3(outs: tuple[int, ...], in_features: int, device: str = "cpu", group_size: int = 64) -> Int3:
    def some(columns: int) -> Tensor:
        return torch.randint(0, 8, (sum(outs), columns), device=device).to(torch.uint8)

    groups = in_features // group_size
    scales = torch.rand(sum(outs), groups, device=device) * 0.02 + 0.004
    return Int3(some(in_features), some(groups), scales.half())


class Codes(NamedTuple):
    """What the kernels tell apart of a weight."""

    kind: Kind
    group_size: int  # weights of an output under one scale

    def __str__(self) -> str:
        return f"{self.kind} {self.group_size}"


KINDS = tuple(Codes(kind, size) for kind, sizes in GROUPS.items() for size in sizes)


def random_weight(
    kind: Kind, outs: tuple[int, ...], in_features: int, device: str = "cpu", group_size: int = 0
) -> Awq | Nf4 | Int3:
    """`group_size` 0: the kind's first."""
    assert group_size in (0, *GROUPS[kind])
    if kind == "nf4":
        return random_nf4(outs, in_features, device)
    return (random_awq if kind == "affine" else random_int3)(
        outs, in_features, device, group_size or GROUPS[kind][0]
    )
