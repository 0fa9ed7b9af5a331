"""What the engine's process begins before torch is there: most of a start is spent on importing it.

child --> early --> startup, whose modules import torch
"""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from uuid import UUID

from service.engine.device_use import used_bytes

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


class Opening(Thread):
    """The first GPU is being opened."""

    used_before: int | None = None  # bytes that all processes had of it; None: not known

    def run(self) -> None:
        open_first_gpu(self.look)

    def look(self, device_uuid: str) -> None:
        self.used_before = used_bytes(device_uuid)


def wake_gpu() -> Opening | None:
    """Begins to open the first GPU, where this torch would use one: its driver needs no Python for that.

    Whether the GPU can be used, and why not, is told later by device.resolve.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    if not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return None  # built for the CPU: its user may want the GPU's memory for something else
    opening = Opening(name="wake gpu", daemon=True)
    opening.start()
    return opening


def open_first_gpu(look: Callable[[str], None]) -> None:
    """Initialises the driver and the context that torch will find; torch says later what has gone wrong.

    Before there is a context it calls `look` with NVML's name of the GPU.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch would, but the driver reads it once
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context, name = ctypes.c_int(), ctypes.c_void_p(), (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) != SUCCESS or driver.cuDeviceGet(ctypes.byref(device), 0) != SUCCESS:
        return
    if driver.cuDeviceGetUuid(name, device) == SUCCESS:
        look(f"GPU-{UUID(bytes=bytes(name))}")
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
