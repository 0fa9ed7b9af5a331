"""What the kernels of an engine are compiled for: all that is known before any weight is read.

startup --shapes_of--> Shapes --> kernels_ahead
"""

from dataclasses import dataclass

import torch

from service.kernels import decode_attention, dense_linear, gated_linear, w4_linear, w8_linear
from service.kernels.cuda import absence
from service.kernels.w4_linear.layout import NF4_BLOCK
from service.messages import EngineConfig
from service.model.checkpoint import TensorSource
from service.model.config import ModelConfig
from service.model.decoder import decode_shape
from service.model.instance import GROUPS
from service.model.layout import layer_groups
from service.precision.base import Backend
from service.precision.options import Int8Options

LINEARS = {"fp32": "dense", "bf16": "dense", "fp16": "dense", "awq": "awq", "fp8": "fp8", "int3": "int3"}


@dataclass(frozen=True)
class Int8Kind:
    """How int8 is served by our own kernels."""

    threshold: float
    by_row: bool
    skipped: list[str]  # layer classes in 16 bits


@dataclass(frozen=True)
class Shapes:
    """What the kernels of an engine are compiled for."""

    config: ModelConfig
    dtype: torch.dtype  # of activations
    kv_dtype: torch.dtype
    linears: str  # `dense`, `awq`, `fp8`, `int3` or, where no kernel of ours serves them, empty
    group_size: int  # of awq and int3
    int8: Int8Kind | None
    dense_head: bool  # a 16-bit lm_head
    max_requests: int
    max_context_tokens: int
    deterministic: bool
    w4_kind: w4_linear.Kind | None = None  # of codes, where kernels/w4_linear serves what its table has
    cuda_dense: bool = False  # our own 16-bit kernel in CUDA C++ serves what its table has
    cuda_w8: bool = False  # our own 8-bit kernel in CUDA C++ serves int8's many rows and fp8's few
    cuda_decode: bool = False  # our own attention in CUDA C++ serves decodes, where its table has them

    def w4(self, name: str) -> w4_linear.Shape | None:
        """The linear of this layer class, if these kernels serve it."""
        if self.w4_kind is None:
            return None
        parts = layer_groups(self.config, 0)[name]
        outs = tuple(part.out_features for part in parts)
        group_size = NF4_BLOCK if self.w4_kind == "nf4" else self.group_size
        shape = w4_linear.Shape(self.w4_kind, outs, parts[0].in_features, group_size, self.dtype)
        return None if w4_linear.refusal(shape) else shape

    def w8(self, name: str) -> w8_linear.Shape | None:
        """The linear of this layer class, if kernels/w8_linear serves rows of it."""
        is_int8 = self.int8 is not None and name not in self.int8.skipped
        if not (self.cuda_w8 and (is_int8 or self.linears == "fp8")):
            return None
        parts = layer_groups(self.config, 0)[name]
        shape = w8_linear.Shape(
            "int8" if is_int8 else "fp8",
            sum(part.out_features for part in parts),
            parts[0].in_features,
            self.dtype,
            any(part.bias for part in parts),
            self.int8.threshold if self.int8 else 0.0,
        )
        return None if w8_linear.refusal(shape) else shape

    def tiles(self, name: str) -> tuple[w8_linear.Row, ...]:
        """What kernels/w8_linear has for this layer class."""
        shape = self.w8(name)
        return w8_linear.plan(shape) if shape else ()

    def dense(self, out_features: int, in_features: int) -> tuple[dense_linear.Row, ...]:
        """Of a 16-bit linear the plan for few rows; empty where the kernels of Triton serve it."""
        return dense_linear.plan(out_features, in_features, self.dtype) if self.cuda_dense else ()

    def gated(self) -> gated_linear.Variant | None:
        """The kernel that computes gate_up_proj of many rows and the gate behind it, if one does."""
        is_dense = self.linears == "dense" or (self.int8 is not None and "gate_up_proj" in self.int8.skipped)
        parts = layer_groups(self.config, 0)["gate_up_proj"]
        if not (self.cuda_dense and is_dense) or any(part.bias for part in parts):
            return None
        out_features = sum(part.out_features for part in parts)
        return gated_linear.variant_of(out_features, parts[0].in_features, self.dtype)

    def decodes(self) -> tuple[decode_attention.Row, ...]:
        """The plan for attention of decodes; empty where Triton's kernels serve them."""
        shape = decode_shape(self.config, self.dtype, self.kv_dtype)
        return decode_attention.plan(shape) if self.cuda_decode else ()

    def dense_linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of what stays in 16 bits."""
        skipped = self.int8.skipped if self.int8 else []
        names = [name for name in GROUPS if self.linears == "dense" or name in skipped]
        groups = [layer_groups(self.config, 0)[name] for name in names]
        found = [(sum(part.out_features for part in parts), parts[0].in_features) for parts in groups]
        head = (self.config.vocab_size, self.config.hidden_size)
        return [*found, head] if self.dense_head else found


def shapes_of(
    source: TensorSource,
    backend: Backend,
    config: EngineConfig,
    dtype: torch.dtype,
    max_requests: int,
    kv_dtype: torch.dtype | None = None,
) -> Shapes:
    """What is known before any weight is read. `kv_dtype` None: that of activations."""
    return Shapes(
        source.config,
        dtype,
        kv_dtype or dtype,
        LINEARS.get(backend.name, ""),
        group_size_of(source, backend),
        int8_kind(backend) if backend.name == "int8" else None,
        config.head == "16bit",
        max_requests,
        config.max_context_tokens or source.config.max_context_tokens,
        config.deterministic,
        None if config.deterministic or absence() else w4_kind(backend),
        not (config.deterministic or absence()),
        not (config.deterministic or absence()),
        not (config.deterministic or absence()),
    )


def group_size_of(source: TensorSource, backend: Backend) -> int:
    """Weights under one scale, of awq and int3; 0 where nobody asks."""
    if backend.name == "int3":
        return int(backend.options.model_dump()["group"])
    return int((source.quantization or {}).get("group_size", 0))


def w4_kind(backend: Backend) -> w4_linear.Kind | None:
    if backend.name == "nf4":
        return "nf4" if getattr(backend.options, "double_quant", False) else None
    if backend.name == "int3":
        return "int3"
    return "affine" if backend.name == "awq" else None


def int8_kind(backend: Backend) -> Int8Kind | None:
    """None where bitsandbytes' product serves."""
    options = backend.options
    assert isinstance(options, Int8Options)
    if options.kernel == "bitsandbytes":
        return None
    return Int8Kind(options.threshold, options.by_row, options.skip.split("+"))
