"""What a precision is: it turns 16-bit (or pre-quantized) tensors into layers that multiply.

checkpoint tensors --Backend.build(group, read)--> QuantLinear --forward(x)--> y

A group holds the linears that share one input (q, k, v; gate, up; or one alone). Its parts are quantized
one by one, exactly as if each stood alone, and then packed together so that one kernel call serves all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.gated_silu import gated_silu
from service.kernels.int8_rows import Live
from service.precision.linear import LinearSpec
from service.precision.spec import Options, PrecisionSpec

Read = Callable[[str], Tensor]
Activation = Literal["16bit", "int8_rows", "fp8_rows"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that share one input and are built into one layer."""

    name: str  # layer class: qkv_proj, o_proj, gate_up_proj, down_proj
    parts: tuple[LinearSpec, ...]
    device: torch.device
    dtype: torch.dtype  # of activations in and out
    deterministic: bool = False  # take kernels that are row-invariant, where there is a choice
    live: Live = field(default_factory=Live, compare=False)  # of the step under way, as the decoder says it

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)


class QuantLinear(nn.Module, ABC):
    """A built group. Tensors are buffers or parameters, so moving and counting them is torch's business."""

    group: LinearGroup
    kernel: str = ""  # name of the kernel that serves this layer, for /version
    capturable: bool = True  # may it run inside a CUDA graph
    kernel_rows: tuple[int, ...] = ()  # most rows of each kernel but the last, where several serve
    chosen_by_rows: bool = False  # a library has many kernels for it, and picks one by the number of rows
    row_invariant: bool = False  # a row's result, bit for bit, does not depend on the others of its call

    makes_rows: str = ""  # the kernel that on CUDA computes the norm or the gate before it too
    gated_rows: tuple[int, ...] = ()  # numbers of rows behind which a check of `normed_gated` tells enough
    outlier_counts: Tensor | None = None  # int64 [2]: numbers multiplied in 16 bits so far, and all

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features of all parts, in order]; bias included."""

    def normed(self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """kernels/add_rms_norm's sum [tokens, in_features], and `forward` of its norm: in one where that is
        faster."""
        total, x = add_rms_norm(hidden, delta, gain, eps)
        return total, self.forward(x)

    def normed_gated(
        self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        """`normed` with kernels/gated_silu behind it, where one kernel computes so many rows of both faster;
        down_proj's input, of which it is not to take `gated`."""
        return None

    def gated(self, gate_up: Tensor) -> Tensor:
        """`forward` of kernels/gated_silu of [tokens, 2 in_features]."""
        return self.forward(gated_silu(gate_up, self.group.deterministic))

    @abstractmethod
    def dense(self, part: int) -> Tensor:
        """What the stored bits of one part mean: float32 [out_features, in_features] on the CPU."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes by ledger part: codes, scales, zeros, codebooks, linear16 (unquantized
        weights and biases).

        Counts what is resident after the first forward, whatever a library calls its buffers.
        """


class Backend(Protocol):
    """One row of the table. Its constructor raises PrecisionError on bad options."""

    name: str
    options: Options
    canonical: str  # flag, metric label, report column
    activation: Activation
    decodes_weights: bool  # on their way into a product of 16-bit numbers
    codebook_bytes: int  # of tables that all layers share
    quantizer: str | None  # step of service/quantize that makes this mode's checkpoint from a 16-bit one

    def __init__(self, spec: PrecisionSpec) -> None: ...

    @classmethod
    def written_as(cls, quantization: Mapping[str, Any]) -> str | None:
        """Canonical text of the mode that a checkpoint with this `quantization_config` is in, or None."""
        ...

    def accepts(self, quantization: Mapping[str, Any] | None) -> bool:
        """Can it read a checkpoint with this `quantization_config` (None: a 16-bit one)?"""
        ...

    def reading(self, quantization: Mapping[str, Any] | None) -> "Backend":
        """The backend whose `build` reads such a checkpoint, which is one that this accepts."""
        ...

    def activation_dtype(self, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
        """Type of activations and KV cache when the user asked for `auto`."""
        ...

    def build(self, group: LinearGroup, read: Read) -> QuantLinear:
        """`read` takes a full tensor name and returns it on the CPU in the checkpoint's dtype."""
        ...
