"""A 16-bit checkpoint -> the same model in AutoAWQ's GEMM layout, in a folder that stands alone.

Checkpoint + text --quantize_checkpoint()--> safetensors shards, config.json, tokenizer, halftone.json

Layout of one linear: `qweight` int32 [in, out/8], `qzeros` int32 [in/group, out/8], `scales` float16
[in/group, out]; the order of the eight nibbles in a word is kernels/awq_linear's. With `bits: 3` codes
0..7 sit in the same 4-bit containers. Embedding, head, norms and biases stay as they are, up to the scales
folded into them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from service.errors import CheckpointError
from service.kernels.awq_linear.reference import pack
from service.model.checkpoint import Checkpoint
from service.model.config import ModelConfig, read_json
from service.model.folders import RANDOM, write_json, write_manifest
from service.model.layout import layer_groups
from service.model.shards import ShardWriter, copy_companions
from service.model.verify import verify
from service.precision.sizes import choose_awq_group
from service.quality.texts import Text, spread, token_windows
from service.quantize.awq import Grid, Rounded, quantize_layer
from service.quantize.calibration import ObservedLayer, observe_layers

Progress = Callable[[str, int, int, str], None]  # stage, done, total, unit: as messages.Loading

WINDOWS = 16
WINDOW_TOKENS = 512


def choose_grid(config: ModelConfig, bits: int, group_size: int) -> Grid:
    """`group_size` 0: the largest that divides every linear's in_features. PrecisionError if none does."""
    parts = [part for group in layer_groups(config, 0).values() for part in group]
    return Grid(bits, choose_awq_group(parts, group_size))


def checkpoint_bytes(checkpoint: Checkpoint, grid: Grid) -> int:
    """Bytes that the quantized folder will take: 4-bit containers, a scale and a zero a group, the rest."""
    linear = {
        part.path: part.in_features * part.out_features
        for layer in range(checkpoint.config.num_layers)
        for group in layer_groups(checkpoint.config, layer).values()
        for part in group
    }
    packed = sum(linear.values()) // 2 + sum(linear.values()) * 20 // (8 * grid.group_size)
    infos = (checkpoint.info(name) for name in checkpoint.names if name.removesuffix(".weight") not in linear)
    rest = sum(torch.Size(info.shape).numel() * 4 for info in infos)
    return packed + rest + 32_000_000  # tokenizer and headers


def gemm_layout(rounded: Rounded) -> dict[str, Tensor]:
    """One linear -> AutoAWQ's three tensors."""
    return {
        "qweight": pack(rounded.codes.t()),
        "qzeros": pack(rounded.zeros.t()),
        "scales": rounded.scales.t(),
    }


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    grid: Grid,
    text: Text,
    device: torch.device,
    origin: dict[str, str],
    progress: Progress,
) -> None:
    """Fill the empty `folder`; the caller makes it appear at its place when this has returned.

    `origin` goes into the manifest beside the calibration text: what was quantized, and how.
    Raises CheckpointError when activations overflow the model's type, SettingError for a text too short.
    """
    num_layers = checkpoint.config.num_layers
    progress("calibrate", 0, num_layers, "layers")
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    windows = spread(token_windows(text, tokenizer, WINDOW_TOKENS), WINDOWS)
    verify(checkpoint)
    writer = ShardWriter(folder)
    with checkpoint.reading(device) as read:
        for layer in observe_layers(checkpoint, read, windows, device):
            for name, tensor in quantized_tensors(checkpoint, layer, grid):
                writer.add(name, tensor)
            progress("quantize", layer.index + 1, num_layers, "layers")
            del layer  # before the next one comes
        for name in checkpoint.names:
            if not name.startswith("model.layers."):
                writer.add(name, read(name))
    writer.finish()
    copy_companions(checkpoint.path, folder)
    config = read_json(checkpoint.path / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": quantization_config(grid)})
    amount = {"tokens": str(sum(map(len, windows))), "windows": str(len(windows))}
    manifest = {**origin, "calibration": text.provenance | amount}
    if checkpoint.random_weights:
        manifest[RANDOM] = checkpoint.random_weights
    write_manifest(folder, manifest)


@torch.inference_mode()
def quantized_tensors(checkpoint: Checkpoint, layer: ObservedLayer, grid: Grid) -> list[tuple[str, Tensor]]:
    """What the new checkpoint has for one layer, by full tensor name."""
    prefix = f"model.layers.{layer.index}."
    for group, moments in layer.inputs.items():
        if not moments.gram.isfinite().all():
            raise CheckpointError(
                f"activations at `{group}` of layer {layer.index} overflow {checkpoint.dtype}",
                hint="calibrate on a CPU (`--device cpu`), which computes in bfloat16",
            )
    groups = {
        group: tuple(part.path.removeprefix(prefix) for part in parts)
        for group, parts in layer_groups(checkpoint.config, layer.index).items()
    }
    tensors = {name.removeprefix(prefix): tensor for name, tensor in layer.tensors.items()}
    quantized = quantize_layer(tensors, groups, layer.inputs, grid)
    made = [
        (f"{prefix}{name}", quantized.folded.get(name, tensor))
        for name, tensor in tensors.items()
        if name.removesuffix(".weight") not in quantized.linears
    ]
    for path, rounded in quantized.linears.items():
        made += [(f"{prefix}{path}.{kind}", tensor) for kind, tensor in gemm_layout(rounded).items()]
    return made


def quantization_config(grid: Grid) -> dict[str, Any]:
    """What transformers' AwqConfig and AutoAWQ read."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
