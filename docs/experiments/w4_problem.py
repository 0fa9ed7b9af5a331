"""A random W4 linear in both kinds of codes, packed as production would hold it, and its dense meaning."""

import ctypes

import torch
from torch import Tensor
from w4_layout import by_block, pack_awq, pack_nf4

# fmt: off
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# fmt: on


class Parts(ctypes.Structure):
    """`Parts` of w4_device.h."""

    _fields_ = [
        ("count", ctypes.c_int),
        ("begin", ctypes.c_int * 4),
        ("first", ctypes.c_int * 4),
        ("offset", ctypes.c_float * 4),
    ]


def dynamic_map() -> Tensor:
    """float32 [256]: bitsandbytes' signed dynamic map, from its definition: seven decades, the one of 10^-i with
    2^(6 - i) midpoints of 0.1 .. 1 on either side, 0 and 1."""
    positive = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        positive += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    values = sorted(positive + [-v for v in positive if v not in (0.0, 1.0)])
    return torch.tensor(values, dtype=torch.float32)


class Problem:
    def __init__(self, n: int, k: int, device: str, parts: tuple[int, ...] = ()) -> None:
        self.n, self.k, self.outs = n, k, parts or (n,)
        words = dict(dtype=torch.int64, device=device)
        low, high = -(1 << 31), 1 << 31
        qweight = torch.randint(low, high, (k, n // 8), **words).int()
        qzeros = torch.randint(low, high, (k // 128, n // 8), **words).int()
        scales = (torch.rand(k // 128, n, device=device) * 0.01 + 0.002).half()
        codes, by_rows, zeros = pack_awq(qweight, qzeros, scales)
        self.affine = (codes, by_rows, zeros, by_rows)  # the fourth, nested absmax, is NF4's
        self._awq = (qweight, qzeros, scales)
        self.map = dynamic_map().to(device)
        pairs = [torch.randint(0, 256, (out * k // 2,), **words).to(torch.uint8) for out in self.outs]
        blocks = [out * k // 64 for out in self.outs]
        absmax = [torch.randint(0, 256, (b,), **words).to(torch.uint8) for b in blocks]
        self.nested = [torch.rand(-(-b // 256), device=device) * 0.02 + 0.01 for b in blocks]
        self.offsets = [0.03 + 0.005 * i for i in range(len(self.outs))]
        nf4_codes, nf4_absmax = pack_nf4(pairs, absmax, self.outs)
        nested = torch.cat(self.nested)
        self.nf4 = (nf4_codes, nf4_absmax, nf4_absmax, nested)
        self._bits = (pairs, absmax)

    def dense(self, affine: int) -> Tensor:
        """float32 [N, K], dequantized from the checkpoints' own layouts, not from ours."""
        if affine:
            qweight, qzeros, scales = self._awq
            order = (0, 2, 4, 6, 1, 3, 5, 7)

            def unpack(words: Tensor) -> Tensor:
                out = torch.empty(*words.shape, 8, device=words.device)
                for i, column in enumerate(order):
                    out[..., column] = (words >> 4 * i & 15).float()
                return out.flatten(-2)

            centred = unpack(qweight) - unpack(qzeros).repeat_interleave(128, dim=0)
            return (centred * scales.float().repeat_interleave(128, dim=0)).t().contiguous()
        levels = torch.tensor(NF4, device=self.map.device)
        rows = []
        for pairs, absmax, nested, offset, out in zip(
            *self._bits, self.nested, self.offsets, self.outs, strict=True
        ):
            scale = self.map[absmax.long()] * nested.repeat_interleave(256)[: absmax.numel()] + offset
            values = levels[torch.stack((pairs >> 4, pairs & 15), dim=-1).long()]
            rows.append((values.view(-1, 64) * scale[:, None]).view(out, self.k))
        return torch.cat(rows)


def make_parts(problem: Problem) -> Parts:
    parts = Parts(count=len(problem.outs))
    row = nested = 0
    for i, out in enumerate(problem.outs):
        parts.begin[i], parts.first[i], parts.offset[i] = row // 16, nested * 256, problem.offsets[i]
        row += out
        nested += problem.nested[i].numel()
    return parts


__all__ = ["NF4", "Parts", "Problem", "by_block", "dynamic_map", "make_parts"]
