"""W4 linears on a GPU: a weight bound to the kernels of its plan, and a call of them.

precision/w4 --Weight--> Bound; x [tokens, in] --> y [tokens, out]

What does not change between calls (addresses of the weight, numbers, places of parts) is written into the
kernels' arguments once. A call writes rows and addresses of x and y; for `w4_tile` also a tensor map over x,
which is kept for an address and number of rows: a captured step and its next capture ask for few.
"""

import ctypes
from bisect import bisect_left
from ctypes import c_float, c_int, c_void_p
from typing import Any

import torch
from torch import Tensor

from service.kernels import launch as launching
from service.kernels.cuda import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.driver import SWIZZLE_128, SWIZZLE_NONE, tensor_map
from service.kernels.w4_linear.layout import BLOCK_ROWS, NESTED_BLOCK, Weight
from service.kernels.w4_linear.plan import MAX_PARTS, Row
from service.kernels.w4_linear.variants import Tile, Variant

MAX_MAPS = 4096  # that are kept: 128 bytes each
ALIGNMENT = 16  # bytes, of x

_x_maps: dict[tuple[int, int, int, int], TensorMap] = {}  # (address, rows, columns, rows of a box) -> map


class Parts(ctypes.Structure):
    """`Parts` of w4_device.h: where the parts of a merged layer begin, for NF4's nested absmax."""

    _fields_ = [
        ("count", c_int),
        ("begin", c_int * MAX_PARTS),  # block of 16 rows
        ("first", c_int * MAX_PARTS),  # place of its first absmax, where nested blocks are whole
        ("offset", c_float * MAX_PARTS),
    ]


def parts_of(weight: Weight) -> Parts:
    """Reads the offsets from the device, once a layer."""
    parts = Parts(count=len(weight.outs))
    if weight.nested is not None:
        offsets = weight.nested.offsets.tolist()
        for number, first in enumerate(weight.first_nested()):
            parts.begin[number] = sum(weight.outs[:number]) // BLOCK_ROWS
            parts.first[number], parts.offset[number] = first * NESTED_BLOCK, offsets[number]
    return parts


def load(variant: Variant) -> Kernel:
    """Compiled and on the device."""
    return kernel_of(variant.program, variant.threads, variant.shared_bytes, variant.blocks_of_cluster)


class Call:
    """One weight under one variant; arguments are in the order of the kernel's signature."""

    def __init__(self, weight: Weight, parts: Parts, variant: Variant) -> None:
        self.variant, self.kernel = variant, load(variant)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        nested = weight.nested
        absent = c_void_p(0)
        scales = _pointer(weight.scales)
        zeros = absent if weight.zeros is None else _pointer(weight.zeros)
        of_nested = [absent, absent] if nested is None else [_pointer(nested.absmax), _pointer(nested.map)]
        self.x, self.y, self.rows = c_void_p(), c_void_p(), c_int()
        told: list[Any]
        if isinstance(variant, Tile):
            maps = [TensorMap(), _code_map(weight, variant)]  # the first is each call's
            told = [*maps, scales, zeros, *of_nested, self.y, self.rows]
            told += [c_int(self.out_features), c_int(self.in_features), parts]
        else:
            told = [_pointer(weight.codes), scales, zeros, *of_nested, self.x, self.y, self.rows]
            told += [c_int(self.out_features), parts]
        dependent = launching.DEPENDENT and variant.awaits_predecessor
        self.launch = Launch(self.kernel, told, dependent=dependent)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Both contiguous, x with at least a row."""
        num_rows, variant = x.shape[0], self.variant
        self.rows.value, self.x.value, self.y.value = num_rows, x.data_ptr(), y.data_ptr()
        if isinstance(variant, Tile):
            self.launch.replace(0, _x_map(x, variant.tile // variant.share))
        clusters = variant.clusters(num_rows, self.out_features, self.kernel.resident)
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        self.launch(clusters * variant.blocks_of_cluster, stream)


class Bound:
    """x float16 [tokens, in] -> [tokens, out]; it keeps the tensors whose addresses it has told."""

    def __init__(self, weight: Weight, rows: tuple[Row, ...], dtype: torch.dtype) -> None:
        self.weight, self.rows, self.dtype = weight, rows, dtype
        self._parts = parts_of(weight)  # waits for the device, which nothing may while a graph is captured
        self._ends = [row.max_rows for row in rows if row.max_rows]
        self._calls: list[Call | None] = [None] * len(rows)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows, columns = x.shape
        # the kernels check nothing: another type or width would read what is not x's
        assert x.dtype is self.dtype, x.dtype
        assert columns == self.weight.in_features, (columns, self.weight.in_features)
        x = x.contiguous()
        if x.data_ptr() % ALIGNMENT:
            x = x.clone()
        y = x.new_empty(num_rows, self.weight.out_features)
        if num_rows:
            number = bisect_left(self._ends, num_rows)
            call = self._calls[number]
            if call is None:
                variant = self.rows[number].variant
                call = self._calls[number] = Call(self.weight, self._parts, variant)
            call(x, y)
        return y


def _pointer(tensor: Tensor) -> c_void_p:
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())


def _x_map(x: Tensor, box_rows: int) -> TensorMap:
    key = (x.data_ptr(), x.shape[0], x.shape[1], box_rows)
    found = _x_maps.get(key)
    if found is None:
        if len(_x_maps) >= MAX_MAPS:
            _x_maps.clear()
        found = _x_maps[key] = tensor_map(key[0], x.dtype, (key[1], key[2]), (box_rows, 64), SWIZZLE_128)
    return found


def _code_map(weight: Weight, variant: Tile) -> TensorMap:
    """Blocks of 16 outputs, each 128 words of 32 bits for 64 input features."""
    blocks, tiles = weight.codes.shape[:2]
    box = (variant.outputs // BLOCK_ROWS, variant.ks * 128)
    return tensor_map(weight.codes.data_ptr(), torch.int32, (blocks, tiles * 128), box, SWIZZLE_NONE)
