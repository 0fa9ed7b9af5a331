"""Disk space, told before writing and when it ran out: one line that names the folder and the fix."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import SystemProblem

ROOM_HINT = "free some space, or choose another folder with `--cache-dir` (HALFTONE_CACHE_DIR)"


def megabytes(count: int) -> str:
    """Bytes as people read them: `98 MB`, `1.4 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def existing_parent(folder: Path) -> Path:
    """The nearest folder on the way up that is there: its disk is the one that will be written."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def require_free(folder: Path, needed_bytes: int, what: str) -> None:
    """SystemProblem unless `folder`'s disk has room for `what`."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed_bytes:
        raise SystemProblem(
            f"disk of `{folder}` has {megabytes(free)} free; {what} needs {megabytes(needed_bytes)}",
            hint=ROOM_HINT,
        )


def disk_full(folder: Path) -> SystemProblem:
    free = megabytes(shutil.disk_usage(existing_parent(folder)).free)
    return SystemProblem(f"disk of `{folder}` is full ({free} free)", hint=ROOM_HINT)


@contextmanager
def told_disk_errors(folder: Path) -> Iterator[None]:
    """A full, read-only or forbidden disk becomes one line; every other OSError passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise SystemProblem(
                f"`{error.filename or folder}` cannot be written: {os.strerror(error.errno).lower()}",
                hint="choose another folder with `--cache-dir` (HALFTONE_CACHE_DIR)",
            ) from error
        raise


def folder_bytes(folder: Path) -> int:
    """Size of the files below `folder`; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
