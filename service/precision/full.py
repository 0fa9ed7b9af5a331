"""fp32, bf16, fp16: the weights as they are, cast once at load. The reference of every comparison."""

import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels import gated_linear
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.dense_linear import (
    bind_linear,
    dense_linear,
    is_row_invariant,
    linear_kernel,
    pack_weight,
    packed_bytes,
    unpack_weight,
)
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.options import FullOptions
from service.precision.source import InFlight, merged_weight, part_rows, read_bias, tensor_bytes
from service.precision.spec import Options, PrecisionSpec, canonical, check_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FullLinear(QuantLinear):
    weight: Tensor  # [out_features of all parts, in_features], as `pack_weight` leaves it
    bias: Tensor | None  # [out_features of all parts]

    def __init__(self, group: LinearGroup, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("weight", pack_weight(weight))
        self.register_buffer("bias", bias)
        self.kernel = linear_kernel(self.weight, deterministic=group.deterministic)
        self.row_invariant = is_row_invariant(self.weight, deterministic=group.deterministic)
        self.bound = bind_linear(self.weight, bias, deterministic=group.deterministic)
        self.gating = None
        if group.name == "gate_up_proj" and bias is None and not group.deterministic:
            self.gating = gated_linear.bind(self.weight)
        if self.gating:
            self.kernel, self.gated_rows = f"{gated_linear.NAME}, {self.kernel}", self.gating.checked
        self.chosen_by_rows = weight.is_cuda and weight.itemsize == 2 and not group.deterministic

    def forward(self, x: Tensor) -> Tensor:
        if self.bound:
            return self.bound(x)
        return dense_linear(x, self.weight, self.bias)

    def normed_gated(
        self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        if self.gating is None or len(hidden) not in self.gating.served:
            return None
        total, x = add_rms_norm(hidden, delta, gain, eps)
        return total, self.gating(x)

    def dense(self, part: int) -> Tensor:
        return unpack_weight(self.weight)[part_rows(self.group, part)].float().cpu()

    def bytes(self) -> dict[str, int]:
        return {"linear16": packed_bytes(self.weight) + tensor_bytes(self.bias)}


class Full(InFlight):
    """Backend of the three unquantized precisions; they differ in one dtype."""

    activation: Activation = "16bit"

    def __init__(self, spec: PrecisionSpec) -> None:
        self.name = spec.name
        self.dtype = DTYPES[spec.name]
        self.options: Options = check_options(spec, FullOptions)
        self.canonical = canonical(self.name, self.options)

    def activation_dtype(self, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
        return self.dtype

    def build(self, group: LinearGroup, read: Read) -> FullLinear:
        if group.dtype != self.dtype:
            raise PrecisionError(
                f"precision `{self.name}` computes in {self.dtype}, got dtype {group.dtype}",
                hint="leave `--dtype auto`: it chooses activations of the quantized modes only",
            )
        return FullLinear(group, merged_weight(group, read, self.dtype), read_bias(group, read))
