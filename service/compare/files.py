"""Files of a comparison, each written whole or not at all: an interrupted run leaves no half of one."""

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from service.errors import SystemProblem

T = TypeVar("T")
OTHER_FOLDER = "it may be another version's: name a new folder with `--out`"


def read_back(path: Path, kind: type[T], hint: str = OTHER_FOLDER) -> T:
    """A file that an earlier run wrote. Raises SystemProblem for one that this version does not write."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise SystemProblem(
            f"`{path}` cannot be read back: {error}",
            hint=hint,
        ) from None


def make_folder(path: Path) -> None:
    """`path` and the folders above it. Raises SystemProblem where the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def write_whole(path: Path, data: bytes) -> None:
    """`data` -> `path`, through a file beside it. Raises SystemProblem where the disk refuses."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> SystemProblem:
    return SystemProblem(
        f"`{path}` cannot be written: {error.strerror}", hint="name another folder with `--out`"
    )
