"""CUDA's driver through ctypes: cubins become kernels, kernels are launched on torch's streams.

kernels/*/cuda.py --Program--> kernel_of --> Kernel --arguments, once--> Launch --> the device

A launch keeps its arguments in C's own memory; whoever calls it writes what has changed (addresses, numbers,
a tensor map) and pays for one call of the driver. All of it can be captured in a CUDA graph: the driver
copies arguments when it is called.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from service.errors import DeviceError
from service.kernels.cuda.cubins import Program, cubin

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT (per cent),
# _NON_PORTABLE_CLUSTER_SIZE_ALLOWED
MAX_DYNAMIC_SHARED_BYTES, CARVEOUT, WIDE_CLUSTERS = 8, 9, 14
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_*
WITHOUT_ASKING = 48 << 10  # bytes of shared memory that every kernel may have
# CU_TENSOR_MAP_DATA_TYPE_*, _SWIZZLE_*, _L2_PROMOTION_L2_256B
MAP_TYPES = {torch.int8: 0, torch.float8_e4m3fn: 0, torch.int32: 2, torch.float16: 6, torch.bfloat16: 9}
SWIZZLE_NONE, SWIZZLE_128 = 0, 3
PROMOTE_256 = 3


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class TensorMap(ctypes.Structure):
    """CUtensorMap: how the copy engine cuts boxes out of a matrix. The driver wants it 64-byte aligned."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class Driver:
    """libcuda, initialised by torch."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        # PyDLL keeps the interpreter's lock: a launch takes microseconds, and taking the lock back may take
        # milliseconds where another thread wants it
        locked = ctypes.PyDLL("libcuda.so.1")
        self.launch, self.encode = locked.cuLaunchKernelEx, locked.cuTensorMapEncodeTiled
        self.launch.argtypes = [ctypes.c_void_p] * 4

    def call(self, name: str, *arguments: Any) -> None:
        """DeviceError that names function and fault."""
        self.check(name, getattr(self._library, name)(*arguments))

    def check(self, what: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise DeviceError(
                f"CUDA's driver refused `{what}`: {(text.value or b'unknown error').decode()}",
                hint="report this with what `halftone doctor` says; other precisions need no such kernel",
            )

    def use_context(self) -> None:
        """A thread that torch has not used yet has no context; it takes torch's, the device's primary one."""
        current = ctypes.c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(current))
        if not current.value:
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(current), torch.cuda.current_device())
            self.call("cuCtxSetCurrent", current)


@cache
def driver() -> Driver:
    return Driver()


@cache
def multiprocessors() -> int:
    """Of the current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.multi_processor_count)


class Kernel:
    """A loaded kernel; its blocks have this many threads and at most these bytes of dynamic shared memory.

    `wide_clusters`: more than eight blocks are one. `shares`: all that a multiprocessor has may be shared
    memory while it runs, so that blocks of a neighbouring launch fit beside its own.
    """

    def __init__(
        self,
        program: Program,
        threads: int,
        most_shared_bytes: int,
        wide_clusters: bool = False,
        shares: bool = False,
    ) -> None:
        self.name, self.threads = program.kernel, threads
        code, here = cubin(program), driver()
        here.use_context()
        module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        here.call("cuModuleLoadData", ctypes.byref(module), code)
        here.call("cuModuleGetFunction", ctypes.byref(self.handle), module, program.kernel.encode())
        if most_shared_bytes > WITHOUT_ASKING:
            here.call("cuFuncSetAttribute", self.handle, MAX_DYNAMIC_SHARED_BYTES, most_shared_bytes)
        if wide_clusters:
            here.call("cuFuncSetAttribute", self.handle, WIDE_CLUSTERS, 1)
        if shares:
            here.call("cuFuncSetAttribute", self.handle, CARVEOUT, 100)


@cache
def kernel_of(
    program: Program,
    threads: int,
    most_shared_bytes: int,
    *,
    wide_clusters: bool = False,
    shares: bool = False,
) -> Kernel:
    """Compiled and loaded; twice at most where two threads ask at once."""
    return Kernel(program, threads, most_shared_bytes, wide_clusters, shares)


class Launch:
    """A kernel with its arguments; the caller keeps what they point to, and changes them between calls."""

    def __init__(self, kernel: Kernel, arguments: Sequence[Any], *, dependent: bool) -> None:
        """`arguments` are ctypes values and structures in the kernel's order.

        `dependent`: the kernel may be placed while its predecessor works; it awaits it itself.
        """
        self._kernel, self._launch, self._arguments = kernel, driver().launch, list(arguments)
        self._pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._attribute = Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self._config = Config(
            1, 1, 1, kernel.threads, 1, 1, 0, None, ctypes.pointer(self._attribute), int(dependent),
        )  # fmt: skip
        self._told = ctypes.addressof(self._config), kernel.handle, ctypes.addressof(self._pointers), None

    def replace(self, number: int, argument: Any) -> None:
        """Another structure in the place of one."""
        self._arguments[number] = argument
        self._pointers[number] = ctypes.addressof(argument)

    def __call__(self, num_blocks: int, shared_bytes: int, stream: int) -> None:
        config = self._config
        config.grid_x, config.shared_bytes, config.stream = num_blocks, shared_bytes, stream
        if code := self._launch(*self._told):
            driver().check(self._kernel.name, code)


def tensor_map(
    address: int, dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int], swizzle: int
) -> TensorMap:
    """Of a contiguous [rows, columns] matrix, 16-byte aligned; `box` too is rows, columns."""
    rows, columns = shape
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    made = TensorMap.from_buffer(room, -ctypes.addressof(room) % 64)
    code = driver().encode(
        ctypes.byref(made), MAP_TYPES[dtype], 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * dtype.itemsize),
        (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, PROMOTE_256, 0,
    )  # fmt: skip
    driver().check("cuTensorMapEncodeTiled", code)
    return made
