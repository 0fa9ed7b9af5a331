"""CUDA's driver as kernels/*/cuda.py calls it, for tests of what it is told: nothing is launched."""

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from service.kernels.cuda import driver, maps

STREAM = 77
MULTIPROCESSORS = 13


class Map(NamedTuple):
    """Columns before rows, as the driver has them."""

    dtype: int
    address: int
    shape: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int = driver.SWIZZLE_128


class Launched(NamedTuple):
    """Arguments are where they were told to be: the next call of the same kernel changes them."""

    config: driver.Config
    addresses: list[int]

    def pointers(self, numbers: Sequence[int]) -> list[int]:
        return [ctypes.c_void_p.from_address(self.addresses[number]).value or 0 for number in numbers]

    def integers(self, numbers: Sequence[int]) -> list[int]:
        return [ctypes.c_int.from_address(self.addresses[number]).value for number in numbers]

    def floats(self, numbers: Sequence[int]) -> list[float]:
        return [ctypes.c_float.from_address(self.addresses[number]).value for number in numbers]


class Driver:
    """Of a kernel with `num_arguments`, or of several with at most as many."""

    def __init__(self, num_arguments: int) -> None:
        self.num_arguments = num_arguments
        self.launches: list[Launched] = []
        self.maps: list[Map] = []

    def launch(self, config: int, handle: Any, arguments: int, extra: None) -> int:
        told = driver.Config.from_buffer_copy(driver.Config.from_address(config))
        addresses = (ctypes.c_void_p * self.num_arguments).from_address(arguments)
        self.launches.append(Launched(told, [address or 0 for address in addresses]))
        return 0

    def encode(self, made: Any, dtype: int, dimensions: int, address: Any, *told: Any) -> int:
        shape, strides, box, _, interleave, swizzle, promotion, fill = told
        assert (dimensions, interleave, promotion, fill) == (2, 0, driver.PROMOTE_256, 0)
        self.maps.append(Map(dtype, address.value, list(shape), list(strides), list(box), swizzle))
        return 0

    def check(self, what: str, code: int) -> None:
        assert code == 0


class Kernel:
    """Of a variant, loaded."""

    handle = ctypes.c_void_p(1)

    def __init__(self, variant: Any, threads: int = 0) -> None:
        self.name, self.threads = variant.name, threads or variant.threads


def stand_in(monkeypatch: pytest.MonkeyPatch, module: ModuleType, num_arguments: int) -> Driver:
    """For the driver that `module`, a kernels/*/cuda.py, calls."""
    found = Driver(num_arguments)
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(maps, "_maps", {})
    monkeypatch.setattr(module, "load", Kernel)
    monkeypatch.setattr(module, "multiprocessors", lambda: MULTIPROCESSORS, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return found
