"""From an EngineConfig to the tensors of its model, none of them read yet, and what builds layers of them.

startup, preflight, canary, evaluate --EngineConfig, precision--> TensorSource, Backend
"""

from pathlib import Path

import torch

from service.engine.shortage import told_quantizing
from service.errors import PrecisionError
from service.messages import EngineConfig
from service.model.checkpoint import Checkpoint, TensorSource
from service.model.instance import Progress
from service.model.random_weights import Draw, RandomWeights
from service.precision import AUTO, TABLE, backend_of, load_backend
from service.precision.base import Backend


def open_source(config: EngineConfig, device: torch.device) -> TensorSource:
    """Where the tensors of the configured model come from; none is read."""
    if config.load_format == "random":
        draw = Draw(config.load_seed, config.random_outliers, config.random_std)
        return RandomWeights(Path(config.model_path), device, draw)
    return Checkpoint(config.model_path)


def open_model(
    config: EngineConfig, precision: str, device: torch.device, progress: Progress
) -> tuple[TensorSource, Backend]:
    """-> where the tensors come from, and what builds layers of them.

    A calibrated mode is quantized into the cache first; random weights are drawn as that mode packs them.
    """
    source = open_source(config, device)
    backend = choose_backend(precision, source, device)
    if backend.quantizer and source.quantization is None:
        from service.quantize import packing, prepare  # calibration is heavy and most starts do without

        if isinstance(source, RandomWeights):
            return source.quantized(packing(source.config, backend)), backend
        with told_quantizing(device, backend.canonical):
            path = prepare(source.path, backend, config, progress)
        source = Checkpoint(path)
    return source, backend


def choose_backend(precision: str, checkpoint: TensorSource, device: torch.device) -> Backend:
    """`auto` is what the checkpoint is: its quantization, else its 16-bit type, which a CPU has as bf16."""
    if precision != AUTO:
        return load_backend(precision)
    if checkpoint.quantization is not None:
        if backend := backend_of(checkpoint.quantization):
            return backend
        method = checkpoint.quantization.get("quant_method", "unknown")
        raise PrecisionError(
            f"checkpoint `{checkpoint.path}` is quantized by `{method}`, which no precision reads; "
            f"there are {', '.join(TABLE)}",
            hint="serve the 16-bit checkpoint it was made from",
        )
    is_half = device.type == "cuda" and checkpoint.dtype == torch.float16
    return load_backend("fp16" if is_half else "bf16")
