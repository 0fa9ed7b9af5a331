"""One linear of a model as the native library computes it: everything but x is told once, at load."""

from ctypes import c_char_p
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from service.kernels.native import loaded

_call = Struct("2Pq").pack  # x, y, rows: what each call's struct begins with


class NativeLinear:
    """x bfloat16 [T, in] -> [T, out]; it keeps the tensors that it was given, where they lie."""

    def __init__(self, function: str, in_features: int, out_features: int, layout: str, *fields: Any) -> None:
        """`fields` are tensors (None: a null pointer) and numbers, in the order of the function's struct.

        `layout` is theirs; in_features and out_features stand before them there.
        """
        self.in_features = in_features
        self.out_features = out_features
        self._tensors = [field for field in fields if isinstance(field, Tensor)]
        assert all(tensor.is_contiguous() for tensor in self._tensors)
        values = [address(field) if field is None or isinstance(field, Tensor) else field for field in fields]
        self._told = Struct("2q" + layout).pack(in_features, out_features, *values)
        self._function = loaded().function(function, [c_char_p])

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        # C checks nothing: another type or width would read what is not x's
        assert x.dtype is torch.bfloat16, x.dtype
        assert columns == self.in_features, (columns, self.in_features)
        x = x.contiguous()
        y = x.new_empty(rows, self.out_features)
        self._function(_call(x.data_ptr(), y.data_ptr(), rows) + self._told)
        return y


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
