"""What to say when the device's memory runs out on the way to ready: for what, and how much was needed.

startup --told_shortage(...)--> torch.OutOfMemoryError becomes a ShortageError with the figures and the fix
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch

from service import device as devices
from service.errors import ShortageError
from service.model.checkpoint import TensorSource
from service.model.sizes import for_model, group_size_of, weight_parts
from service.precision import parse_precision
from service.precision.base import Backend

MIB = 1 << 20
OTHERS = "end other processes on the device, or "
SMALLER = f"{OTHERS}choose a smaller model, precision, `kv_tokens` or `max_batch_tokens`"
ELSEWHERE = f"{OTHERS}make the checkpoint with `halftone quantize --device cpu`"


@contextmanager
def told_shortage(
    device: torch.device, what: str, needed_bytes: Callable[[], int] | None = None, hint: str = SMALLER
) -> Iterator[None]:
    """ShortageError where `what` finds no room inside; only then is `needed_bytes` asked."""
    try:
        yield
    except torch.OutOfMemoryError:
        needs_bytes = needed_bytes() if needed_bytes is not None else 0
        if needs_bytes:
            what += f": needed {needs_bytes // MIB} MiB"
        raise shortage(device, what, needs_bytes, hint) from None


def told_quantizing(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """ShortageError where a calibrated mode finds no room to be made inside."""
    what = f"one layer at a time of the 16-bit weights that `{precision}` is made from"
    return told_shortage(device, what, hint=ELSEWHERE)


def shortage(device: torch.device, what: str, needs_bytes: int = 0, hint: str = SMALLER) -> ShortageError:
    free, total = devices.memory_free_bytes(device), devices.memory_total_bytes(device)
    held = devices.memory_used_bytes(device)
    return ShortageError(
        f"device `{device}` has no room for {what}, {free // MIB} MiB free of {total // MIB} MiB, "
        f"{held // MIB} MiB held by this process",
        hint=hint,
        needs_bytes=needs_bytes,
        has_bytes=free + held,
    )


def weight_bytes(
    source: TensorSource, backend: Backend, dtype: torch.dtype, head: Literal["16bit", "int8"]
) -> int:
    """Bytes that the model's weights take in this precision; what is not quantized is in `dtype`."""
    config = source.config
    precision = for_model(parse_precision(backend.canonical), config, group_size_of(source.quantization))
    return sum(weight_parts(config, precision, dtype.itemsize, head).values())
