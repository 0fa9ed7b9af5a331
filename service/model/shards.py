"""Tensors and what lies beside them -> an ordinary checkpoint folder, as the hub has them.

quantize, random_weights --name, tensor--> ShardWriter --> safetensors files and their index
"""

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from service.model.folders import write_json

SHARD_BYTES = 5_000_000_000
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


class ShardWriter:
    """Tensors in the order they come -> safetensors files of at most SHARD_BYTES, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous().cpu()  # in this order: a device transposes sooner than the host
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Name the shards by their number, as hub folders have them."""
        self._flush()
        count = len(self.shards)
        if count == 1:
            (self.folder / "part-1").rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, 1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        self.shards.append(list(self.pending))
        file = self.folder / f"part-{len(self.shards)}"
        try:
            save_file(self.pending, file, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the system's errors in text
            if f"os error {errno.ENOSPC})" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
            raise
        self.pending = {}
        self.pending_bytes = 0


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and license, as far as `source` has them."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
