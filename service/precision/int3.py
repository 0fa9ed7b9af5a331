"""INT3: three bits a weight, a scale and an integer zero for each group of input features; a memory mode.

16-bit weights --build: the best of a few clippings, rounded--> codes, zeros, scales --forward--> int3_linear

Nothing is calibrated: it is made while a 16-bit checkpoint loads, and what it costs in quality is much
(docs/quality.md). For three bits that know the activations, `awq:bits=3` keeps them in four-bit containers.
"""

from typing import Any

import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels.int3_linear import LARGEST, TOGETHER, dequantize, int3_linear, pack
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.linear import LinearSpec
from service.precision.options import INT3Options
from service.precision.sizes import check_int3
from service.precision.source import InFlight, part_rows, read_bias, read_weight, tensor_bytes
from service.precision.spec import PrecisionSpec, canonical, check_options

# shares of a group's range that the codes may span: what lies beyond is clipped, what lies inside is finer
CLIPPINGS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
# of what a clipping leaves over, summed: squares clip more and read worse than no clipping (docs/quality.md)
ERROR_POWER = 6
ROWS_AT_ONCE = 1 << 22  # weights whose errors are compared at once: 16 MiB in float32


class INT3Linear(QuantLinear):
    codes: Tensor  # these three: kernels/int3_linear
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None  # [out_features of all parts]

    def __init__(
        self, group: LinearGroup, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.group = group
        self.kernel = "triton.int3_linear" if group.device.type == "cuda" else "torch.int3_linear"
        self.register_buffer("codes", codes)
        self.register_buffer("zeros", zeros)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = int3_linear(x, self.codes, self.zeros, self.scales)
        return y if self.bias is None else y.add_(self.bias)

    def dense(self, part: int) -> Tensor:
        rows = part_rows(self.group, part)
        words = slice(rows.start // TOGETHER, rows.stop // TOGETHER)
        return dequantize(self.codes[:, :, rows], self.zeros[words], self.scales[:, rows]).t().cpu()

    def bytes(self) -> dict[str, int]:
        return {
            "codes": tensor_bytes(self.codes),
            "scales": tensor_bytes(self.scales),
            "zeros": tensor_bytes(self.zeros),
            "linear16": tensor_bytes(self.bias),
        }


class INT3(InFlight):
    """`--precision int3`: quantized from a 16-bit checkpoint while it loads."""

    name = "int3"
    activation: Activation = "16bit"

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: INT3Options = check_options(spec, INT3Options)
        self.canonical = canonical(self.name, self.options)

    def build(self, group: LinearGroup, read: Read) -> INT3Linear:
        check_int3(group.parts, self.options.group)
        check_dtype(group)
        parts = [self._quantize(part, read, group.device) for part in group.parts]
        codes, zeros, scales = zip(*parts, strict=True)
        merged = torch.cat(codes, dim=2), torch.cat(zeros), torch.cat(scales, dim=1)
        return INT3Linear(group, *merged, read_bias(group, read))

    def _quantize(self, part: LinearSpec, read: Read, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        weight = read_weight(part, read).to(device)
        codes, zeros, scales = round_groups(weight, self.options.group)
        if not scales.isfinite().all():
            raise PrecisionError(
                f"tensor `{part.path}.weight` has groups of weights too far apart for a float16 scale",
                hint="serve this checkpoint with `--precision bf16`",
            )
        return pack(codes.t()), pack(zeros), scales.t().contiguous()


def check_dtype(group: LinearGroup) -> None:
    if group.device.type == "cuda" and group.dtype == torch.float32:
        raise PrecisionError(
            "precision `int3` computes with 16-bit activations on a GPU, got dtype float32",
            hint="leave `--dtype auto`",
        )


def round_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> codes and zeros uint8 [out, in] and [out, groups], scales float16 [out, groups].

    A group of zeros has scale 1, so that 0 means 0.
    """
    rows = max(1, ROWS_AT_ONCE // weight.shape[1])
    found = [round_rows(piece.float(), group_size) for piece in weight.split(rows)]
    codes, zeros, scales = (torch.cat(kind) for kind in zip(*found, strict=True))
    return codes, zeros, scales


def round_rows(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = weight.unflatten(1, (-1, group_size))  # [out, groups, group]
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    span = torch.where(high == low, 1.0, high - low)
    best: list[Tensor] = []
    least: Any = None
    for clipping in CLIPPINGS:
        scale = ((high - low) * clipping / LARGEST).half().float()
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low * clipping / scale).round().clamp(0, LARGEST)
        codes = (grouped / scale + zero).round().clamp(0, LARGEST)
        # in units of the range: a small weight's sixth power is no float32
        left = ((codes - zero) * scale - grouped) / span
        error = left.square().pow(ERROR_POWER // 2).sum(-1, keepdim=True)
        if least is None:
            best, least = [codes, zero, scale], error
            continue
        better = error < least
        best = [torch.where(better, new, old) for new, old in zip((codes, zero, scale), best, strict=True)]
        least = torch.where(better, error, least)
    codes, zero, scale = best
    return codes.flatten(1).to(torch.uint8), zero[..., 0].to(torch.uint8), scale[..., 0].half()
