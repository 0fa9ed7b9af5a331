"""Compiled programs on disk and in this process: a source is compiled once for a compiler and its options.

engine/kernels_ahead, driver --Program--> cubin --> nvrtc, or a file named by the hash of all that goes in

The folder lies in the cache folder (`--cache-dir`), beside quantized checkpoints.
"""

import hashlib
import logging
import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

from service.config import default_cache_dir
from service.kernels.cuda.nvrtc import STANDARD_HEADERS, compiler

logger = logging.getLogger(__name__)

SHARED_HEADERS = Path(__file__).parent
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")


@dataclass(frozen=True)
class Program:
    """One kernel of a source, under definitions that make it a variant."""

    source: Path  # the headers beside it may be included, and those in this folder
    kernel: str  # as `extern "C"` exports it
    definitions: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.definitions)])

    @cached_property
    def texts(self) -> dict[str, str]:
        """Of the source and, behind it, of every header that it may include."""
        headers = [*sorted(SHARED_HEADERS.glob("*.h")), *sorted(self.source.parent.glob("*.h"))]
        files = [self.source, *headers]  # of one name the one beside the source
        return {file.name: file.read_text(encoding="utf-8") for file in files}

    @property
    def options(self) -> list[str]:
        return [*OPTIONS, *(f"-D{name}={value}" for name, value in self.definitions)]

    def key(self, compiler_version: tuple[int, int]) -> str:
        """SHA-256 of everything that decides what the compiler makes."""
        digest = hashlib.sha256(repr((compiler_version, self.options)).encode())
        for name, text in (STANDARD_HEADERS | self.texts).items():
            digest.update(repr((name, text)).encode())
        return digest.hexdigest()


class _State:
    """What is compiled, or being compiled, in this process; and where cubins are kept."""

    folder: Path | None = None
    cubins: dict[Program, Future[bytes]] = {}  # noqa: RUF012
    lock = Lock()


def keep_in(cache_dir: Path | None) -> None:
    """Cubins go into this cache folder from now on; None: into the default one."""
    _State.folder = cache_dir


def folder() -> Path:
    return (_State.folder or default_cache_dir()) / "kernels"


def cubin(program: Program) -> bytes:
    """Its code; a thread that asks for what another one compiles waits. DeviceError where it cannot be."""
    with _State.lock:
        future = _State.cubins.get(program)
        mine = future is None
        if future is None:
            future = _State.cubins[program] = Future()
    if mine:
        try:
            future.set_result(_read_or_compile(program))
        except BaseException as error:
            future.set_exception(error)
    return future.result()


def _read_or_compile(program: Program) -> bytes:
    file = folder() / f"{program.key(compiler().version)}.cubin"
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        logger.warning("a CUDA kernel is compiled again: `%s` cannot be read: %s", file, error)
    _, *headers = program.texts
    source = program.texts[program.source.name]
    included = STANDARD_HEADERS | {name: program.texts[name] for name in headers}
    code = compiler().compile(program.name, source, included, program.options)
    try:
        _write(file, code)
    except OSError as error:
        logger.warning("CUDA kernels are compiled at every start: `%s` cannot be written: %s", file, error)
    return code


def _write(file: Path, code: bytes) -> None:
    """Whole or not at all: another process may read or write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as fresh:
        try:
            fresh.write(code)
            fresh.flush()
            os.replace(fresh.name, file)
        except OSError:
            os.unlink(fresh.name)
            raise
