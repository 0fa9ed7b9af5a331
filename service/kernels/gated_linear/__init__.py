"""gate_up_proj of many rows with the gate of the MLP behind it: silu(x G^T) * (x U^T) in one kernel.

norm --x [T, in]--> bind's Bound --[T, n]--> down_proj; other numbers of rows: dense_linear, then gated_silu

On an H100, 16-bit weights without a bias: what the two products are is never written to memory. plan.py says
which numbers of rows it serves.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from service.kernels.cuda import absence
from service.kernels.gated_linear.plan import Variant, variant_of
from service.kernels.gated_linear.reference import gated_linear

if TYPE_CHECKING:
    from service.kernels.gated_linear.cuda import Bound

__all__ = ["NAME", "Variant", "bind", "gated_linear", "load", "variant_of"]

NAME = "cuda.gated_tile of many rows"  # for /version


def bind(weight: Tensor) -> "Bound | None":
    """[2 n, in], gates over ups -> what multiplies with it; None where nobody does it in one."""
    if not weight.is_cuda or absence() or not weight.is_contiguous():
        return None
    variant = variant_of(weight.shape[0], weight.shape[1], weight.dtype)
    if variant is None:
        return None
    from service.kernels.gated_linear.cuda import Bound

    bound = Bound(weight, variant)
    return bound if bound.served else None


def load(variant: Variant) -> object:
    """Compiles it for the GPU and brings it there, ahead of its first call."""
    from service.kernels.gated_linear import cuda

    return cuda.load(variant)
