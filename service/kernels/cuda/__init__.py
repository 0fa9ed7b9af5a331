"""Our own kernels in CUDA C++: compiled where they run, kept as cubins, launched through the driver alone.

kernels/*/cuda.py --Program--> cubins (from disk, or nvrtc) --> driver: Kernel --launch--> torch's stream

Nothing is built when Halftone is installed and nothing depends on torch's C++ interface: torch's wheels for
CUDA bring the compiler (NVRTC), the driver loads what it makes. `engine/kernels_ahead` has programs compiled
on all cores while weights load. Where that cannot be, `absence` says why and other kernels serve; which ones
is in every layer's `kernel`.
"""

from functools import cache

import torch

from service.errors import HalftoneError
from service.kernels.cuda.cubins import Program, keep_in
from service.kernels.cuda.driver import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.nvrtc import compiler

__all__ = ["ARCHITECTURE", "Kernel", "Launch", "Program", "TensorMap", "absence", "keep_in", "kernel_of"]

ARCHITECTURE = (9, 0)  # what the sources are written for: its code runs on no other


@cache
def absence() -> str:
    """Why CUDA C++ cannot be compiled or run here; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if found != ARCHITECTURE:
        return f"they are written for compute capability 9.0, this GPU has {found[0]}.{found[1]}"
    try:
        compiler()
    except HalftoneError as error:
        return error.message
    return ""
