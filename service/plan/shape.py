"""MODEL -> its shape: config.json and the headers of its safetensors, never a weight. No torch.

folder, preset or hub id --find_shape, read_folder--> Shape --> plan. From the hub come config.json and, by
ranged requests, the first bytes of each file.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.config import PRESET_PREFIX
from service.errors import CheckpointError
from service.model.config import ModelConfig, read_config, read_json
from service.model.demo import Progress
from service.model.hub import WANTED, WEIGHTS, from_hub, is_path, preset, resolve, told_hub_errors
from service.model.layout import expected_tensors

MAX_HEADER_BYTES = 100 << 20  # of a safetensors file, by its format
FULL_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
CONFIG_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Tensor:
    """As a header has it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    config: ModelConfig
    quantization: dict[str, Any] | None  # `quantization_config`; None: 16- or 32-bit
    dtype: str  # of what is not quantized: fp32, fp16, bf16
    num_parameters: int  # as served; a quantized checkpoint's tensors are containers of several

    @property
    def full_precision(self) -> str:
        """The mode that serves it as it is; 32 bits are served in 16 unless they are asked for."""
        return "fp16" if self.dtype == "fp16" else "bf16"


def find_shape(model: str, revision: str, cache: Path, progress: Progress) -> Shape:
    """`model` as for `serve`. Raises CheckpointError, SystemProblem or SettingError."""
    if model.startswith(PRESET_PREFIX):
        return read_config_alone(preset(model, needs_weights=False))
    if model == "demo" or is_path(model):
        return read_folder(resolve(model, revision, cache, progress, needs_weights=False))
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if constants.HF_HUB_OFFLINE:
        return read_folder(from_hub(model, revision, progress, (WEIGHTS, *WANTED)))
    folder = from_hub(model, revision, progress, ("config.json", "generation_config.json"))
    try:
        with told_hub_errors(model, revision):
            files = HfApi(endpoint=constants.ENDPOINT).get_safetensors_metadata(model, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(
            f"hub model `{model}` has no safetensors whose headers can be read: {error}",
            hint="Halftone serves safetensors; look for a repository that has them",
        ) from None
    tensors = {
        name: Tensor(info.dtype, tuple(info.shape))
        for file in files.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return described(folder, tensors)


def read_config_alone(folder: Path) -> Shape:
    """The shape that a config.json describes, of which no weights are asked for."""
    config, quantization = read_config(folder)
    raw = read_json(folder / "config.json")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    return Shape(config, quantization, CONFIG_NAMES.get(dtype, "bf16"), parameters_of(config))


def read_folder(folder: Path) -> Shape:
    """A checkpoint's shape; of a folder without weights that of its config.json."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(WEIGHTS)):
        tensors |= read_header(file)
    return described(folder, tensors) if tensors else read_config_alone(folder)


def read_header(file: Path) -> dict[str, Tensor]:
    """Name -> type and shape of every tensor in a safetensors file."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            text = opened.read(min(size, MAX_HEADER_BYTES))
        header = json.loads(text if len(text) == size else b"")
        return {
            name: Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"`{file}` is not a whole safetensors file", hint="fetch the file again"
        ) from None


def described(folder: Path, tensors: Mapping[str, Tensor]) -> Shape:
    """config.json's shape, once the tensors have been found to be it. Raises CheckpointError."""
    config, quantization = read_config(folder)
    plain, linear = expected_tensors(config)
    for name, shape in (plain if quantization else plain | linear).items():
        found = tensors.get(name)
        if found is None or found.shape != shape:
            told = f"shape {list(found.shape)}" if found else "nothing"
            raise CheckpointError(
                f"tensor `{name}`: config.json implies shape {list(shape)}, the headers have {told}",
                hint="config.json and the weights must come from the same checkpoint",
            )
    dtype = FULL_NAMES.get(tensors["model.embed_tokens.weight"].dtype)
    if dtype is None:
        raise CheckpointError(
            f"the embedding is of type {tensors['model.embed_tokens.weight'].dtype}; accepted are "
            f"{', '.join(FULL_NAMES)}",
            hint="serve the 16-bit checkpoint that it was made from",
        )
    return Shape(config, quantization, dtype, parameters_of(config))


def parameters_of(config: ModelConfig) -> int:
    plain, linear = expected_tensors(config)
    return sum(math.prod(shape) for shape in (plain | linear).values())
