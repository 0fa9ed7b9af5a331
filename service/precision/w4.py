"""The layer that awq, nf4 and int3 share where our own kernels in CUDA C++ serve: their bits, moved.

precision/awq, nf4, int3 --serves--> W4Linear --forward--> kernels/w4_linear

Which linears they serve is a table (kernels/w4_linear/plan.py). Who is not in it keeps the kernels of its own
backend, and the log says why, once for each class of layers.
"""

import logging
from functools import cache

from torch import Tensor

from service.kernels import w4_linear
from service.precision.base import LinearGroup, QuantLinear
from service.precision.source import tensor_bytes

logger = logging.getLogger(__name__)


class W4Linear(QuantLinear):
    codes: Tensor  # uint8, in the order that kernels/w4_linear draws; so the rest
    scales: Tensor  # float16; NF4: uint8 codes of absmax
    zeros: Tensor | None  # of affine codes
    nested_absmax: Tensor | None  # NF4's: float32 [nested blocks of all parts]
    offsets: Tensor | None  # NF4's: float32 [parts]
    bias: Tensor | None  # [out_features of all parts]

    def __init__(
        self, group: LinearGroup, shape: w4_linear.Shape, weight: w4_linear.Weight, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.group, self.weight = group, weight
        self.kernel = w4_linear.kernel_name(group.device, shape)
        self.kernel_rows = tuple(row.max_rows for row in w4_linear.plan(shape) if row.max_rows)
        nested = weight.nested
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("nested_absmax", nested.absmax if nested else None)
        self.register_buffer("offsets", nested.offsets if nested else None)
        self.register_buffer("bias", bias)
        self._bound = w4_linear.bind(weight, shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self._bound(x)
        return y if self.bias is None else y.add_(self.bias)

    def dense(self, part: int) -> Tensor:
        return w4_linear.dequantize(self.weight, part).cpu()

    def bytes(self) -> dict[str, int]:
        found = {
            "codes": tensor_bytes(self.codes),
            "scales": tensor_bytes(self.scales, self.nested_absmax, self.offsets),
            "zeros": tensor_bytes(self.zeros),
            "linear16": tensor_bytes(self.bias),
        }
        return {part: size for part, size in found.items() if size or part != "zeros"}


def shape_of(
    group: LinearGroup, kind: w4_linear.Kind, group_size: int, *, is_nested: bool = True
) -> w4_linear.Shape:
    outs = tuple(part.out_features for part in group.parts)
    return w4_linear.Shape(kind, outs, group.in_features, group_size, group.dtype, is_nested)


def serves(group: LinearGroup, shape: w4_linear.Shape) -> bool:
    """Do our own kernels serve this group on its device? The log says why not, on a GPU that could."""
    if group.device.type != "cuda":
        return False
    reason = w4_linear.absence() or w4_linear.refusal(shape)
    if group.deterministic:
        reason = reason or "their sums depend on the number of rows, which `deterministic` forbids"
    if reason:
        tell_refusal(group.name, reason)
    return not reason


@cache
def tell_refusal(layer: str, reason: str) -> None:
    logger.info("`%s` is not served by our own kernels in CUDA C++: %s", layer, reason)
