"""8-bit linears on a GPU: a weight bound to the variants of its plan, and a call of them.

kernels/int8_linear --rows of codes, 16-bit rows, marked columns--> Bound --> y [tokens, out]

What does not change between calls is written into a kernel's arguments once. A call writes rows, addresses
and what the work is cut into, and a tensor map over the codes, which is kept for an address and number of
rows: a captured step and its next capture ask for few.
"""

from bisect import bisect_left
from ctypes import c_float, c_int, c_void_p
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from service import device as devices
from service.kernels import launch as launching
from service.kernels.cuda import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.driver import SWIZZLE_128, multiprocessors, tensor_map
from service.kernels.cuda.maps import rows_map
from service.kernels.int8_rows import Marks, OutlierRule
from service.kernels.int8_rows.triton import Rows
from service.kernels.w8_linear.plan import Row, Shape, most_sums, plan
from service.kernels.w8_linear.reference import told_threshold
from service.kernels.w8_linear.variants import MAX_INPUTS, STEP, THREADS, Tile

GATHERED_COLUMNS = 512  # with outliers that blocks gather once; more are right, but slow


class Workspace:
    """What blocks of a launch leave for each other, and where rows tell of their outliers.

    All launches are on one stream; counters are zeros between them.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks = multiprocessors()
        self.sums = torch.empty(self.blocks * most_sums(), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(self.blocks, dtype=torch.int32, device=device)  # of tiles that are shared
        self.gathered = torch.zeros(2, dtype=torch.int32, device=device)
        self.bitmaps = torch.zeros(3, MAX_INPUTS // 32, dtype=torch.int32, device=device)


# one for a device while a layer has it: made while layers are built, for memory that is taken while a graph
# is captured would be the graph's
_workspaces: WeakValueDictionary[torch.device, Workspace] = WeakValueDictionary()


def workspace_on(device: torch.device) -> Workspace:
    found = _workspaces.get(device)
    if found is None:
        found = _workspaces[device] = Workspace(device)
    return found


def load(variant: Tile) -> Kernel:
    """Compiled and on the device."""
    return kernel_of(variant.program, THREADS, variant.shared_bytes)


class Call:
    """One weight under one variant; arguments are in the order of the kernel's signature."""

    def __init__(
        self,
        codes: Tensor,
        steps: Tensor,
        marks: Marks,
        threshold: float,
        variant: Tile,
        workspace: Workspace,
    ) -> None:
        self.variant, self.blocks = variant, workspace.blocks
        self.out_features, self.in_features = codes.shape
        self.x_steps, self.x16, self.y, self.x_out = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        self.rows, self.shared_tiles = c_int(), c_int()
        box = (variant.outputs, STEP)
        w_map = tensor_map(
            codes.data_ptr(), torch.int8, (self.out_features, self.in_features), box, SWIZZLE_128
        )
        told: list[Any] = [
            TensorMap(), w_map, self.x_steps, _pointer(steps), self.x16, _pointer(marks.bitmap),
            _pointer(codes), self.y, _pointer(workspace.sums), _pointer(workspace.arrived), self.x_out,
            _pointer(workspace.gathered), self.rows, c_int(self.out_features), c_int(self.in_features),
            self.shared_tiles, c_int(GATHERED_COLUMNS), c_float(threshold),
        ]  # fmt: skip
        self.launch = Launch(load(variant), told, dependent=launching.DEPENDENT)

    def __call__(self, x_codes: Tensor, x_steps: Tensor, x16: Tensor, y: Tensor) -> None:
        """All contiguous: int8 [T, in], float32 [at least T], [T, in], [T, out]."""
        num_rows, variant = len(x16), self.variant
        x_out = x16.new_empty(num_rows, GATHERED_COLUMNS) if variant.gathers else x16
        self.x_steps.value, self.x16.value = x_steps.data_ptr(), x16.data_ptr()
        self.y.value, self.x_out.value = y.data_ptr(), x_out.data_ptr()
        blocks, shared = variant.work(num_rows, self.out_features, self.in_features, self.blocks)
        self.rows.value, self.shared_tiles.value = num_rows, shared
        self.launch.replace(0, rows_map(x_codes, variant.tile))
        stream = torch._C._cuda_getCurrentRawStream(y.get_device())
        self.launch(blocks, variant.shared_bytes, stream)


def marks_of(number: int, bitmaps: Tensor) -> Marks:
    """int32 [3, words] -> where the layer with this number marks, and what it clears.

    Layers take turns with two bitmaps. The first of a forward pass has one of its own and clears both: which
    of them the pass before left behind depends on how many layers it went through.
    """
    if number == 0:
        return Marks(bitmaps[2], bitmaps[:2].view(-1))
    return Marks(bitmaps[number % 2], bitmaps[2 if number == 1 else (number + 1) % 2])


class Bound:
    """Rows of x -> [T, out] in their type; it keeps the tensors whose addresses it has told."""

    def __init__(
        self, codes: Tensor, steps: Tensor, bias: Tensor | None, rule: OutlierRule, shape: Shape, number: int
    ) -> None:
        self.codes, self.steps, self.bias, self.shape = codes, steps, bias, shape
        self.threshold = told_threshold(rule)
        # here, not while a graph is captured: kernels read weights before they wait for their predecessors
        devices.synchronize(codes.device)
        self.workspace = workspace_on(codes.device)
        self.marks = marks_of(number, self.workspace.bitmaps)
        self.rows: tuple[Row, ...] = plan(shape)
        self._ends = [row.max_rows for row in self.rows if row.max_rows]
        self._calls: list[Call | None] = [None] * len(self.rows)

    def __call__(self, rows: Rows) -> Tensor:
        x16 = rows.x
        # the kernel checks nothing: another type or width would read what is not x's
        assert x16 is not None
        assert x16.dtype is self.shape.dtype, x16.dtype
        assert x16.shape[1] == self.shape.in_features, x16.shape
        num_rows = len(x16)
        y = x16.new_empty(num_rows, self.shape.out_features)
        number = bisect_left(self._ends, num_rows)
        call = self._calls[number]
        if call is None:
            variant = self.rows[number].variant
            told = self.codes, self.steps, self.marks, self.threshold, variant, self.workspace
            call = self._calls[number] = Call(*told)
        call(rows.codes[0], rows.scales, x16, y)
        return y if self.bias is None else y.add_(self.bias)


def _pointer(tensor: Tensor) -> c_void_p:
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())
