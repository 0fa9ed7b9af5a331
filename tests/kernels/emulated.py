"""CUDA kernels compiled with g++ for a machine made of fibers (machine_emulator.h)."""

import ctypes
import subprocess
from ctypes import c_void_p
from pathlib import Path

import torch
from torch import Tensor

from service.kernels.cuda import Program
from service.kernels.cuda.cubins import SHARED_HEADERS

FLAGS = ["-std=c++17", "-O1", "-mavx2", "-mf16c", "-mfma", "-shared", "-fPIC", "-w", "-Wno-psabi"]


def build(program: Program, folder: Path, run: str) -> ctypes.CDLL:
    """A library whose functions are those of `run`, C++ that may call the kernel through `emulate`."""
    source, library = folder / "driver.cpp", folder / "kernel.so"
    source.write_text(f'#include "{program.source.name}"\nextern "C" {run}\n')
    settings = [option for option in program.options if option.startswith("-D")]
    folders = [f"-I{at}" for at in (program.source.parent, SHARED_HEADERS, Path(__file__).parent)]
    subprocess.run(["g++", *FLAGS, *settings, *folders, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def box(tensor: Tensor, shape: tuple[int, int], rows: int, columns: int, *, swizzled: int) -> Tensor:
    """Of a [rows, columns] matrix, as the emulator has it. `swizzled` 2: and no predecessor writes it."""
    size = tensor.element_size()
    fields = [tensor.data_ptr(), shape[1], shape[0], shape[1] * size, size, columns, rows, swizzled]
    return torch.tensor([*fields, *[0] * 8])
