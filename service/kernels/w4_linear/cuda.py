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
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from service import device as devices
from service.kernels import launch as launching
from service.kernels.cuda import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.driver import SWIZZLE_NONE, multiprocessors, tensor_map
from service.kernels.cuda.maps import readable, rows_map
from service.kernels.w4_linear.layout import BLOCK_ROWS, NESTED_BLOCK, TILE_BYTES, Weight
from service.kernels.w4_linear.plan import MAX_PARTS, Row, most_sums
from service.kernels.w4_linear.variants import Few, Tile, Variant, most_shared_bytes


class Workspace:
    """Where blocks of w4_tile leave for each other what they have of a tile. All launches are on one stream.

    A launch that cuts tiles raises each flag of its grid by one, so that nothing is reset and a captured
    launch can be repeated; grids of one size share their flags.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks = multiprocessors()
        self.sums = torch.empty(self.blocks * most_sums(), dtype=torch.float32, device=device)
        # of one block a multiprocessor, of two
        self.flags = torch.zeros(2, 2 * self.blocks, dtype=torch.int32, device=device)


# one for a device while a layer has it: made while layers are built, for memory that is taken while a graph
# is captured would be the graph's
_workspaces: WeakValueDictionary[torch.device, Workspace] = WeakValueDictionary()


def workspace_on(device: torch.device) -> Workspace:
    found = _workspaces.get(device)
    if found is None:
        found = _workspaces[device] = Workspace(device)
    return found


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
    most = most_shared_bytes(variant.each) if isinstance(variant, Few) else variant.shared_bytes
    return kernel_of(variant.program, variant.threads, most)


class Call:
    """One weight under one variant; arguments are in the order of the kernel's signature."""

    def __init__(self, weight: Weight, parts: Parts, variant: Variant, workspace: Workspace) -> None:
        out_features, in_features = weight.out_features, weight.in_features
        self.box_rows = variant.tile if isinstance(variant, Tile) else 0
        self.variant, self.in_features = variant, in_features
        nested = weight.nested
        absent = c_void_p(0)
        scales = _pointer(weight.scales)
        zeros = absent if weight.zeros is None else _pointer(weight.zeros)
        of_nested = [absent, absent] if nested is None else [_pointer(nested.absmax), _pointer(nested.map)]
        self.x, self.y, self.rows = c_void_p(), c_void_p(), c_int()
        # outputs as packed, and in y
        numbers = [self.rows, *map(c_int, (out_features, out_features, in_features)), parts]
        self.num_blocks = workspace.blocks * variant.each
        told: list[Any]
        if isinstance(variant, Tile):
            maps = [TensorMap(), _code_map(weight, variant)]  # the first is each call's
            flags = workspace.flags[variant.each - 1]
            told = [*maps, scales, zeros, *of_nested, self.y, _pointer(workspace.sums), _pointer(flags)]
        else:
            self.num_blocks = min(self.num_blocks, out_features // BLOCK_ROWS)
            told = [_pointer(weight.codes), scales, zeros, *of_nested, self.x, self.y]
        self.launch = Launch(load(variant), [*told, *numbers], dependent=launching.DEPENDENT)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Both contiguous, x with at least a row."""
        num_rows = x.shape[0]
        self.rows.value, self.x.value, self.y.value = num_rows, x.data_ptr(), y.data_ptr()
        if self.box_rows:
            self.launch.replace(0, rows_map(x, self.box_rows))
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        shared_bytes = self.variant.shared_bytes_for(num_rows, self.in_features)
        self.launch(self.num_blocks, shared_bytes, stream)


class Bound:
    """x [tokens, in] -> [tokens, out] in the same type; it keeps the tensors whose addresses it has told."""

    def __init__(self, weight: Weight, rows: tuple[Row, ...], dtype: torch.dtype) -> None:
        self.weight, self.rows, self.dtype = weight, rows, dtype
        self.in_features, self.out_features = weight.in_features, weight.out_features
        # here, not while a graph is captured: kernels read weights before they wait for their predecessors
        devices.synchronize(weight.codes.device)
        self._parts = parts_of(weight)
        self._workspace = workspace_on(weight.codes.device)
        self._ends = [row.max_rows for row in rows if row.max_rows]
        self._calls: list[Call | None] = [None] * len(rows)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows, columns = x.shape
        # the kernels check nothing: another type or width would read what is not x's
        assert x.dtype is self.dtype, x.dtype
        assert columns == self.in_features, (columns, self.in_features)
        x = readable(x)
        y = x.new_empty(num_rows, self.out_features)
        if num_rows:
            number = bisect_left(self._ends, num_rows)
            call = self._calls[number]
            if call is None:
                variant = self.rows[number].variant
                call = self._calls[number] = Call(self.weight, self._parts, variant, self._workspace)
            call(x, y)
        return y


def _pointer(tensor: Tensor) -> c_void_p:
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())


def _code_map(weight: Weight, variant: Tile) -> TensorMap:
    """Blocks of 16 outputs, each so many words of 32 bits for 64 input features."""
    blocks, tiles = weight.codes.shape[:2]
    words = TILE_BYTES[weight.kind] // 4
    box = (variant.outputs // BLOCK_ROWS, variant.ks * words)
    return tensor_map(weight.codes.data_ptr(), torch.int32, (blocks, tiles * words), box, SWIZZLE_NONE)
