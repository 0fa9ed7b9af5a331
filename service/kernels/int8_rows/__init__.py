"""Rows of x as int8 codes on CUDA, outliers apart: what kernels/int8_linear multiplies.

x --int8_rows--> codes, scales --int8_linear--> y. What they mean is in int8_linear/reference.py.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OutlierRule:
    """What an outlier is, and where outliers are counted."""

    threshold: float  # a float16's value; 0: there are none
    by_row: bool  # else a column of which any row's number reaches the threshold is one in all rows
    counts: Tensor  # int64 [2]: numbers multiplied in 16 bits so far, and all numbers; on x's device


@dataclass
class Live:
    """Which rows of a call are requests', the others being padding; without `slots` all are."""

    slots: Tensor | None = None  # int64 [T], where each row's K and V are written
    first_slot: int = 0  # what is written below is nobody's


ALL_LIVE = Live()


@dataclass(frozen=True)
class Marks:
    """Where columns with outliers are told, for kernels/w8_linear: column 32 j + i by bit i of word j.

    By row, bits are only ever added, and those of the call before, which marked another bitmap, are cleared:
    a bit too many costs time, no more. By batch each call writes all of its bits.
    """

    bitmap: Tensor  # int32
    spent: Tensor  # int32: of other layers, which have read it
