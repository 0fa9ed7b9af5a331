"""What the engine's process begins before torch is there: most of a start is spent on importing it.

child --> early --> startup, whose modules import torch
"""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

SUCCESS = 0  # CUresult


@contextmanager
def importing() -> Iterator[None]:
    """For imports: no module is garbage, and looking for some meanwhile takes an eighth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def wake_gpu() -> Thread | None:
    """Begins to open the first GPU, where this torch would use one: its driver needs no Python for that.

    Whether the GPU can be used, and why not, is told later by device.resolve.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    if not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return None  # built for the CPU: its user may want the GPU's memory for something else
    thread = Thread(target=open_first_gpu, name="wake gpu", daemon=True)
    thread.start()
    return thread


def open_first_gpu() -> None:
    """Initialises the driver and the context that torch will find; torch says later what has gone wrong."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch would, but the driver reads it once
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == SUCCESS and driver.cuDeviceGet(ctypes.byref(device), 0) == SUCCESS:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
