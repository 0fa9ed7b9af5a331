"""INT3: three bits a weight, a scale and an integer zero for each group of input features; a memory mode.

16-bit weights --build: the best of a few clippings, rounded--> codes, zeros, scales --forward--> int3_linear
                                                                '--> W4Linear (precision/w4), on an H100

Nothing is calibrated: it is made while a 16-bit checkpoint loads, and what it costs in quality is much
(docs/quality.md). For three bits that know the activations, `awq:bits=3` keeps them in four-bit containers.
"""

import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels import w4_linear
from service.kernels.int3_linear import dequantize, int3_linear, pack, pack_zeros
from service.kernels.int3_round import round_groups
from service.precision import w4
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.linear import LinearSpec
from service.precision.options import INT3Options
from service.precision.sizes import check_int3
from service.precision.source import InFlight, part_rows, read_bias, read_weight, tensor_bytes
from service.precision.spec import PrecisionSpec, canonical, check_options


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
        pairs = slice(rows.start // 2, rows.stop // 2)
        return dequantize(self.codes[:, :, rows], self.zeros[:, pairs], self.scales[:, rows]).t().cpu()

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
    decodes_weights = True

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: INT3Options = check_options(spec, INT3Options)
        self.canonical = canonical(self.name, self.options)

    def build(self, group: LinearGroup, read: Read) -> INT3Linear | w4.W4Linear:
        check_int3(group.parts, self.options.group)
        check_dtype(group)
        parts = [self._quantize(part, read, group.device) for part in group.parts]
        bias = read_bias(group, read)
        codes, zeros, scales = zip(*parts, strict=True)
        shape = w4.shape_of(group, "int3", self.options.group)
        if w4.serves(group, shape):
            packed = w4_linear.pack_int3(torch.cat(codes), torch.cat(zeros), torch.cat(scales), shape.outs)
            return w4.W4Linear(group, shape, packed, bias)
        return INT3Linear(
            group,
            torch.cat([pack(part.t()) for part in codes], dim=2),
            torch.cat([pack_zeros(part) for part in zeros], dim=1),
            torch.cat(scales).t().contiguous(),
            bias,
        )

    def _quantize(self, part: LinearSpec, read: Read, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        weight = read_weight(part, read).to(device)
        codes, zeros, scales = round_groups(weight, self.options.group)
        if not scales.isfinite().all():
            raise PrecisionError(
                f"tensor `{part.path}.weight` has groups of weights too far apart for a float16 scale",
                hint="serve this checkpoint with `--precision bf16`",
            )
        return codes, zeros, scales


def check_dtype(group: LinearGroup) -> None:
    if group.device.type == "cuda" and group.dtype == torch.float32:
        raise PrecisionError(
            "precision `int3` computes with 16-bit activations on a GPU, got dtype float32",
            hint="leave `--dtype auto`",
        )
