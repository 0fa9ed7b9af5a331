"""What to say when the device's memory runs out on the way to ready: for what, and how much was needed.

startup --told_shortage(...)--> torch.OutOfMemoryError becomes a DeviceError with the figures and the fix
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from service import device as devices
from service.errors import DeviceError
from service.model.checkpoint import TensorSource
from service.model.layout import layer_groups
from service.precision.base import Backend, LinearGroup
from service.precision.bitsandbytes_checkpoint import bits_of

MIB = 1 << 20
CPU = torch.device("cpu")


@contextmanager
def told_shortage(
    device: torch.device, what: str, needed_bytes: Callable[[], int] | None = None
) -> Iterator[None]:
    """DeviceError where `what` finds no room inside; only then is `needed_bytes` asked."""
    try:
        yield
    except torch.OutOfMemoryError:
        if needed_bytes is not None:
            what += f": needed {needed_bytes() // MIB} MiB"
        raise shortage(device, what) from None


def shortage(device: torch.device, what: str) -> DeviceError:
    free, total = devices.memory_free_bytes(device), devices.memory_total_bytes(device)
    held = devices.memory_used_bytes(device)
    return DeviceError(
        f"device `{device}` has no room for {what}, {free // MIB} MiB free of {total // MIB} MiB, "
        f"{held // MIB} MiB held by this process",
        hint="end other processes on the device, or choose a smaller model, precision, `kv_tokens` or "
        "`max_batch_tokens`",
    )


def weight_bytes(
    source: TensorSource, backend: Backend, dtype: torch.dtype, head: Literal["16bit", "int8"]
) -> int:
    """Bytes that the model's weights take in this precision, laid out as for a CPU.

    The linears of the first layer are built from ones and tell their bytes: all layers have their shapes,
    and no precision needs a formula that its own layers could outgrow. The rest is in `dtype`.
    """
    config = source.config
    if bits_of(source.quantization or {}):
        return stored_bytes(source, dtype)
    groups = [layer_groups(config, layer) for layer in range(config.num_layers)]
    linears = {part.path for layer in groups for parts in layer.values() for part in parts}

    def ones(name: str) -> Tensor:
        info = source.info(name)
        assert isinstance(info.dtype, torch.dtype), "verified before any is read"
        return torch.ones(info.shape, dtype=info.dtype)

    total = config.num_layers * sum(
        sum(backend.build(LinearGroup(name, parts, CPU, dtype), ones).bytes().values())
        for name, parts in groups[0].items()
    )
    for name in source.names:
        is_spare_head = name == "lm_head.weight" and (config.tied_head or head == "int8")
        if name.rpartition(".")[0] not in linears and not is_spare_head:
            total += torch.Size(source.info(name).shape).numel() * dtype.itemsize
    if head == "int8":
        total += config.vocab_size * (config.hidden_size + dtype.itemsize)
    return total


def stored_bytes(source: TensorSource, dtype: torch.dtype) -> int:
    """Of a checkpoint that bitsandbytes quantized: tensors are held as they are, 16-bit ones in `dtype`."""
    total = 0
    for name in source.names:
        info = source.info(name)
        assert isinstance(info.dtype, torch.dtype), "verified before any is read"
        is_held_as_it_is = info.dtype not in (torch.float16, torch.bfloat16)
        total += torch.Size(info.shape).numel() * (info.dtype if is_held_as_it_is else dtype).itemsize
    return total
