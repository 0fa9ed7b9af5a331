"""Linears with 4-bit codes and a scale and zero a group: op schemas, shape checks, registration.

precision/awq --prepare (once, at load)--> PackedWeight --apply--> y

`halftone::awq_linear` takes AutoAWQ's tensors as they lie in a checkpoint: the Triton kernel on CUDA, the
reference elsewhere. `halftone::awq_linear_int4pack` takes what cpu.py packs them into, and native.py has
blocks of its own for bfloat16 activations. No caller asks which device it is on: `prepare` has answered that
by the tensors it returns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from service.kernels.awq_linear import cpu, native, reference

__all__ = ["PackedWeight", "apply", "bind", "check", "dense", "prepare"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define("awq_linear(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales) -> Tensor")
library.define("awq_linear_int4pack(Tensor x, Tensor codes, Tensor zeros, Tensor scales) -> Tensor")
library.impl("awq_linear", reference.awq_linear, "CompositeExplicitAutograd")
library.impl("awq_linear_int4pack", cpu.linear, "CPU")


def _fake(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


for _name in ("awq_linear", "awq_linear_int4pack"):
    torch.library.register_fake(f"halftone::{_name}", _fake, lib=library)

if torch.cuda.is_available():
    from service.kernels.awq_linear import triton as cuda

    library.impl("awq_linear", cuda.awq_linear, "CUDA")

_gemm = torch.ops.halftone.awq_linear.default
_int4pack = torch.ops.halftone.awq_linear_int4pack.default


@dataclass(frozen=True)
class PackedWeight:
    """Resident form of one linear; which of the three, `kernel` tells: AutoAWQ's, int4pack or native."""

    kernel: str
    codes: Tensor  # int32 [in, out / 8]; uint8 [out, in / 2]; uint8 [out / 64, in / 2, 64]
    zeros: (
        Tensor  # int32 [in / group, out / 8]; int8 [in / group, out], 8 - zero; uint8 [out / 64, groups, 32]
    )
    scales: Tensor  # float16 [in / group, out]; the same or bf16; float16 [out / 64, groups, 64]


def check(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> None:
    """Our own invariants of the GEMM layout; what comes from a file was checked by its reader."""
    groups, out_features = scales.shape
    assert qweight.dtype == qzeros.dtype == torch.int32
    assert scales.dtype == torch.float16
    assert qweight.shape[1] * 8 == out_features, (qweight.shape, scales.shape)
    assert qzeros.shape == (groups, out_features // 8), (qzeros.shape, scales.shape)
    assert qweight.shape[0] % groups == 0, (qweight.shape, scales.shape)


def prepare(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype = torch.float16
) -> PackedWeight:
    """AutoAWQ's tensors on their device -> the form that is fastest there for activations of `dtype`.

    Bits are only moved; but under bf16 activations int4pack rounds scales to bf16 (cpu.py).
    """
    check(qweight, qzeros, scales)
    in_features = qweight.shape[0]
    if qweight.is_cuda:
        return PackedWeight("triton.awq_linear", qweight, qzeros, scales)
    if dtype == torch.bfloat16 and native.fits(qweight, scales):
        return PackedWeight("native.avx512.awq_linear", *native.pack(qweight, qzeros, scales))
    if cpu.fits(in_features, scales.shape[1], in_features // scales.shape[0]):
        return PackedWeight("torch.int4pack", *cpu.pack_int4(qweight, qzeros, scales, dtype))
    return PackedWeight("reference.awq_linear", qweight, qzeros, scales)


def apply(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, in] -> [tokens, out]; the resident form is told by its type and dimensions."""
    if native.is_packed(codes):
        return native.linear(codes, zeros, scales, bias)(x)
    y: Tensor = (_int4pack if codes.dtype == torch.uint8 else _gemm)(x, codes, zeros, scales)
    return y if bias is None else y.add_(bias)


def bind(
    codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None, *, deterministic: bool = False
) -> Callable[[Tensor], Tensor] | None:
    """`apply` of this weight for a layer that calls it often; None where nothing can be prepared.

    What is bound in C, or as `deterministic`, computes a row alike whatever the others are, bit for bit.
    """
    if deterministic and codes.is_cuda:
        return partial(fixed, codes=codes, zeros=zeros, scales=scales, bias=bias)
    return native.linear(codes, zeros, scales, bias) if native.is_packed(codes) else None


def fixed(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`apply` on CUDA, in one order of sums for any number of rows."""
    y = cuda.awq_linear(x, codes, zeros, scales, deterministic=True)
    return y if bias is None else y.add_(bias)


def dense(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, in] on the CPU: what the resident form means."""
    if native.is_packed(codes):
        return native.dequantize(codes, zeros, scales)
    if codes.dtype == torch.uint8:
        return cpu.dequantize(codes, zeros, scales, torch.float32).t()
    return reference.dequantize(codes, zeros, scales).t().cpu()
