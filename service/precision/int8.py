"""LLM.int8(): int8 rows of weights against int8 rows of activations, outlier features in 16 bits.

16-bit weights --build: bitsandbytes' row-wise absmax--> codes, scales --forward: int8_linear, or its ops--> y
                                                      on an H100 more than 16 rows: w8_linear

An activation that reaches `threshold` is no part of the int8 product: it is multiplied in 16 bits. By row
(`outliers=row`) that is decided in each row alone, so a row's result does not depend on what else is in the
batch, but for the order in which w8_linear adds up. bitsandbytes' rule (`outliers=batch`) takes a feature out
of all rows of a forward where any of them reaches the threshold. Alone, a row is computed alike under both.
Source: arXiv 2208.07339.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels import w8_linear
from service.kernels.int8_linear import gated_linear, int8_linear, native, normed_linear
from service.kernels.int8_linear.plan import KERNEL_ROWS
from service.kernels.int8_rows import OutlierRule
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.bitsandbytes_checkpoint import bits_of, read_int8
from service.precision.bitsandbytes_import import bitsandbytes
from service.precision.full import FullLinear
from service.precision.options import Int8Options
from service.precision.source import (
    InFlight,
    merged_weight,
    part_rows,
    read_bias,
    read_weight,
    tensor_bytes,
)
from service.precision.spec import PrecisionSpec, canonical, check_options
from service.precision.w8 import serves


class Int8Linear(QuantLinear):
    codes: Tensor  # int8 [out_features of all parts, in_features], or as kernels.int8_linear packs them
    scales: Tensor  # float32 [out_features of all parts], the largest magnitude of each row
    steps: Tensor | None  # float32 [out_features of all parts], what a code counts, where w8_linear serves
    bias: Tensor | None  # [out_features of all parts]

    def __init__(
        self,
        group: LinearGroup,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        options: Int8Options,
        number: int = 0,
    ) -> None:
        """`number`: in the order in which layers are built, which is that of a forward pass."""
        super().__init__()
        assert codes.shape == (group.out_features, group.in_features)
        assert scales.shape == (group.out_features,)
        self.group = group
        self.by_row = options.by_row
        fits = native.fits(group.device, group.dtype, *codes.shape)
        self.is_native = options.kernel == "auto" and fits
        is_ours = options.kernel == "auto" and (self.by_row or group.device.type == "cuda")
        self.is_bitsandbytes = not (self.is_native or is_ours)
        self.capturable = not self.is_bitsandbytes  # it finds the outlier columns on the host
        if self.is_native:
            kernel = "native.avx512.int8_linear"
        elif self.is_bitsandbytes:
            kernel = "bitsandbytes.int8_mixed_scaled_mm"
        else:
            kernel = "triton.int8_linear" if group.device.type == "cuda" else "torch.int8_linear"
            self.kernel_rows = KERNEL_ROWS if group.device.type == "cuda" else ()
        threshold = native.in_float16(options.threshold)
        outs, width = codes.shape
        shape = w8_linear.Shape("int8", outs, width, group.dtype, bias is not None, threshold)
        has_tiles = is_ours and not self.is_native and serves(group, shape)
        if has_tiles:
            kernel = f"{kernel} up to {w8_linear.AFTER_ROWS} rows, {w8_linear.kernel_name()}"
            ends = [row.max_rows for row in w8_linear.plan(shape) if row.max_rows]
            self.kernel_rows = (*(rows for rows in KERNEL_ROWS if rows <= w8_linear.AFTER_ROWS), *ends)
        # tiles add outliers up in float32, in places that depend on the other rows' outliers
        self.row_invariant = self.by_row and not has_tiles
        rule = "row" if self.by_row else "batch"
        self.kernel = f"{kernel}, outliers by {rule}" if options.threshold else kernel
        self.register_buffer("codes", native.pack(codes) if self.is_native else codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        counts = torch.zeros(2, dtype=torch.int64, device=group.device)
        if group.device.type == "cuda" and is_ours:
            self.outlier_counts = counts
        self.makes_rows = "triton.int8_rows" if self.by_row and is_ours else ""
        self.rule = OutlierRule(threshold, self.by_row, counts)
        self.register_buffer("steps", scales / 127 if has_tiles else None)
        self.tiles: w8_linear.Tiles | None = None
        if self.steps is not None:
            self.tiles = w8_linear.bind_int8(codes, self.steps, bias, self.rule, shape, number)
        told = self.codes, scales, bias, options.threshold
        self.bound = native.linear(*told, self.by_row) if self.is_native else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bound:
            return self.bound(x)
        if self.is_bitsandbytes:
            return self.by_bitsandbytes(x)
        told = self.codes, self.scales, self.bias, self.rule, self.group.live
        return int8_linear(x, *told, self.tiles)

    def normed(self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not (self.makes_rows and hidden.is_cuda):
            return super().normed(hidden, delta, gain, eps)
        told = self.codes, self.scales, self.bias, self.rule, self.group.live
        return normed_linear(hidden, delta, gain, eps, *told, self.tiles)

    def gated(self, gate_up: Tensor) -> Tensor:
        if not (self.makes_rows and gate_up.is_cuda):
            return super().gated(gate_up)
        told = self.codes, self.scales, self.bias, self.rule, self.group.live
        return gated_linear(gate_up, *told, self.tiles)

    def by_bitsandbytes(self, x: Tensor) -> Tensor:
        # its CUDA kernel reads fp16 only; the CPU follows so that codes agree between the two
        rows, row_scales, outliers = bitsandbytes.int8_vectorwise_quant(
            x.to(torch.float16), threshold=self.rule.threshold
        )
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default(
            x, rows, self.codes, row_scales, self.scales, outliers, self.bias
        )
        return y

    def dense(self, part: int) -> Tensor:
        rows = part_rows(self.group, part)
        codes = native.unpack(self.codes) if self.is_native else self.codes
        return (codes[rows].float() * (self.scales[rows, None] / 127)).cpu()

    def bytes(self) -> dict[str, int]:
        return {
            "codes": tensor_bytes(self.codes),
            "scales": tensor_bytes(self.scales, self.steps),
            "linear16": tensor_bytes(self.bias),
        }


class Int8(InFlight):
    """`--precision int8`: quantized while a 16-bit checkpoint loads, or read as bitsandbytes saved it."""

    name = "int8"
    activation: Activation = "int8_rows"

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: Int8Options = check_options(spec, Int8Options)
        self.canonical = canonical(self.name, self.options)
        self._reads_codes = False
        self._num_built = 0

    @classmethod
    def written_as(cls, quantization: Mapping[str, Any]) -> str | None:
        if bits_of(quantization) != 8:
            return None
        threshold = float(quantization.get("llm_int8_threshold", 6.0))
        return canonical(cls.name, Int8Options.model_validate({"threshold": threshold}))

    def accepts(self, quantization: Mapping[str, Any] | None) -> bool:
        """Any threshold: it is a matter of activations. PrecisionError for `skip`, whose weights are gone."""
        if quantization is None:
            return True
        if bits_of(quantization) == 8 and self.options.skip:
            raise PrecisionError(
                f"precision `{self.canonical}` keeps `{self.options.skip}` in 16 bits, which the checkpoint "
                "has not kept",
                hint="leave `skip` out, or serve the 16-bit checkpoint it was made from",
            )
        return bits_of(quantization) == 8

    def reading(self, quantization: Mapping[str, Any] | None) -> Self:
        found = copy(self)
        found._reads_codes = quantization is not None
        return found

    def build(self, group: LinearGroup, read: Read) -> QuantLinear:
        bias = read_bias(group, read)
        if group.name in self.options.skip.split("+"):
            return FullLinear(group, merged_weight(group, read, group.dtype), bias)
        shape = group.out_features, group.in_features
        codes = torch.empty(shape, dtype=torch.int8, device=group.device)
        scales = torch.empty(group.out_features, device=group.device)
        for number, part in enumerate(group.parts):
            rows = part_rows(group, number)
            if self._reads_codes:
                codes[rows], scales[rows] = read_int8(part, read)
                continue
            weight = read_weight(part, read, torch.float16).to(group.device)
            codes[rows], scales[rows], _ = bitsandbytes.int8_vectorwise_quant(weight)
        number, self._num_built = self._num_built, self._num_built + 1
        return Int8Linear(group, codes, scales, bias, self.options, number)
