"""Compiled W4 kernels on torch's stream, through the CUDA driver alone: modules, tensor maps, dependent launches."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from w4_problem import Problem, make_parts
from w4_variants import MAX_SHARED_BYTES, Kernel

MAX_SHARED, NUM_REGISTERS, LOCAL_BYTES = 8, 4, 3  # CU_FUNC_ATTRIBUTE_*
UINT32, FLOAT16, SWIZZLE_128, PROMOTE_256 = 2, 6, 3, 3
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_*


class Driver:
    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class Function:
    def __init__(self, driver: Driver, cubin: Path, name: str, threads: int, most_shared_bytes: int) -> None:
        self.driver, self.threads = driver, threads
        self.image = cubin.read_bytes()
        module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), self.image)
        driver.call("cuModuleGetFunction", ctypes.byref(self.handle), module, name.encode())
        if most_shared_bytes > 48 << 10:
            driver.call("cuFuncSetAttribute", self.handle, MAX_SHARED, most_shared_bytes)

    def attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self.driver.call("cuFuncGetAttribute", ctypes.byref(value), which, self.handle)
        return value.value

    def bind(self, grid: int, shared_bytes: int, arguments: list[Any]) -> Callable[[bool], None]:
        """-> a launch on torch's current stream, dependent (before the kernel ahead of it is over) or not;
        `arguments` are ctypes values or structures, kept alive here."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        config = LaunchConfig(shared_bytes=shared_bytes, attributes=ctypes.pointer(attribute))
        config.grid[0], config.grid[1], config.grid[2] = grid, 1, 1
        config.block[0], config.block[1], config.block[2] = self.threads, 1, 1

        def launch(dependent: bool) -> None:
            config.stream = torch.cuda.current_stream().cuda_stream
            config.num_attributes = int(dependent)
            self.driver.call("cuLaunchKernelEx", ctypes.byref(config), self.handle, pointers, None)

        launch.arguments = (arguments, pointers, attribute)  # type: ignore[attr-defined]
        return launch


def tensor_map(
    driver: Driver, tensor: Tensor, kind: int, columns: int, rows: int, box: tuple[int, int], swizzle: int
) -> Any:
    """A 2D map of a contiguous [rows, columns]; `box` is (columns, rows). 64-byte aligned, as the driver wants it."""
    room = ctypes.create_string_buffer(192)
    offset = -ctypes.addressof(room) % 64
    place = (ctypes.c_char * 128).from_buffer(room, offset)
    size = {UINT32: 4, FLOAT16: 2}[kind]
    driver.call(
        "cuTensorMapEncodeTiled", ctypes.byref(place), kind, 2, ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * size), (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, PROMOTE_256, 0)  # fmt: skip
    return place


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def load(driver: Driver, kernel: Kernel, folder: Path) -> Function:
    most = MAX_SHARED_BYTES if kernel.family == "few" else kernel.shared_bytes
    return Function(driver, folder / kernel.file, f"w4_{kernel.family}", kernel.threads, most)


class Workspace:
    """What w4_tile leaves for its other blocks: a variant's own, since flags count launches of one grid."""

    def __init__(self, kernel: Kernel) -> None:
        self.blocks = multiprocessors() * kernel.values["EACH"]
        if kernel.family == "tile":
            size = self.blocks * kernel.outputs * kernel.values["TILE"]
            self.sums = torch.full((size,), float("nan"), device="cuda")
            self.flags = torch.zeros(self.blocks, device="cuda", dtype=torch.int32)


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def bind(
    function: Function,
    kernel: Kernel,
    workspace: Workspace,
    problem: Problem,
    operands: tuple[Tensor, ...],
    x: Tensor,
    y: Tensor,
    rows: int,
) -> Callable[[bool], None]:
    """The launch that computes `rows` rows of y."""
    v, n, k = kernel.values, problem.n, problem.k
    numbers = [ctypes.c_int(number) for number in (rows, n, n, k)]
    shared_bytes, tail = kernel.shared_bytes_for(rows, k), [*numbers, make_parts(problem)]
    if kernel.family == "few":
        grid = min(workspace.blocks, n // 16)
        return function.bind(grid, shared_bytes, [*map(pointer, (*operands, problem.map, x, y)), *tail])
    codes, *rest = operands
    x_map = tensor_map(function.driver, x, FLOAT16, k, rows, (64, v["TILE"]), SWIZZLE_128)
    box = (128 * v["KS"], kernel.outputs // 16)
    code_map = tensor_map(function.driver, codes, UINT32, k * 2, n // 16, box, 0)
    pointers = map(pointer, (*rest, problem.map, y, workspace.sums, workspace.flags))
    return function.bind(workspace.blocks, shared_bytes, [x_map, code_map, *pointers, *tail])
