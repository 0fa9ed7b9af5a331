"""ModelInstance: a loaded model with its ledger, apart from the engine, which can hold several."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels import decode_attention, gated_linear
from service.kernels.add_rms_norm import add_rms_norm_kernel
from service.kernels.coded_attention import coded_attention_kernel
from service.kernels.gated_silu import gated_silu_kernel
from service.kernels.kv_codes import is_coded
from service.kernels.paged_attention import attention_kernel
from service.kernels.rotary_kv import rotary_kv_kernel
from service.model.batch import PagedKV, StepBatch
from service.model.checkpoint import Checkpoint, TensorSource
from service.model.config import ModelConfig
from service.model.decoder import Decoder, DecoderLayer, Observe, decode_shape
from service.model.verify import verify
from service.precision.base import Backend, QuantLinear, Read

Progress = Callable[[str, int, int, str], None]  # stage, done, total, unit

GROUPS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class ModelInstance:
    """What an engine runs: `forward(batch, kv)`."""

    def __init__(
        self,
        checkpoint: TensorSource,
        backend: Backend,
        decoder: Decoder,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.path = checkpoint.path
        self.random_weights = checkpoint.random_weights
        self.config: ModelConfig = checkpoint.config
        self.num_parameters = checkpoint.num_parameters
        self.backend = backend
        self.decoder = decoder
        self.device = device
        self.dtype = decoder.dtype
        self.kv_dtype = kv_dtype or decoder.dtype

    @classmethod
    def load(
        cls,
        source: str | Path | TensorSource,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        head: Literal["16bit", "int8"] = "16bit",
        max_context_tokens: int = 0,
        deterministic: bool = False,
        kv_dtype: torch.dtype | None = None,
        tokenizer: Path | None = None,
        progress: Progress | None = None,
    ) -> "ModelInstance":
        """Folder, or a source of tensors -> verified, quantized and loaded model.

        `dtype` None: what the backend wants here. `kv_dtype` None: that of activations. `tokenizer`: folder
        of one that is not the checkpoint's. Raises CheckpointError for a folder that is not exactly what its
        config.json says, PrecisionError for one that this backend does not read, and for a backend that
        cannot be `deterministic` here.
        """
        checkpoint = source if isinstance(source, TensorSource) else Checkpoint(source)
        backend = accepted(backend, checkpoint)
        if progress:
            progress("verify", 0, len(checkpoint.names), "tensors")
        verify(checkpoint, tokenizer)
        if progress:
            progress("verify", len(checkpoint.names), len(checkpoint.names), "tensors")
        with checkpoint.reading(device) as read:
            decoder = Decoder(
                checkpoint.config,
                backend,
                counted(read, checkpoint, progress) if progress else read,
                device,
                dtype or backend.activation_dtype(device, checkpoint.dtype),
                head=head,
                max_context_tokens=max_context_tokens,
                deterministic=deterministic,
            )
        if progress:
            progress("load", checkpoint.num_bytes, checkpoint.num_bytes, "bytes")
        return cls(checkpoint, backend, decoder, device, kv_dtype)

    def forward(self, batch: StepBatch, kv: PagedKV, observe: Observe | None = None) -> Tensor:
        """-> logits [R, vocab], any float type, a row for each of `batch.logit_rows`."""
        logits: Tensor = self.decoder(batch, kv, observe)
        return logits

    def new_kv(self, num_blocks: int) -> PagedKV:
        """An empty cache for this model."""
        config = self.config
        return PagedKV(
            config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, self.kv_dtype, self.device
        )

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.new_kv(1).bytes

    def memory_bytes(self) -> dict[str, int]:
        """Ledger part -> bytes; a tied head counts once, as the embedding."""
        ledger: dict[str, int] = defaultdict(int)
        decoder = self.decoder
        for layer in self.layers():
            for name in GROUPS:
                linear: QuantLinear = getattr(layer, name)
                for part, size in linear.bytes().items():
                    ledger[f"weights.{part}"] += size
            for norm in (layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm):
                ledger["weights.norms"] += _bytes(norm)
        ledger["weights.norms"] += _bytes(decoder.final_norm)
        if self.backend.codebook_bytes:
            ledger["weights.codebooks"] = self.backend.codebook_bytes
        ledger["weights.embedding"] = decoder.embedding.bytes()
        if getattr(decoder.head, "weight", None) is not decoder.embedding.weight:
            ledger["weights.head"] = decoder.head.bytes()
        ledger["tables.rotary"] = _bytes(decoder.cos) + _bytes(decoder.sin)
        return dict(ledger)

    @property
    def weight_bytes(self) -> int:
        """Sum of the ledger's `weights.` parts."""
        return sum(size for part, size in self.memory_bytes().items() if part.startswith("weights."))

    def kernels(self) -> dict[str, str]:
        """Layer class or op between layers -> the kernel that serves it, of the first layer."""
        first, head_dim = self.layers()[0], self.config.head_dim
        group = self.config.num_heads // self.config.num_kv_heads
        codes = is_coded(self.kv_dtype)
        attention = coded_attention_kernel if codes else attention_kernel
        fixed = self.decoder.deterministic
        attends = "cuda.decode_attention of decodes, " if self.decodes() else ""
        names = {name: str(getattr(first, name).kernel) for name in GROUPS}
        gated = f"{gated_linear.NAME}, " if first.gate_up_proj.gated_rows else ""
        made = first.down_proj.makes_rows if first.qkv_proj.makes_rows and self.device.type == "cuda" else ""
        return names | {
            "lm_head": self.decoder.head.kernel,
            "attention": attends + attention(self.dtype, self.device, head_dim, group, fixed),
            "add_rms_norm": made or add_rms_norm_kernel(self.dtype, self.device),
            "rotary_kv": attends + rotary_kv_kernel(self.dtype, self.device, head_dim, codes),
            "gated_silu": made or gated + gated_silu_kernel(self.dtype, self.device),
        }

    def decodes(self) -> tuple[decode_attention.Row, ...]:
        """What does rotary embedding and attention of a decode at once; empty where two kernels do."""
        shape = decode_shape(self.config, self.dtype, self.kv_dtype)
        return decode_attention.plan_on(shape, self.device, deterministic=self.decoder.deterministic)

    def outlier_counts(self) -> dict[str, Tensor]:
        """`layer class.number` -> int64 [2] on the device, of the layers that count (precision/base)."""
        linears = {
            f"{name}.{index}": getattr(layer, name)
            for index, layer in enumerate(self.layers())
            for name in GROUPS
        }
        return {
            name: linear.outlier_counts
            for name, linear in linears.items()
            if linear.outlier_counts is not None
        }

    @property
    def is_capturable(self) -> bool:
        """May steps of it run inside a CUDA graph?"""
        linears: list[QuantLinear] = [getattr(layer, name) for layer in self.layers() for name in GROUPS]
        return all(linear.capturable for linear in linears)

    def layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder.layers if isinstance(layer, DecoderLayer)]


def accepted(backend: Backend, source: TensorSource) -> Backend:
    """As it builds layers of this checkpoint; PrecisionError for one that it does not read."""
    if not backend.accepts(source.quantization):
        method = (source.quantization or {}).get("quant_method", "none: it is 16-bit")
        raise PrecisionError(
            f"precision `{backend.canonical}` does not read `{source.path}` (quantization: {method})",
            hint="`--precision auto` serves a checkpoint as it is",
        )
    return backend.reading(source.quantization)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def counted(read: Read, source: TensorSource, progress: Progress) -> Read:
    """`read` that tells the bytes it has brought; a head that is the embedding may stay unread."""
    names: set[str] = set()
    num_bytes, total = 0, source.num_bytes

    def read_and_tell(name: str) -> Tensor:
        nonlocal num_bytes
        tensor = read(name)
        if name not in names:  # some are read twice
            names.add(name)
            num_bytes += tensor.numel() * tensor.element_size()
            progress("load", num_bytes, total, "bytes")
        return tensor

    return read_and_tell
