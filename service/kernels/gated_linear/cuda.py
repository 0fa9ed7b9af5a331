"""gate_up_proj and the gate behind it on an H100: a weight bound to its kernel, and a call of it.

bind --weight--> Bound; x [tokens, in] --> silu(gate) * up [tokens, n]

What does not change between calls is written into the kernel's arguments once.
"""

from ctypes import c_int
from typing import Any

import torch
from torch import Tensor

from service import device as devices
from service.kernels import launch as launching
from service.kernels.cuda import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.driver import SWIZZLE_128, multiprocessors, tensor_map
from service.kernels.cuda.maps import readable, rows_map
from service.kernels.gated_linear.plan import (
    INPUTS,
    PAIR,
    PIECE_ROWS,
    THREADS,
    TILE_OUTPUTS,
    TILE_ROWS,
    Variant,
    served_rows,
)

X_MAP, Y_MAP = 0, 2  # arguments that are each call's own


def load(variant: Variant) -> Kernel:
    """Compiled and on the device."""
    return kernel_of(variant.program, THREADS, variant.shared_bytes)


class Bound:
    """x [tokens, in] -> [tokens, n], any number of tokens; it keeps the weight, whose address it has told.

    `served`: the numbers of tokens for which it is worth it.
    """

    def __init__(self, weight: Tensor, variant: Variant) -> None:
        self.weight, self.variant = weight, variant
        self.num_outputs = weight.shape[0] // 2
        # here, not while a graph is captured: the kernel reads weights before it waits for its predecessors
        devices.synchronize(weight.device)
        # multiprocessors come in pairs, and a block fills one: all pairs run at once
        self.num_blocks = multiprocessors() // PAIR * PAIR
        self.served = served_rows(self.num_outputs, self.num_blocks // PAIR)
        self._launch: Launch | None = None
        self._rows = c_int()

    def __call__(self, x: Tensor) -> Tensor:
        # the kernel checks nothing: another type or width would read what is not x's
        assert x.dtype is self.weight.dtype, x.dtype
        assert x.shape[1] == self.weight.shape[1], (x.shape, self.weight.shape)
        x = readable(x)
        y = x.new_empty(x.shape[0], self.num_outputs)
        if y.numel():
            self.write(x, y)
        return y

    def write(self, x: Tensor, y: Tensor) -> None:
        """x readable, with at least a row; y contiguous, at 16 bytes."""
        launch = self._launch = self._launch or self._prepared()
        self._rows.value = x.shape[0]
        launch.replace(X_MAP, rows_map(x, TILE_ROWS))
        launch.replace(Y_MAP, rows_map(y, PIECE_ROWS))
        launch(self.num_blocks, self.variant.shared_bytes, torch._C._cuda_getCurrentRawStream(x.get_device()))

    def _prepared(self) -> Launch:
        """Arguments are in the order of the kernel's signature."""
        outputs, inputs = self.weight.shape
        box = (TILE_OUTPUTS, INPUTS)
        of_weight = tensor_map(self.weight.data_ptr(), self.weight.dtype, (outputs, inputs), box, SWIZZLE_128)
        numbers = self._rows, c_int(self.num_outputs), c_int(inputs)
        told: list[Any] = [TensorMap(), of_weight, TensorMap(), *numbers]
        return Launch(load(self.variant), told, dependent=launching.DEPENDENT)

    @property
    def checked(self) -> tuple[int, ...]:
        """Numbers of tokens that it serves, for a check: the least, and the least that fills no tile."""
        rows = sorted(self.served)
        ragged = [number for number in rows if number % TILE_ROWS]
        return tuple(sorted({*rows[:1], *ragged[:1]}))
