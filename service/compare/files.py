"""Files of a comparison, each written whole or not at all: an interrupted run leaves nothing half-written."""

import os
from pathlib import Path

from service.errors import SystemProblem


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
