"""FP8: 8-bit floats (E4M3), a scale for each output of a weight and for each row of activations.

16-bit weights --build: rows' absmax / 448--> codes, scales --forward: rows of x likewise--> y
                                                     on an H100 5 to 16 rows of the wide: w8_linear

W8A8 with dynamic activation scales, per channel and per token, made while the checkpoint loads; nothing is
calibrated. Source: arXiv 2209.05433. A row's result does not depend on what else is in the batch.
"""

from itertools import groupby

import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels import w8_linear
from service.kernels.fp8_linear import fp8_linear, gated_linear, native, normed_linear, quantize_rows
from service.kernels.fp8_linear.plan import KERNEL_ROWS
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.options import FP8Options
from service.precision.source import InFlight, part_rows, read_bias, read_weight, tensor_bytes
from service.precision.spec import Options, PrecisionSpec, canonical, check_options
from service.precision.w8 import serves

LEAST_CAPABILITY = (8, 9)  # of the NVIDIA devices that multiply E4M3
MULTIPLE = 16  # of in and out features, which their kernels want


class FP8Linear(QuantLinear):
    codes: (
        Tensor  # float8_e4m3fn [out_features of all parts, in_features], or as kernels/fp8_linear packs them
    )
    scales: Tensor  # float32 [out_features of all parts], what a code's unit counts
    bias: Tensor | None  # [out_features of all parts]

    def __init__(self, group: LinearGroup, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.group = group
        self.is_native = self.row_invariant = native.fits(group.device, group.dtype, *codes.shape)
        self.register_buffer("codes", native.pack(codes) if self.is_native else codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.bound = native.linear(self.codes, scales, bias) if self.is_native else None
        self.few: w8_linear.FewRows | None = None
        self.kernel = "native.avx512.fp8_linear" if self.is_native else "torch.fp8_linear"
        if codes.is_cuda:
            self.chosen_by_rows, self.makes_rows = True, "triton.fp8_rows"
            outs, width = codes.shape
            shape = w8_linear.Shape("fp8", outs, width, group.dtype, bias is not None)
            if serves(group, shape):
                self.few = w8_linear.bind_fp8(codes, scales, shape)
            self.kernel, self.kernel_rows = kernels_of(self.few.rows if self.few else ())

    def forward(self, x: Tensor) -> Tensor:
        if self.bound:
            return self.bound(x)
        return fp8_linear(x, self.codes, self.scales, self.bias, self.few)

    def normed(self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not hidden.is_cuda:
            return super().normed(hidden, delta, gain, eps)
        return normed_linear(hidden, delta, gain, eps, self.codes, self.scales, self.bias, self.few)

    def gated(self, gate_up: Tensor) -> Tensor:
        if not gate_up.is_cuda:
            return super().gated(gate_up)
        return gated_linear(gate_up, self.codes, self.scales, self.bias, self.few)

    def dense(self, part: int) -> Tensor:
        rows = part_rows(self.group, part)
        codes = native.unpack(self.codes) if self.is_native else self.codes
        return (codes[rows].float() * self.scales[rows, None]).cpu()

    def bytes(self) -> dict[str, int]:
        return {
            "codes": tensor_bytes(self.codes),
            "scales": tensor_bytes(self.scales),
            "linear16": tensor_bytes(self.bias),
        }


def kernels_of(tiles: tuple[w8_linear.Row, ...]) -> tuple[str, tuple[int, ...]]:
    """-> which kernels serve on a GPU up to how many rows, and the most rows of each. `tiles`: a plan."""
    ends = sorted({*KERNEL_ROWS, *(row.max_rows for row in tiles if row.max_rows)})
    runs = groupby(ends, lambda end: w8_linear.row_for(tiles, end) is not None)
    names = {False: "triton.fp8_linear", True: w8_linear.kernel_name()}
    told = [f"{names[is_tiles]} up to {max(run)} rows" for is_tiles, run in runs]
    return ", ".join([*told, "torch.scaled_mm"]), tuple(ends)


class FP8(InFlight):
    """`--precision fp8`: quantized from a 16-bit checkpoint while it loads."""

    name = "fp8"
    activation: Activation = "fp8_rows"

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: Options = check_options(spec, FP8Options)
        self.canonical = canonical(self.name, self.options)

    def activation_dtype(self, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def build(self, group: LinearGroup, read: Read) -> FP8Linear:
        if group.device.type == "cuda":
            check_on_cuda(group, torch.cuda.get_device_capability(group.device))
        codes = torch.empty(
            group.out_features, group.in_features, dtype=torch.float8_e4m3fn, device=group.device
        )
        scales = torch.empty(group.out_features, device=group.device)
        for number, part in enumerate(group.parts):
            rows = part_rows(group, number)
            codes[rows], scales[rows] = quantize_rows(read_weight(part, read).to(group.device))
        return FP8Linear(group, codes, scales, read_bias(group, read))


def check_on_cuda(group: LinearGroup, capability: tuple[int, int]) -> None:
    """Raises PrecisionError for what no kernel there computes."""
    if capability < LEAST_CAPABILITY:
        raise PrecisionError(
            f"precision `fp8` needs an NVIDIA device of compute capability 8.9 or newer, this one has "
            f"{capability[0]}.{capability[1]}",
            hint="serve with `--precision int8` here",
        )
    if group.dtype != torch.bfloat16:
        raise PrecisionError(
            f"precision `fp8` computes with bfloat16 activations on a GPU, got dtype {group.dtype}",
            hint="leave `--dtype auto`, or give `--dtype bf16`",
        )
    if group.in_features % MULTIPLE or group.out_features % MULTIPLE:
        raise PrecisionError(
            f"precision `fp8` needs in and out features divisible by {MULTIPLE} on a GPU; `{group.name}` has "
            f"{group.in_features} and {group.out_features}",
            hint="serve this checkpoint with `--precision int8` or `bf16`",
        )
