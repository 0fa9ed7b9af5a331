"""A Hugging Face folder -> tensors by name, mapped from its safetensors files, never unpickled.

Opening reads headers only: names, shapes and dtypes are known before any weight is touched. Reading a
float tensor also looks for NaN and infinities, in the same pass that brings it into memory. The other
source of tensors is model/random_weights, which makes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from service.errors import CheckpointError
from service.model.config import ModelConfig, read_config, read_json
from service.model.device_reader import DeviceReader, Place, places
from service.model.folders import random_origin

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the checkpoint, as its file's header has it."""

    file: str  # or what else the tensor comes from
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the format's own name where torch has no such type here


class TensorSource(ABC):
    """Names, shapes and dtypes of a model's tensors, known at once; `read` brings one."""

    path: Path  # folder with config.json
    config: ModelConfig
    quantization: dict[str, Any] | None  # `quantization_config`, None: 16-bit
    random_weights: dict[str, str]  # what they were drawn with; empty: weights that were trained
    _tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor in its dtype, on the CPU or already on the device that it is for."""

    @contextmanager
    def reading(self, device: torch.device) -> Iterator[Callable[[str], Tensor]]:
        """The fastest `read` for a model that is built on `device` in its layers' order."""
        yield self.read

    @property
    def names(self) -> list[str]:
        """Tensor names, in the order of the files."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype without reading."""
        if name not in self._tensors:
            raise CheckpointError(
                f"tensor `{name}` is not in `{self.path}`",
                hint="fetch the checkpoint again: a file is missing",
            )
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's: the 16-bit type that unquantized tensors have."""
        dtype = self.info("model.embed_tokens.weight").dtype
        assert isinstance(dtype, torch.dtype), "verified before use"
        return dtype

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors; a pre-quantized checkpoint counts its containers."""
        return sum(torch.Size(info.shape).numel() for info in self._tensors.values())

    @property
    def num_bytes(self) -> int:
        """Of all tensors whose type torch has; `verify` lets no other pass."""
        sizes = [(torch.Size(info.shape).numel(), info.dtype) for info in self._tensors.values()]
        return sum(count * dtype.itemsize for count, dtype in sizes if isinstance(dtype, torch.dtype))


class Checkpoint(TensorSource):
    """An opened folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"model folder `{self.path}` does not exist",
                hint="give a folder with config.json and *.safetensors, a hub id, or `demo`",
            )
        self.config, self.quantization = read_config(self.path)
        self.random_weights = random_origin(self.path)
        self._files: dict[str, Any] = {}
        self._tensors = {}
        for file in weight_files(self.path):
            for name, info in self._open(file):
                if name in self._tensors:
                    raise CheckpointError(
                        f"tensor `{name}` is in both `{self._tensors[name].file}` and `{file}`",
                        hint="fetch the checkpoint again",
                    )
                self._tensors[name] = info

    def _open(self, file: str) -> Iterator[tuple[str, TensorInfo]]:
        try:
            opened = safe_open(self.path / file, framework="pt", device="cpu")
            self._files[file] = opened
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                piece = opened.get_slice(name)
                dtype = piece.get_dtype()
                yield name, TensorInfo(file, tuple(piece.get_shape()), DTYPES.get(dtype, dtype))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"`{self.path / file}` is not a whole safetensors file: {error}", hint="fetch the file again"
            ) from None

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, backed by the file's pages; CheckpointError if a value is not finite."""
        tensor: Tensor = self._files[self.info(name).file].get_tensor(name)
        return self._finite(name, tensor)

    @contextmanager
    def reading(self, device: torch.device) -> Iterator[Callable[[str], Tensor]]:
        """On CUDA a reader that runs ahead; tensors are then looked at for NaN on the device."""
        if device.type != "cuda":
            yield self.read
            return
        found: dict[str, Place] = {}
        for file in self._files:
            found |= places(self.path, file, DTYPES)
        reader = DeviceReader(self.path, found, device)

        def read(name: str) -> Tensor:
            self.info(name)
            return self._finite(name, reader.read(name))

        try:
            yield read
        finally:
            reader.close()

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        # a sum is NaN or infinite if any term is; only then is each element looked at
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            broken = int((~tensor.isfinite()).sum())
            if broken:
                raise CheckpointError(
                    f"tensor `{name}` in `{self.info(name).file}`: expected finite values, "
                    f"found {broken} NaN or infinite",
                    hint="fetch the checkpoint again",
                )
        return tensor


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the checkpoint, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"`{index}` has no `weight_map`", hint="fetch the file again")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if Path(file).name != file or not (folder / file).is_file():
                raise CheckpointError(
                    f"`{index.name}` names `{file}`, which is not in `{folder}`",
                    hint="fetch the missing shard",
                )
        return files
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    pickled = sorted(
        path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))
    )
    if pickled:
        raise CheckpointError(
            f"`{folder}` holds only pickled weights (`{pickled[0]}`); accepted are *.safetensors",
            hint="load it once where you trust it and write it again: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`",
        )
    raise CheckpointError(
        f"`{folder}` has no model.safetensors and no model.safetensors.index.json",
        hint="fetch the checkpoint again",
    )
