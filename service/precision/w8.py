"""Which of int8's and fp8's layers our own kernel in CUDA C++ serves, by its tables.

precision/int8, fp8 --serves--> kernels/w8_linear; or the mode's other kernels, and the log says why
"""

import logging
from functools import cache

from service.kernels import w8_linear
from service.precision.base import LinearGroup

logger = logging.getLogger(__name__)


def serves(group: LinearGroup, shape: w8_linear.Shape) -> bool:
    """Does it serve this group's rows that the table has? The log says why not, on a GPU that could."""
    if group.device.type != "cuda":
        return False
    reason = w8_linear.absence() or w8_linear.refusal(shape)
    if group.deterministic:
        reason = reason or "its sums depend on the other rows, which `deterministic` forbids"
    if reason:
        tell_refusal(shape.codes, group.name, reason)
    return not reason


@cache
def tell_refusal(codes: w8_linear.Codes, layer: str, reason: str) -> None:
    rows = "many" if codes == "int8" else "few"
    logger.info("%s rows of `%s` are not served by our own 8-bit kernel: %s", rows, layer, reason)
