"""8-bit linears on a GPU: a weight bound to the variants of its plan, and a call of them.

kernels/int8_linear --rows of codes, 16-bit rows, marked columns--> BoundInt8 --> y [tokens, out]
kernels/fp8_linear --rows of codes, their scales--> BoundFP8 --> y

What does not change between calls is written into a kernel's arguments once. A call writes rows, addresses
and what the work is cut into, and a tensor map over the codes, which is kept for an address and number of
rows: a captured step and its next capture ask for few.
"""

from bisect import bisect_left
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass
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
from service.kernels.w8_linear.plan import Row, Shape, most_sums, plan, row_for
from service.kernels.w8_linear.reference import told_threshold
from service.kernels.w8_linear.variants import MAX_INPUTS, STEP, Codes, Tile

GATHERED_COLUMNS = 512  # with outliers that blocks gather once; more are right, but slow


class Workspace:
    """What blocks of a launch leave for each other, and where int8's rows tell of their outliers.

    All launches are on one stream; counters are zeros between them.
    """

    def __init__(self, device: torch.device, codes: Codes) -> None:
        self.blocks = multiprocessors()
        self.sums = torch.empty(self.blocks * most_sums(codes), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(self.blocks, dtype=torch.int32, device=device)  # of tiles that are shared
        self.gathered = torch.zeros(2, dtype=torch.int32, device=device)
        self.bitmaps = torch.zeros(3, MAX_INPUTS // 32, dtype=torch.int32, device=device)


# one for a device while a layer has it: made while layers are built, for memory that is taken while a graph
# is captured would be the graph's
_workspaces: WeakValueDictionary[tuple[torch.device, Codes], Workspace] = WeakValueDictionary()


def workspace_on(device: torch.device, codes: Codes) -> Workspace:
    found = _workspaces.get((device, codes))
    if found is None:
        found = _workspaces[device, codes] = Workspace(device, codes)
    return found


@dataclass(frozen=True)
class Weight:
    codes: Tensor  # int8 or float8_e4m3fn [out, in]
    steps: Tensor  # float32 [out], what a code counts


@dataclass(frozen=True)
class Outliers:
    """Of int8's rows."""

    marks: Marks
    threshold: float  # from which on a number of a marked column is one


def load(variant: Tile) -> Kernel:
    """Compiled and on the device."""
    shares = variant.codes == "fp8"  # as it was measured
    return kernel_of(variant.program, variant.threads, variant.shared_bytes, shares=shares)


class Call:
    """One weight under one variant; arguments are in the order of the kernel's signature."""

    def __init__(
        self, weight: Weight, outliers: Outliers | None, variant: Tile, workspace: Workspace
    ) -> None:
        self.variant, self.blocks = variant, workspace.blocks
        self.out_features, self.in_features = weight.codes.shape
        self.x_steps, self.x16, self.y, self.x_out = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        self.rows, self.shared_tiles = c_int(), c_int()
        box = (variant.outputs, STEP)
        shape = (self.out_features, self.in_features)
        codes = _pointer(weight.codes)
        w_map = tensor_map(weight.codes.data_ptr(), weight.codes.dtype, shape, box, SWIZZLE_128)
        told: list[Any] = [
            TensorMap(), w_map, self.x_steps, _pointer(weight.steps), self.x16,
            _pointer(outliers.marks.bitmap if outliers else None), codes, self.y, _pointer(workspace.sums),
            _pointer(workspace.arrived), self.x_out, _pointer(workspace.gathered), self.rows,
            c_int(self.out_features), c_int(self.in_features), self.shared_tiles, c_int(GATHERED_COLUMNS),
            c_float(outliers.threshold if outliers else 0),
        ]  # fmt: skip
        self.launch = Launch(load(variant), told, dependent=launching.DEPENDENT)

    def __call__(self, x_codes: Tensor, x_steps: Tensor, x16: Tensor | None, y: Tensor) -> None:
        """All contiguous: [T, in], float32 [at least T], of int8 [T, in], [T, out]."""
        num_rows, variant = len(y), self.variant
        x_out = y.new_empty(num_rows, GATHERED_COLUMNS) if variant.gathers else x16
        self.x_steps.value, self.y.value = x_steps.data_ptr(), y.data_ptr()
        self.x16.value, self.x_out.value = _address(x16), _address(x_out)
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
    """A weight under its plan; it keeps the tensors whose addresses it has told."""

    def __init__(self, weight: Weight, shape: Shape, workspace: Workspace, outliers: Outliers | None) -> None:
        self.weight, self.shape, self.workspace, self.outliers = weight, shape, workspace, outliers
        # here, not while a graph is captured: kernels read weights before they wait for their predecessors
        devices.synchronize(weight.codes.device)
        self.rows: tuple[Row, ...] = plan(shape)
        self._ends = [row.max_rows for row in self.rows if row.max_rows]
        self._calls: list[Call | None] = [None] * len(self.rows)

    def multiply(self, x_codes: Tensor, x_steps: Tensor, x16: Tensor | None) -> Tensor:
        """As many rows as the plan has -> [T, out] of the activations' type."""
        # the kernel checks nothing: another type or width would read what is not there
        assert x_codes.dtype is self.weight.codes.dtype, x_codes.dtype
        assert x_codes.shape[1] == self.shape.in_features, x_codes.shape
        num_rows = len(x_codes)
        assert row_for(self.rows, num_rows), num_rows
        y = x_codes.new_empty(num_rows, self.shape.out_features, dtype=self.shape.dtype)
        number = bisect_left(self._ends, num_rows)
        call = self._calls[number]
        if call is None:
            variant = self.rows[number].variant
            call = self._calls[number] = Call(self.weight, self.outliers, variant, self.workspace)
        call(x_codes, x_steps, x16, y)
        return y


class BoundInt8(Bound):
    """Rows as int8_rows marks them -> [T, out]."""

    def __init__(
        self, weight: Weight, bias: Tensor | None, rule: OutlierRule, shape: Shape, number: int
    ) -> None:
        self.bias = bias  # [out], of the activations' type
        workspace = workspace_on(weight.codes.device, "int8")
        self.marks = marks_of(number, workspace.bitmaps)
        super().__init__(weight, shape, workspace, Outliers(self.marks, told_threshold(rule)))

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.x is not None
        assert rows.x.dtype is self.shape.dtype, rows.x.dtype
        y = self.multiply(rows.codes[0], rows.scales, rows.x)
        return y if self.bias is None else y.add_(self.bias)


class BoundFP8(Bound):
    """Codes of rows and what they count -> [T, out]."""

    def __init__(self, weight: Weight, shape: Shape) -> None:
        super().__init__(weight, shape, workspace_on(weight.codes.device, "fp8"), None)

    def __call__(self, codes: Tensor, scales: Tensor) -> Tensor:
        return self.multiply(codes, scales, None)


def _pointer(tensor: Tensor | None) -> c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return c_void_p(_address(tensor))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
