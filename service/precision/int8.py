"""LLM.int8(): int8 rows of weights against int8 rows of activations, outlier features in 16 bits.

16-bit weights --build: bitsandbytes' row-wise absmax--> codes, scales --forward: its ops, or our own--> y

A feature of which any row of the batch reaches `threshold` is multiplied in 16 bits with dequantized
weights; the rest goes through an int8 product. Source: arXiv 2208.07339. Because the rule looks at the
whole forward, what else is in a batch can move a row's result, here as in bitsandbytes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from service.kernels.int8_linear import native
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.bitsandbytes_import import bitsandbytes
from service.precision.full import FullLinear
from service.precision.source import (
    merged_weight,
    part_rows,
    quantized_activation_dtype,
    read_bias,
    read_weight,
    tensor_bytes,
)
from service.precision.spec import Options, PrecisionSpec, canonical, check_options

LAYER_CLASSES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class Int8Options(Options):
    threshold: float = Field(
        6.0, ge=0, allow_inf_nan=False, description="activations from here on stay 16-bit; 0: none does"
    )
    skip: str = Field(
        "", description=f"layer classes kept in 16 bits, joined by +: {' '.join(LAYER_CLASSES)}"
    )

    @field_validator("skip")
    @classmethod
    def check_skip(cls, skip: str) -> str:
        named = [name for name in skip.split("+") if name]
        if unknown := [name for name in named if name not in LAYER_CLASSES]:
            raise ValueError(f"`{unknown[0]}` is no layer class")
        return "+".join(name for name in LAYER_CLASSES if name in named)


class Int8Linear(QuantLinear):
    codes: Tensor  # int8 [out_features of all parts, in_features], or as kernels.int8_linear packs them
    scales: Tensor  # float32 [out_features of all parts], the largest magnitude of each row
    bias: Tensor | None  # [out_features of all parts]

    def __init__(
        self, group: LinearGroup, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
    ) -> None:
        super().__init__()
        assert codes.shape == (group.out_features, group.in_features)
        assert scales.shape == (group.out_features,)
        self.group = group
        self.threshold = threshold
        self.is_native = native.fits(group.device, group.dtype, *codes.shape)
        self.kernel = "native.avx512.int8_linear" if self.is_native else "bitsandbytes.int8_mixed_scaled_mm"
        self.register_buffer("codes", native.pack(codes) if self.is_native else codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.bound = native.linear(self.codes, scales, bias, threshold) if self.is_native else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bound:
            return self.bound(x)
        # bitsandbytes' CUDA kernel reads fp16 only; the CPU follows so that codes agree between the two
        rows, row_scales, outliers = bitsandbytes.int8_vectorwise_quant(
            x.to(torch.float16), threshold=self.threshold
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
            "scales": tensor_bytes(self.scales),
            "weights16": tensor_bytes(self.bias),
        }


class Int8:
    """`--precision int8`: quantized from a 16-bit checkpoint while it loads."""

    name = "int8"
    activation: Activation = "int8_rows"
    capturable = False  # the outlier columns are found on the host
    quantizer: str | None = None

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: Int8Options = check_options(spec, Int8Options)
        self.canonical = canonical(self.name, self.options)

    @classmethod
    def written_as(cls, quantization: Mapping[str, Any]) -> str | None:
        return None

    def accepts(self, quantization: Mapping[str, Any] | None) -> bool:
        return quantization is None

    def activation_dtype(self, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
        return quantized_activation_dtype(device, checkpoint)

    def build(self, group: LinearGroup, read: Read) -> QuantLinear:
        bias = read_bias(group, read)
        if group.name in self.options.skip.split("+"):
            return FullLinear(group, merged_weight(group, read, group.dtype), bias)
        codes = torch.empty(group.out_features, group.in_features, dtype=torch.int8, device=group.device)
        scales = torch.empty(group.out_features, device=group.device)
        for number, part in enumerate(group.parts):
            weight = read_weight(part, read, torch.float16).to(group.device)
            rows = part_rows(group, number)
            codes[rows], scales[rows], _ = bitsandbytes.int8_vectorwise_quant(weight)
        return Int8Linear(group, codes, scales, bias, self.options.threshold)
