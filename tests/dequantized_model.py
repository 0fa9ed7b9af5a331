"""A model as its stored bits mean it: the same decoder over plain products of the dequantized weights.

layers that serve --dense()--> Dequantized.build --> DenseLinear --forward--> y

What stands between linears is the served model's own, so that whatever tells the two apart is a kernel of the
linears, or rounding. Modes that code activations too have them coded here by their definitions, in torch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.checkpoint import TensorSource
from service.model.instance import GROUPS, ModelInstance
from service.precision.base import Activation, LinearGroup, QuantLinear, Read
from service.precision.full import FullLinear
from service.precision.int8 import Int8
from service.precision.options import FullOptions
from service.precision.source import InFlight, read_bias
from service.precision.spec import Options

LARGEST_E4M3 = 448.0
Meaning = Callable[[Tensor], Tensor]  # x [T, in] -> float32 [T, in], what its codes mean


def as_it_is(x: Tensor) -> Tensor:
    return x.float()


def as_int8_rows(threshold: float) -> Meaning:
    """LLM.int8() by row, in float16 as bitsandbytes has it. Source: arXiv 2208.07339.

    What reaches the threshold is kept, the rest of a row is rounded to 127ths of the largest of it.
    0: nothing is kept.
    """

    def coded(x: Tensor) -> Tensor:
        x = x.half().float()
        is_outlier = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
        regular = x.masked_fill(is_outlier, 0)
        most = regular.abs().amax(1, keepdim=True)
        codes = (regular * (127 / most)).nan_to_num(0).round()  # in this order, which decides ties
        return torch.where(is_outlier, x, codes * (most / 127))

    return coded


def as_fp8_rows(x: Tensor) -> Tensor:
    """E4M3, a scale for each row. Source: arXiv 2209.05433."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / LARGEST_E4M3
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class DenseLinear(QuantLinear):
    """Products and sums in float32, rounded once."""

    kernel = "torch, dequantized"
    weight: Tensor  # float32 [out_features of all parts, in_features]
    bias: Tensor | None

    def __init__(self, group: LinearGroup, weight: Tensor, bias: Tensor | None, meaning: Meaning) -> None:
        super().__init__()
        self.group, self._meaning = group, meaning
        self.register_buffer("weight", weight.to(group.device))
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._meaning(x), self.weight, self.bias).to(x.dtype)

    def dense(self, part: int) -> Tensor:
        outs = [each.out_features for each in self.group.parts]
        return self.weight.split(outs)[part].cpu()

    def bytes(self) -> dict[str, int]:
        return {"linear16": self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)}


class Dequantized(InFlight):
    """Builds, of whatever checkpoint, the linears of a model that serves."""

    activation: Activation = "16bit"

    def __init__(self, model: ModelInstance, *, codes_activations: bool) -> None:
        self.name = self.canonical = f"{model.backend.canonical}, dequantized"
        self.options: Options = FullOptions()
        self._codes_activations = codes_activations
        self._backend = model.backend
        self._served: dict[str, QuantLinear] = {}
        for layer in model.layers():
            for name in GROUPS:
                linear: QuantLinear = getattr(layer, name)
                self._served[linear.group.parts[0].path] = linear

    def accepts(self, quantization: object) -> bool:
        return True

    def build(self, group: LinearGroup, read: Read) -> DenseLinear:
        served = self._served[group.parts[0].path]
        weight = torch.cat([served.dense(part) for part in range(len(group.parts))])
        meaning: Meaning = as_it_is
        if self._codes_activations and not isinstance(served, FullLinear):
            meaning = self._meaning()
        if meaning is as_it_is and group.dtype != torch.float32:
            weight = weight.half().float()  # as a 16-bit checkpoint would hold it
        return DenseLinear(group, weight, read_bias(group, read), meaning)

    def _meaning(self) -> Meaning:
        backend = self._backend
        if backend.activation == "fp8_rows":
            return as_fp8_rows
        if backend.activation == "16bit":
            return as_it_is
        assert isinstance(backend, Int8)
        assert backend.options.by_row, "by batch a row's codes depend on what it is computed with"
        return as_int8_rows(backend.options.threshold)


def dequantized(
    model: ModelInstance,
    source: TensorSource,
    dtype: torch.dtype | None = None,
    *,
    codes_activations: bool = True,
) -> ModelInstance:
    """`source`: what `model` was loaded from; `dtype` None: activations of its type.

    Without `codes_activations` only the weights are those of the mode, rounded to float16.
    """
    backend = Dequantized(model, codes_activations=codes_activations)
    positions = model.decoder.cos.shape[0]
    return ModelInstance.load(
        source, backend, model.device, dtype or model.dtype, max_context_tokens=positions
    )
