"""Compiled W4 kernels on torch's stream, through the CUDA driver alone: modules, clusters, tensor maps, launches."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from w4_problem import Problem, make_parts
from w4_variants import Kernel

MAX_SHARED, NUM_REGISTERS, LOCAL_BYTES = 8, 4, 3  # CU_FUNC_ATTRIBUTE_*
UINT32, FLOAT16, SWIZZLE_128, PROMOTE_256 = 2, 6, 3, 3
MULTIPROCESSORS = 132


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
    def __init__(
        self, driver: Driver, cubin: Path, name: str, threads: int, shared_bytes: int, cluster: int
    ) -> None:
        self.driver, self.threads, self.shared_bytes, self.cluster = driver, threads, shared_bytes, cluster
        self.image = cubin.read_bytes()
        module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), self.image)
        driver.call("cuModuleGetFunction", ctypes.byref(self.handle), module, name.encode())
        if shared_bytes > 48 << 10:
            driver.call("cuFuncSetAttribute", self.handle, MAX_SHARED, shared_bytes)

    def attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self.driver.call("cuFuncGetAttribute", ctypes.byref(value), which, self.handle)
        return value.value

    def resident_clusters(self) -> int:
        """How many clusters (or blocks) run at once."""
        if self.cluster == 1:
            return MULTIPROCESSORS
        attribute = LaunchAttribute(id=4)  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value[0], attribute.value[1], attribute.value[2] = self.cluster, 1, 1
        config = LaunchConfig(
            shared_bytes=self.shared_bytes, num_attributes=1, attributes=ctypes.pointer(attribute)
        )
        config.grid[0], config.grid[1], config.grid[2] = self.cluster * MULTIPROCESSORS, 1, 1
        config.block[0], config.block[1], config.block[2] = self.threads, 1, 1
        count = ctypes.c_int()
        self.driver.call(
            "cuOccupancyMaxActiveClusters", ctypes.byref(count), self.handle, ctypes.byref(config)
        )
        return min(count.value, MULTIPROCESSORS // self.cluster)

    def bind(self, grid: int, arguments: list[Any]) -> Callable[[], None]:
        """-> a launch on torch's current stream; `arguments` are ctypes values or structures, kept alive here."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))

        def launch() -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self.driver.call("cuLaunchKernel", self.handle, grid, 1, 1, self.threads, 1, 1, self.shared_bytes, stream,
                             pointers, None)  # fmt: skip

        launch.arguments = (arguments, pointers)  # type: ignore[attr-defined]
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
    name = f"w4_{kernel.family}"
    return Function(driver, folder / kernel.file, name, kernel.threads, kernel.shared_bytes, kernel.cluster)


def bind(
    function: Function,
    kernel: Kernel,
    problem: Problem,
    operands: tuple[Tensor, ...],
    x: Tensor,
    y: Tensor,
    rows: int,
) -> Callable[[], None]:
    """The launch that computes `rows` rows of y."""
    v, n, k = kernel.values, problem.n, problem.k
    parts = make_parts(problem)
    tail = [ctypes.c_int(rows), ctypes.c_int(n)]
    resident = function.resident_clusters()
    if kernel.family == "few":
        clusters = min(resident, n // (16 * v["RBLOCKS"]))
        arguments = [*map(pointer, (*operands, problem.map, x, y)), *tail, parts]
        return function.bind(clusters * kernel.cluster, arguments)
    outputs, tile = 64 * v["RT"] * v["WGS"], v["TILE"]
    tiles = n // (outputs * v["SHARE"]) * -(-rows // tile)
    codes, *rest = operands
    x_map = tensor_map(function.driver, x, FLOAT16, k, rows, (64, tile // v["SHARE"]), SWIZZLE_128)
    code_map = tensor_map(function.driver, codes, UINT32, k * 2, n // 16, (128 * v["KS"], outputs // 16), 0)
    clusters = tiles if v["SPLIT"] > 1 else min(resident, tiles)
    arguments = [x_map, code_map, *map(pointer, (*rest, problem.map, y)), *tail, ctypes.c_int(k), parts]
    return function.bind(clusters * kernel.cluster, arguments)


def bind_whole(
    function: Function, problem: Problem, operands: tuple[Tensor, ...], w: Tensor, first_row: int, rows: int
) -> Callable[[], None]:
    """The launch that writes `rows` dequantized rows, from `first_row`, to the start of w."""
    numbers = [ctypes.c_int(v) for v in (first_row // 16, rows // 16, problem.n, problem.k)]
    arguments = [*map(pointer, (*operands, problem.map, w)), *numbers, make_parts(problem)]
    return function.bind(2 * MULTIPROCESSORS, arguments)
