"""Model folders that we make: each is there whole or not at all, whatever stops its maker.

demo, quantize --make_whole(folder, fill)--> files and their manifest, under the folder's name

A folder is filled under a name that nothing looks for and appears by one rename. Its manifest, written last,
has the sizes of the others, so that one damaged later is not taken for a model.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.disk import require_free, told_disk_errors

MANIFEST = "halftone.json"
RANDOM = "random_weights"  # of the manifest, where no training made the weights
PARTIAL_PREFIX = ".partial-"
STALE_PARTIAL_S = 86_400.0


def is_whole(folder: Path) -> bool:
    """Are all files of the manifest here in their length? (Content was checked when they were made.)"""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def random_origin(folder: Path) -> dict[str, str]:
    """What the folder's weights were drawn with; empty where its maker does not say that they were drawn."""
    try:
        origin = json.loads((folder / MANIFEST).read_bytes())[RANDOM]
        return {str(key): str(value) for key, value in origin.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def make_whole(folder: Path, needed_bytes: int, what: str, fill: Callable[[Path], None]) -> None:
    """`fill` an empty folder, manifest included, then rename it to `folder`.

    The empty folder stands alone in a temporary one, beside `folder`, which `fill` may use too. Raises
    SystemProblem when the disk has no room, before and while filling; whatever stops `fill`, no `folder`
    exists.
    """
    require_free(folder.parent, needed_bytes, what)
    with told_disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.parent)
        with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=folder.parent) as name:
            partial = Path(name) / folder.name
            partial.mkdir()
            fill(partial)
            place(partial, folder)


def remove_stale(parent: Path) -> None:
    """What killed processes left behind; a day is longer than any fetch that still runs."""
    for partial in parent.glob(f"{PARTIAL_PREFIX}*"):
        if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:
            shutil.rmtree(partial, ignore_errors=True)


def place(made: Path, folder: Path) -> None:
    """One rename; where another process was first, its folder stands. A damaged folder makes way."""
    if folder.exists() and not is_whole(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not is_whole(folder):
            raise


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """halftone.json, the last file: the others' sizes beside what is said of them; all reach the disk."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    write_json(folder / MANIFEST, manifest | {"files": sizes})
    for file in (*sizes, MANIFEST, "."):
        handle = os.open(folder / file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
