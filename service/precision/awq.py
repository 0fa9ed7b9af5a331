"""AWQ: four (or three) bits a weight, one scale and one integer zero for each group of input features.

checkpoint in AutoAWQ's GEMM layout --build--> AWQLinear --forward--> kernels/awq_linear
                                           '--> W4Linear (precision/w4), on an H100

The scales that AWQ searches are folded into the checkpoint by quantize/awq; here weights are only read.
Three bits use codes 0..7 in the same 4-bit containers: they cost what four cost, in bytes and in time.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from service.errors import CheckpointError, PrecisionError
from service.kernels import awq_linear, w4_linear
from service.precision import w4
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.linear import LinearSpec
from service.precision.options import AWQOptions
from service.precision.source import part_rows, quantized_activation_dtype, read_bias, tensor_bytes
from service.precision.spec import PrecisionSpec, canonical, check_options


class AWQLinear(QuantLinear):
    codes: Tensor  # these three: kernels.awq_linear.PackedWeight
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None  # [out_features of all parts]

    def __init__(
        self, group: LinearGroup, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.group = group
        weight = awq_linear.prepare(qweight, qzeros, scales, group.dtype)
        self.kernel = weight.kernel
        self.register_buffer("codes", weight.codes)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)
        tensors = self.codes, self.zeros, self.scales, bias
        self.bound = awq_linear.bind(*tensors, deterministic=group.deterministic)
        self.row_invariant = self.bound is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.bound:
            return self.bound(x)
        return awq_linear.apply(x, self.codes, self.zeros, self.scales, self.bias)

    def dense(self, part: int) -> Tensor:
        return awq_linear.dense(self.codes, self.zeros, self.scales)[part_rows(self.group, part)]

    def bytes(self) -> dict[str, int]:
        return {
            "codes": tensor_bytes(self.codes),
            "scales": tensor_bytes(self.scales),
            "zeros": tensor_bytes(self.zeros),
            "linear16": tensor_bytes(self.bias),
        }


class AWQ:
    """`--precision awq`: a 16-bit checkpoint is quantized into the cache first (quantize/awq)."""

    name = "awq"
    activation: Activation = "16bit"
    decodes_weights = True
    quantizer: str | None = "awq"
    codebook_bytes = 0

    def __init__(self, spec: PrecisionSpec) -> None:
        self.options: AWQOptions = check_options(spec, AWQOptions)
        self.canonical = canonical(self.name, self.options)

    @classmethod
    def written_as(cls, quantization: Mapping[str, Any]) -> str | None:
        if quantization.get("quant_method") != cls.name:
            return None
        # group sizes are read from the tensors; other bits are told by `accepts`
        return f"{cls.name}:bits=3" if quantization.get("bits") == 3 else cls.name

    def accepts(self, quantization: Mapping[str, Any] | None) -> bool:
        """PrecisionError for AWQ in another container, and where an option contradicts the checkpoint."""
        if quantization is None:
            return True
        if quantization.get("quant_method") != "awq":
            return False
        version = str(quantization.get("version", "gemm")).lower()
        if version != "gemm":
            raise PrecisionError(
                f"the checkpoint's AWQ container is version `{version}`; `awq` reads `gemm`",
                hint="take the same model in the GEMM layout, or quantize the 16-bit checkpoint",
            )
        bits, group = quantization.get("bits"), quantization.get("group_size")
        if bits != self.options.bits:
            raise PrecisionError(
                f"precision `{self.canonical}` means {self.options.bits} bits, the checkpoint has {bits}",
                hint=f"serve it as `awq:bits={bits}`" if bits == 3 else "`awq` reads 4 and 3 bits",
            )
        if self.options.group not in (0, group):
            raise PrecisionError(
                f"precision `{self.canonical}` means groups of {self.options.group}, "
                f"the checkpoint has {group}",
                hint="leave `group` out for a checkpoint that is already quantized",
            )
        return True

    def reading(self, quantization: Mapping[str, Any] | None) -> Self:
        return self

    def activation_dtype(self, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
        return quantized_activation_dtype(device, checkpoint)

    def build(self, group: LinearGroup, read: Read) -> AWQLinear | w4.W4Linear:
        parts = [read_part(part, read) for part in group.parts]
        if len({scales.shape[0] for _, _, scales in parts}) > 1:
            raise CheckpointError(
                f"the parts of `{group.name}` have different group sizes, which one layer cannot hold",
                hint="quantize the checkpoint with one group size",
            )
        qweight, qzeros, scales = (
            torch.cat(kind, dim=1).to(group.device) for kind in zip(*parts, strict=True)
        )
        bias = read_bias(group, read)
        shape = w4.shape_of(group, "affine", group.in_features // scales.shape[0])
        if w4.serves(group, shape):
            packed = w4_linear.pack_awq(qweight, qzeros, scales, shape.outs)
            return w4.W4Linear(group, shape, packed, bias)
        return AWQLinear(group, qweight, qzeros, scales, bias)


def read_part(part: LinearSpec, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """qweight int32 [in, out / 8], qzeros int32 [in / group, out / 8], scales float16 [in / group, out]."""
    qweight, qzeros, scales = (read(f"{part.path}.{name}") for name in ("qweight", "qzeros", "scales"))
    if qweight.dtype != torch.int32 or qweight.shape != (part.in_features, part.out_features // 8):
        raise CheckpointError(
            f"`{part.path}.qweight` is {qweight.dtype} {list(qweight.shape)}; AWQ's GEMM layout needs "
            f"int32 {[part.in_features, part.out_features // 8]}",
            hint="a checkpoint in another AWQ layout must be converted, or quantized anew, first",
        )
    groups = scales.shape[0]
    if (
        qzeros.dtype != torch.int32
        or scales.shape != (groups, part.out_features)
        or qzeros.shape != (groups, part.out_features // 8)
        or part.in_features % groups
    ):
        raise CheckpointError(
            f"`{part.path}`: scales {list(scales.shape)} and qzeros {qzeros.dtype} {list(qzeros.shape)} "
            f"do not share groups of the {part.in_features} input features",
            hint="the checkpoint is damaged or of another AWQ layout; fetch or quantize it again",
        )
    # float16 even under bfloat16 activations, which would drop three bits of every scale
    return qweight, qzeros, scales.to(torch.float16)
