"""NVIDIA's run-time compiler, as torch's wheels or the system bring it: CUDA C++ -> cubin.

cubins --source, headers, options--> Compiler.compile --> bytes of a cubin, or DeviceError with its log

ctypes gives Python's lock away while the compiler works, so several threads compile at once.
"""

import ctypes
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from service.errors import DeviceError

LOG_CHARACTERS = 2000  # of the compiler's, in an error
# NVRTC brings no C library; these are what the sources take from it
STANDARD_HEADERS = {
    "stdint.h": "typedef signed char int8_t; typedef unsigned char uint8_t; typedef unsigned short uint16_t;"
    " typedef int int32_t;"
    " typedef unsigned int uint32_t; typedef unsigned long long uint64_t, uintptr_t;"
    " typedef long long int64_t;\n"
}


class Compiler:
    """One loaded NVRTC."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        # it opens its builtins by name alone, which is found once somebody has opened it by its path
        if isinstance(path, Path):
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Iterable[str]) -> bytes:
        """-> the cubin of one source; `name` is told in the log. DeviceError where the compiler objects."""
        program = ctypes.c_void_p()
        texts = [text.encode() for text in headers.values()]
        names = [header.encode() for header in headers]
        flags = [option.encode() for option in options]
        code = self._library.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(names),
            _strings(texts),
            _strings(names),
        )
        try:
            code = code or self._library.nvrtcCompileProgram(program, len(flags), _strings(flags))
            if code:
                log = self._read(program, "nvrtcGetProgramLog").decode(errors="replace").strip("\0\n ")
                raise DeviceError(
                    f"CUDA kernel `{name}` does not compile with NVRTC {self.version[0]}.{self.version[1]} "
                    f"({self._error(code)}):\n{log[:LOG_CHARACTERS]}",
                    hint="report this with what `halftone doctor` says; other precisions need no such kernel",
                )
            return self._read(program, "nvrtcGetCUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        """What the two functions `what`Size and `what` give."""
        size = ctypes.c_size_t()
        self._library[f"{what}Size"](program, ctypes.byref(size))
        room = ctypes.create_string_buffer(max(size.value, 1))
        self._library[what](program, room)
        return room.raw[: size.value]

    def _error(self, code: int) -> str:
        text = self._library.nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        return str(text(code).decode())


def _strings(values: list[bytes]) -> Any:
    return (ctypes.c_char_p * len(values))(*values)


def candidates(paths: Iterable[str]) -> list[Path]:
    """NVRTC in the site-packages among `paths`, where torch's wheels for CUDA put it; newest first."""
    found = [
        file
        for path in paths
        for pattern in ("nvidia/cu[0-9]*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
        for file in Path(path).glob(pattern)
        if re.fullmatch(r"libnvrtc\.so\.\d+", file.name)  # beside it lie builtins and an alternative
    ]
    return sorted(found, key=lambda file: int(file.name.rpartition(".")[2]), reverse=True)


@cache
def compiler() -> Compiler:
    """The one that torch was built with, else the newest; DeviceError where there is none."""
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    files: list[Path | str] = [*candidates(sys.path)]
    files.sort(key=lambda file: not str(file).endswith(f".so.{major}"))
    for file in [*files, *(f"libnvrtc.so.{number}" for number in (major, 13, 12))]:
        try:
            return Compiler(file)
        except OSError:
            continue
    raise DeviceError(
        "NVRTC, which compiles our CUDA kernels, is not installed",
        hint=f"`pip install nvidia-cuda-nvrtc` for CUDA {major or 13}, as torch's wheels do",
    )
