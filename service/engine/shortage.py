"""What to say when the device's memory runs out on the way to ready: for what, and how much was needed.

startup --told_shortage(...)--> torch.OutOfMemoryError becomes a ShortageError with the figures and the fix
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from service import device as devices
from service.errors import ShortageError
from service.model.checkpoint import TensorSource
from service.model.sizes import for_model, group_size_of, weight_parts
from service.precision import parse_precision
from service.precision.base import Backend

MIB = 1 << 20


@contextmanager
def told_shortage(
    device: torch.device, what: str, needed_bytes: Callable[[], int] | None = None
) -> Iterator[None]:
    """ShortageError where `what` finds no room inside; only then is `needed_bytes` asked."""
    try:
        yield
    except torch.OutOfMemoryError:
        needs_bytes = needed_bytes() if needed_bytes is not None else 0
        if needs_bytes:
            what += f": needed {needs_bytes // MIB} MiB"
        raise shortage(device, what, needs_bytes) from None


def one_layer_of(precision: str) -> str:
    """What a calibrated mode needs room for while it is made."""
    return f"one layer at a time of the 16-bit weights that `{precision}` is made from"


def shortage(device: torch.device, what: str, needs_bytes: int = 0) -> ShortageError:
    free, total = devices.memory_free_bytes(device), devices.memory_total_bytes(device)
    held = devices.memory_used_bytes(device)
    return ShortageError(
        f"device `{device}` has no room for {what}, {free // MIB} MiB free of {total // MIB} MiB, "
        f"{held // MIB} MiB held by this process",
        hint="end other processes on the device, or choose a smaller model, precision, `kv_tokens` or "
        "`max_batch_tokens`",
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
