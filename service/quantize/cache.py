"""Quantized checkpoints by what they were made from: each is made once, by one process.

prepare --checkpoint, text, options, code--> cache_key --> folder's name; locked() while it is made

A lock that the system drops with its process keeps a second process waiting, not working.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.disk import told_disk_errors
from service.model.checkpoint import weight_files
from service.model.folders import PARTIAL_PREFIX

PACKAGE = Path(__file__).parents[1]
CODE = (
    "quantize/awq.py",
    "quantize/awq_checkpoint.py",
    "quantize/calibration.py",
    "quantize/spent.py",
    "quality/hub_texts.py",
    "quality/texts.py",
    "kernels/awq_linear/reference.py",
    "model/shards.py",
    "precision/sizes.py",
)
DESCRIPTIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
HASHES = "hashes.json"


def code_version() -> str:
    """SHA-256 of the sources that decide what a quantizer writes, so that no change to them is forgotten."""
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((PACKAGE / name).read_bytes())
    return digest.hexdigest()


def source_sha256(checkpoint: Path, cache: Path | None = None) -> str:
    """One hash over weights, config and tokenizer; with `cache`, a file is read again only when changed."""
    digest = hashlib.sha256()
    names = [*weight_files(checkpoint), *(name for name in DESCRIPTIONS if (checkpoint / name).is_file())]
    known = _read_hashes(cache / HASHES) if cache else {}
    fresh: dict[str, str] = {}
    for name in names:
        file = checkpoint / name
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            with file.open("rb") as stream:
                fresh[key] = known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{name}:{known[key]}\n".encode())
    if fresh and cache:
        _write_hashes(cache / HASHES, fresh)
    return digest.hexdigest()


def _read_hashes(file: Path) -> dict[str, str]:
    """What is known of files; a damaged list is as good as none, for all of it can be computed again."""
    try:
        hashes = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in hashes.items()} if isinstance(hashes, dict) else {}


def _write_hashes(file: Path, fresh: dict[str, str]) -> None:
    with told_disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, prefix=PARTIAL_PREFIX, delete=False
        ) as partial:
            json.dump(_read_hashes(file) | fresh, partial, indent=2)
        os.replace(partial.name, file)


def cache_key(source: str, calibration: str, precision: str, code: str) -> str:
    """Everything that decides the content of a quantized checkpoint -> 16 hexadecimal digits."""
    ingredients = json.dumps([source, calibration, precision, code])
    return hashlib.sha256(ingredients.encode()).hexdigest()[:16]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Exclusive among processes; freed by the system when its holder dies."""
    with told_disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
