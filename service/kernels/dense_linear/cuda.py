"""16-bit linears of few rows on an H100: a weight bound to the variants of its plan, and a call of them.

bind_linear --weight, bias--> Bound; x [tokens, in] --> y [tokens, out]

What does not change between calls is written into the kernel's arguments once. More rows than the plan has
go to torch.
"""

from bisect import bisect_left
from ctypes import c_int, c_void_p
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from service import device as devices
from service.kernels import launch as launching
from service.kernels.cuda import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.driver import SWIZZLE_128, multiprocessors, tensor_map
from service.kernels.cuda.maps import COLUMNS, readable, rows_map
from service.kernels.dense_linear.few_rows import Row, Variant, most_sums

ABSENT = -1  # the bits of a number that is not there, as machine.h has them


class Workspace:
    """Where blocks leave for each other what they have of a tile; every number ABSENT between launches.

    All launches are on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks = multiprocessors()
        self.sums = torch.full((self.blocks * most_sums(),), ABSENT, dtype=torch.int32, device=device)


# one for a device while a layer has it: made while layers are built, for memory that is taken while a graph
# is captured would be the graph's
_workspaces: WeakValueDictionary[torch.device, Workspace] = WeakValueDictionary()


def workspace_on(device: torch.device) -> Workspace:
    found = _workspaces.get(device)
    if found is None:
        found = _workspaces[device] = Workspace(device)
    return found


def load(variant: Variant) -> Kernel:
    """Compiled and on the device."""
    return kernel_of(variant.program, variant.threads, variant.shared_bytes)


class Call:
    """One weight under one variant; arguments are in the order of the kernel's signature."""

    def __init__(self, weight: Tensor, bias: Tensor | None, variant: Variant, workspace: Workspace) -> None:
        out_features, in_features = weight.shape
        self.shared_bytes, self.box_rows = variant.shared_bytes, variant.tile // variant.share
        self.num_blocks = workspace.blocks // variant.share * variant.share * variant.per_sm
        box = (variant.outputs, COLUMNS)
        of_weight = tensor_map(weight.data_ptr(), weight.dtype, (out_features, in_features), box, SWIZZLE_128)
        self.y, self.rows = c_void_p(), c_int()
        told: list[Any] = [
            TensorMap(),  # of x: each call's
            of_weight,
            c_void_p(None if bias is None else bias.data_ptr()),
            self.y,
            c_void_p(workspace.sums.data_ptr()),
            *(self.rows, c_int(out_features), c_int(in_features)),
        ]
        self.launch = Launch(load(variant), told, dependent=launching.DEPENDENT)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """x readable, with at least a row; y contiguous."""
        self.rows.value, self.y.value = x.shape[0], y.data_ptr()
        self.launch.replace(0, rows_map(x, self.box_rows))
        self.launch(self.num_blocks, self.shared_bytes, torch._C._cuda_getCurrentRawStream(x.get_device()))


class Bound:
    """x [tokens, in] -> [tokens, out]; it keeps the tensors whose addresses it has told."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: tuple[Row, ...]) -> None:
        self.weight, self.bias, self.rows = weight, bias, rows
        # here, not while a graph is captured: the kernel reads weights before it waits for its predecessors
        devices.synchronize(weight.device)
        self._workspace = workspace_on(weight.device)
        self._ends = [row.max_rows for row in rows]
        self._calls: list[Call | None] = [None] * len(rows)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows, columns = x.shape
        if not 0 < num_rows <= self._ends[-1]:
            return F.linear(x, self.weight, self.bias)
        # the kernel checks nothing: another type or width would read what is not x's
        assert x.dtype is self.weight.dtype, x.dtype
        assert columns == self.weight.shape[1], (columns, self.weight.shape)
        x = readable(x)
        y = x.new_empty(num_rows, self.weight.shape[0])
        number = bisect_left(self._ends, num_rows)
        call = self._calls[number]
        if call is None:
            variant = self.rows[number].variant
            call = self._calls[number] = Call(self.weight, self.bias, variant, self._workspace)
        call(x, y)
        return y
