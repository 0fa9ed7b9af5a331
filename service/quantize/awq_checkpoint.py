"""A 16-bit checkpoint -> the same model in AutoAWQ's GEMM layout, in a folder that stands alone.

16-bit tensors + text --quantize_checkpoint()--> safetensors shards, config.json, tokenizer, halftone.json

Layout of one linear: `qweight` int32 [in, out/8], `qzeros` int32 [in/group, out/8], `scales` float16
[in/group, out]; the order of the eight nibbles in a word is kernels/awq_linear's. With `bits: 3` codes
0..7 sit in the same 4-bit containers. Embedding, head, norms and biases stay as they are, up to the scales
folded into them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from service.errors import CheckpointError
from service.kernels.awq_linear.reference import pack
from service.model.checkpoint import TensorSource
from service.model.config import ModelConfig, read_json
from service.model.folders import RANDOM, write_json, write_manifest
from service.model.layout import layer_groups
from service.model.shards import ShardWriter, copy_companions
from service.model.verify import verify
from service.precision.sizes import choose_awq_group
from service.quality.texts import Text, spread, token_windows
from service.quantize.awq import Grid, Rounded, quantize_layer
from service.quantize.calibration import ObservedLayer, observe_layers
from service.quantize.spent import Spent

Progress = Callable[[str, int, int, str], None]  # stage, done, total, unit: as messages.Loading

WINDOWS = 16
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class Calibration:
    """Text to observe activations on, and what cuts it into tokens."""

    text: Text
    tokenizer: Path  # folder with tokenizer.json

    def windows(self) -> list[list[int]]:
        """Evenly spaced over the text; SettingError where it is too short for one."""
        tokenizer = Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))
        return spread(token_windows(self.text, tokenizer, WINDOW_TOKENS), WINDOWS)


def choose_grid(config: ModelConfig, bits: int, group_size: int) -> Grid:
    """`group_size` 0: the largest that divides every linear's in_features. PrecisionError if none does."""
    parts = [part for group in layer_groups(config, 0).values() for part in group]
    return Grid(bits, choose_awq_group(parts, group_size))


def checkpoint_bytes(source: TensorSource, grid: Grid) -> int:
    """Bytes that the quantized folder will take: 4-bit containers, a scale and a zero a group, the rest."""
    linear = {
        part.path: part.in_features * part.out_features
        for layer in range(source.config.num_layers)
        for group in layer_groups(source.config, layer).values()
        for part in group
    }
    packed = sum(linear.values()) // 2 + sum(linear.values()) * 20 // (8 * grid.group_size)
    infos = (source.info(name) for name in source.names if name.removesuffix(".weight") not in linear)
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
    source: TensorSource,
    folder: Path,
    grid: Grid,
    calibration: Calibration,
    origin: dict[str, str],
    progress: Progress,
    spent: Spent,
) -> None:
    """Fill the empty `folder`; the caller makes it appear at its place when this has returned.

    `origin` goes into the manifest beside the calibration text: what was quantized, and how. Computes on
    `spent`'s device. Raises CheckpointError when activations overflow the model's type, SettingError for a
    text too short.
    """
    device, num_layers = spent.device, source.config.num_layers
    progress("calibrate", 0, num_layers, "layers")
    verify(source, calibration.tokenizer)
    with spent.on("text"):
        windows = calibration.windows()
    writer = ShardWriter(folder)
    with source.reading(device) as read_there:

        def read(name: str) -> Tensor:
            with spent.on("read"):
                return read_there(name)

        layers = observe_layers(source, read, windows, device)
        for index in range(num_layers):
            with spent.on("observe"):
                layer = next(layers)
            with spent.on("search"):
                made = quantized_tensors(source, layer, grid)
            del layer  # before the next one comes
            with spent.on("write"):
                for name, tensor in made:
                    writer.add(name, tensor)
            progress("quantize", index + 1, num_layers, "layers")
        with spent.on("write"):
            for name in source.names:
                if not name.startswith("model.layers."):
                    writer.add(name, read(name))
    with spent.on("write"):
        writer.finish()
        copy_companions(source.path, folder)
        if calibration.tokenizer != source.path:
            copy_companions(calibration.tokenizer, folder)
        config = read_json(source.path / "config.json")
        write_json(folder / "config.json", config | {"quantization_config": quantization_config(grid)})
        amount = {"tokens": str(sum(map(len, windows))), "windows": str(len(windows))}
        manifest = {**origin, "calibration": calibration.text.provenance | amount}
        if source.random_weights:
            manifest[RANDOM] = source.random_weights
        write_manifest(folder, manifest)


@torch.inference_mode()
def quantized_tensors(source: TensorSource, layer: ObservedLayer, grid: Grid) -> list[tuple[str, Tensor]]:
    """What the new checkpoint has for one layer, by full tensor name."""
    prefix = f"model.layers.{layer.index}."
    for group, moments in layer.inputs.items():
        if not moments.gram.isfinite().all():
            raise CheckpointError(
                f"activations at `{group}` of layer {layer.index} overflow {source.dtype}",
                hint="calibrate on a CPU (`--device cpu`), which computes in bfloat16",
            )
    groups = {
        group: tuple(part.path.removeprefix(prefix) for part in parts)
        for group, parts in layer_groups(source.config, layer.index).items()
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
