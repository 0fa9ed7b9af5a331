"""Coded K and V of ragged sequences: what test_paged_attention's Pages hold, and what the codes mean."""

import torch
from torch import Tensor

from service.kernels.kv_codes import dequantized, quantized
from service.kernels.paged_attention.reference import paged_attention_reference
from tests.kernels.test_paged_attention import Pages

WILD = 2.0 ** torch.tensor([-14.0, 0, 9, -3])  # sizes of neighbouring tokens' values


class CodedPages:
    """`wild`: tokens differ in size by seven decimal digits, which float16 could not hold with their codes.

    What no sequence owns has broken scales.
    """

    def __init__(
        self,
        lengths: list[int],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        codes: torch.dtype,
        seed: int,
        wild: bool = False,
    ) -> None:
        pages = Pages(lengths, kv_heads, head_dim, torch.float32, seed)
        self.tables = pages.tables
        keys, values = pages.keys.to(dtype).float(), pages.values.to(dtype).float()
        if wild:
            sizes = WILD.repeat(4)[:, None]
            keys, values = keys * sizes.sqrt(), values * sizes
        self.keys, key_scales = quantized(keys, codes)
        self.values, value_scales = quantized(values, codes)
        self.scales = torch.stack((key_scales, value_scales), -1)
        # exact in float32: seven bits or four by eight
        self.meant = dequantized(self.keys, key_scales), dequantized(self.values, value_scales)
        used = torch.zeros(len(self.scales), 16, dtype=torch.bool)
        for table, length in zip(self.tables, lengths, strict=True):
            for token in range(length):
                used[int(table[token // 16]), token % 16] = True
        self.scales.transpose(1, 2)[~used] = torch.nan

    def reference(
        self, q: Tensor, starts: list[int], lengths: list[int], window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return paged_attention_reference(q, *self.meant, self.tables, starts, lengths, scale, window, softcap)
