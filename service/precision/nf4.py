"""NF4: four bits a weight from a table of normal quantiles, one absmax for each 64 of them.

16-bit weights --build: bitsandbytes' quantize_4bit--> codes, absmax --forward: its ops, or our own--> y
                                                            '--> W4Linear (precision/w4), on an H100

Under double quantization (on by default) the absmax values are themselves 8-bit codes in blocks of 256,
minus their mean: they stay so in memory and are decoded on the way into each product. Source: arXiv
2305.14314. Codes equal bitsandbytes' bit for bit; on a CPU with AVX512-BF16 they lie in the order that our
own kernel reads, or that of its fused product.
"""

from collections.abc import Mapping
from copy import copy
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from service.errors import PrecisionError
from service.kernels import w4_linear
from service.kernels.dense_linear import widened
from service.kernels.native.linear import NativeLinear
from service.kernels.nf4_linear import native
from service.precision import w4
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.bitsandbytes_checkpoint import bits_of, read_nf4
from service.precision.bitsandbytes_import import bitsandbytes
from service.precision.linear import LinearSpec
from service.precision.options import NF4Options
from service.precision.sizes import NESTED_BLOCK, check_nf4, nf4_codebooks
from service.precision.sizes import NF4_BLOCK as BLOCK
from service.precision.source import (
    InFlight,
    part_rows,
    read_bias,
    read_weight,
    tensor_bytes,
)
from service.precision.spec import PrecisionSpec, canonical, check_options

INTERLEAVED_ROWS = 32  # rows that the fused CPU product reads side by side


@cache
def codebook(device: torch.device) -> Tensor:
    """float32 [16]: the NF4 levels."""
    return bitsandbytes.get_4bit_type("nf4", device=device)


@cache
def nested_codebook(device: torch.device) -> Tensor:
    """float32 [256]: bitsandbytes' dynamic 8-bit map, one constant of 1 KiB for the whole process."""
    return bitsandbytes.create_dynamic_map().to(device)


def interleave(codes: Tensor, rows: int) -> Tensor:
    """uint8 [rows * in / 2] of bitsandbytes (earlier weight in the high nibble) -> uint8 [rows, in / 2].

    For 32 rows at a time and each pair of features, 32 bytes: low nibbles hold rows 0..15, high nibbles
    rows 16..31, both features of a row side by side.
    """
    pairs = torch.stack((codes >> 4, codes & 0xF), dim=-1).view(rows // INTERLEAVED_ROWS, 2, 16, -1, 2)
    low, high = pairs.unbind(1)  # [row block, 16 rows, in / 2, 2]
    packed = (high << 4 | low).transpose(1, 2)  # [row block, in / 2, 16 rows, 2]
    return packed.reshape(rows, -1)


def deinterleave(packed: Tensor) -> Tensor:
    """Inverse of `interleave`: uint8 [rows, in / 2] -> uint8 [rows * in / 2]."""
    rows, half = packed.shape
    blocks = packed.view(rows // INTERLEAVED_ROWS, half, 16, 2).transpose(1, 2)  # [.., 16 rows, in / 2, 2]
    pairs = torch.stack((blocks & 0xF, blocks >> 4), dim=1)  # [.., 2, 16 rows, in / 2, 2]
    return (pairs[..., 0] << 4 | pairs[..., 1]).reshape(-1)


class NF4Linear(QuantLinear):
    codes: Tensor  # uint8, bitsandbytes' [out * in / 2], or interleaved [out, in / 2], or native
    absmax: Tensor  # float32 [blocks], or uint8, each part padded to NESTED_BLOCK; native: kernels/nf4_linear
    nested_absmax: Tensor | None  # float32 [nested blocks of all parts]
    offsets: Tensor | None  # float32 [parts], mean of each part's absmax
    bias: Tensor | None  # [out_features of all parts]

    def __init__(
        self,
        group: LinearGroup,
        codes: Tensor,
        absmax: list[Tensor],
        nested_absmax: list[Tensor],
        offsets: list[Tensor],
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.group = group
        self.blocks_per_row = group.in_features // BLOCK
        outs = [part.out_features for part in group.parts]
        self.is_native = self.row_invariant = native.fits(group.device, group.dtype, outs)
        self.interleaved = (
            not self.is_native
            and group.device.type == "cpu"
            and group.dtype == torch.bfloat16
            and bitsandbytes.has_avx512bf16()
            and all(out % INTERLEAVED_ROWS == 0 for out in outs)
        )
        if self.is_native:
            self.kernel = "native.avx512.nf4_linear"
            codes = native.pack_codes(codes, group.out_features)
            scales = native.pack_absmax(absmax, outs, self.blocks_per_row)
        elif self.interleaved:
            self.kernel = "bitsandbytes.gemv_4bit"
            codes, scales = interleave(codes, group.out_features), torch.cat(absmax)
        else:
            self.kernel = "bitsandbytes.gemm_4bit"
            scales = torch.cat(absmax)
        nested = bool(nested_absmax)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", scales)
        self.register_buffer("nested_absmax", torch.cat(nested_absmax) if nested else None)
        self.register_buffer("offsets", torch.stack(offsets) if nested else None)
        self.register_buffer("bias", bias)
        self.bound = self._bind([part.numel() for part in nested_absmax]) if self.is_native else None

    def _bind(self, num_nested: list[int]) -> NativeLinear:
        nested = None
        if self.nested_absmax is not None and self.offsets is not None:
            rows = [part_rows(self.group, part).start for part in range(len(self.group.parts))]
            parts = torch.tensor([[row, sum(num_nested[:part])] for part, row in enumerate(rows)])
            nested = native.Nested(
                nested_codebook(self.codes.device), self.nested_absmax, self.offsets, parts
            )
        return native.linear(self.codes, self.absmax, nested, self.bias)

    def decode_absmax(self, out: Tensor) -> Tensor:
        """Fill [out_features of all parts, blocks of a row] of any strides and type with absmax; -> `out`."""
        absmax = self.absmax_in_order() if self.is_native else self.absmax
        if self.nested_absmax is not None:
            absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
                absmax, self.nested_absmax, nested_codebook(absmax.device), NESTED_BLOCK, torch.float32
            )
        start = 0
        for number, part in enumerate(self.group.parts):
            blocks = part.out_features * self.blocks_per_row
            mine = absmax[start : start + blocks].view(part.out_features, self.blocks_per_row)
            rows = out[part_rows(self.group, number)]
            if self.offsets is None:
                rows.copy_(mine)
                start += blocks
            else:
                torch.add(mine, self.offsets[number], out=rows)
                start += padded(blocks)
        return out

    def absmax_in_order(self) -> Tensor:
        """What `absmax` is where our own kernel does not serve."""
        rows = native.unpack_absmax(self.absmax)
        parts = [rows[part_rows(self.group, number)].reshape(-1) for number in range(len(self.group.parts))]
        if self.offsets is not None:
            parts = [F.pad(part, (0, padded(part.numel()) - part.numel())) for part in parts]
        return torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        if self.bound:
            return self.bound(x)
        shape = (self.group.out_features, self.group.in_features)
        if self.interleaved:
            # a row of scales for each block, one column a row of weights: the fused product walks so
            columns = torch.empty(self.blocks_per_row, shape[0], dtype=torch.bfloat16)
            self.decode_absmax(columns.t())
            y: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
                x, self.codes, shape, columns, codebook(x.device), BLOCK
            )
            return y if self.bias is None else y.add_(self.bias)
        absmax = self.decode_absmax(x.new_empty(shape[0], self.blocks_per_row, dtype=torch.float32)).view(-1)
        if x.device.type == "cpu":
            weight = torch.ops.bitsandbytes.dequantize_4bit.default(
                self.codes, absmax, BLOCK, "nf4", shape, x.dtype
            )
            y = widened.linear(x, weight, self.bias)
        else:
            y = torch.ops.bitsandbytes.gemm_4bit.default(
                x, self.codes, shape, absmax, BLOCK, "nf4", self.bias
            )
        return y

    def dense(self, part: int) -> Tensor:
        codes = self.codes
        if self.is_native:
            codes = native.unpack_codes(codes)
        elif self.interleaved:
            codes = deinterleave(codes)
        levels = codebook(codes.device)[torch.stack((codes >> 4, codes & 0xF), dim=-1).long()]
        rows = part_rows(self.group, part)
        absmax = self.decode_absmax(
            torch.empty(self.group.out_features, self.blocks_per_row, device=codes.device)
        )
        scales = absmax[rows].repeat_interleave(BLOCK, dim=1)
        return (levels.view(self.group.out_features, -1)[rows] * scales).cpu()

    def bytes(self) -> dict[str, int]:
        return {
            "codes": tensor_bytes(self.codes),
            "scales": tensor_bytes(self.absmax, self.nested_absmax, self.offsets),
            "linear16": tensor_bytes(self.bias),
        }


# codes uint8 [out * in / 2], absmax [blocks] or its codes, under double quantization nested absmax and offset
Quantized = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


def padded(blocks: int) -> int:
    """Number of absmax codes rounded up to whole nested blocks, so that parts share one decoding call."""
    return -(-blocks // NESTED_BLOCK) * NESTED_BLOCK


class NF4(InFlight):
    """`--precision nf4`: quantized while a 16-bit checkpoint loads, or read as bitsandbytes saved it."""

    name = "nf4"
    activation: Activation = "16bit"
    decodes_weights = True

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: NF4Options = check_options(spec, NF4Options)
        self.canonical = canonical(self.name, self.options)
        self.codebook_bytes = nf4_codebooks(self.options)
        self._reads_codes = False

    @classmethod
    def written_as(cls, quantization: Mapping[str, Any]) -> str | None:
        if bits_of(quantization) != 4 or quantization.get("bnb_4bit_quant_type") != "nf4":
            return None
        return "nf4" if quantization.get("bnb_4bit_use_double_quant") else "nf4:double_quant=off"

    def accepts(self, quantization: Mapping[str, Any] | None) -> bool:
        """PrecisionError where the checkpoint's double quantization is not this mode's."""
        if quantization is None:
            return True
        written = self.written_as(quantization)
        if written is not None and written != self.canonical:
            raise PrecisionError(
                f"precision `{self.canonical}` is not what the checkpoint was quantized to, `{written}`",
                hint=f"serve it as `{written}`",
            )
        return written is not None

    def reading(self, quantization: Mapping[str, Any] | None) -> Self:
        found = copy(self)
        found._reads_codes = quantization is not None
        return found

    def build(self, group: LinearGroup, read: Read) -> NF4Linear | w4.W4Linear:
        check_nf4(group.parts)
        codes, absmax, nested_absmax, offsets = [], [], [], []
        for part in group.parts:
            part_codes, scales, nested = (
                self._read(part, read) if self._reads_codes else self._quantize(part, read, group.device)
            )
            codes.append(part_codes.to(group.device))
            if nested is not None:
                scales = F.pad(scales, (0, padded(scales.numel()) - scales.numel()))
                nested_absmax.append(nested[0].to(group.device))
                offsets.append(nested[1].to(group.device))
            absmax.append(scales.to(group.device))
        bias = read_bias(group, read)
        shape = w4.shape_of(group, "nf4", BLOCK, is_nested=bool(nested_absmax))
        if w4.serves(group, shape):
            levels = nested_codebook(group.device)
            merged = w4_linear.Nested(levels, torch.cat(nested_absmax), torch.stack(offsets))
            packed = w4_linear.pack_nf4(torch.cat(codes), absmax, merged, shape.outs)
            return w4.W4Linear(group, shape, packed, bias)
        return NF4Linear(group, torch.cat(codes), absmax, nested_absmax, offsets, bias)

    def _read(self, part: LinearSpec, read: Read) -> Quantized:
        cpu = torch.device("cpu")
        return read_nf4(part, BLOCK, NESTED_BLOCK, codebook(cpu), nested_codebook(cpu), read)

    def _quantize(self, part: LinearSpec, read: Read, device: torch.device) -> Quantized:
        source = read_weight(part, read).to(device)
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(source, BLOCK, "nf4", torch.uint8)
        if not self.options.double_quant:
            return codes.view(-1), scales, None
        offset = scales.mean()
        scales, nested = torch.ops.bitsandbytes.quantize_blockwise.default(
            F.pad(scales - offset, (0, padded(scales.numel()) - scales.numel())),
            nested_codebook(device),
            NESTED_BLOCK,
        )
        return codes.view(-1), scales, (nested, offset)
