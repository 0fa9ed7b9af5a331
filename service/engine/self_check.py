"""Before anybody is served: does each kernel compute what the bits that it reads mean?

startup --model--> check_linears, or DeviceError

One layer of each shape and kernel multiplies random rows, as many as decode and prefill have and as many as
each of its kernels takes, and is compared with its own weights dequantized. That sees a kernel that is wrong
on this device, driver or compiler. A reader that misunderstands a checkpoint is the affair of the tests: it
would make the same weights twice.
"""

import torch

from service import device as devices
from service.errors import DeviceError
from service.model.instance import GROUPS, ModelInstance
from service.precision.base import Activation, QuantLinear
from service.precision.source import part_rows

ROWS = (1, 8, 16, 64, 257)
# Relative error (root mean square) of y: 16-bit inputs and sums leave at most 0.6 %, rows of x as int8 1.3 %,
# as E4M3 2.7 %; a wrong nibble, scale or row is worth 10 % and more.
BOUNDS: dict[Activation, float] = {"16bit": 0.02, "int8_rows": 0.04, "fp8_rows": 0.08}


@torch.inference_mode()
def check_linears(model: ModelInstance) -> None:
    """Raises DeviceError that names layer, kernel and error."""
    checked = set()
    for layer in model.layers():
        for name in GROUPS:
            linear: QuantLinear = getattr(layer, name)
            kind = (linear.kernel, linear.group.in_features, linear.group.out_features)
            if kind not in checked:
                checked.add(kind)
                check(linear, BOUNDS[model.backend.activation])
    devices.release_cached(model.device)  # the KV cache takes what is free


def check(linear: QuantLinear, bound: float) -> None:
    """The least part of the layer, behind each number of rows."""
    group = linear.group
    part = min(range(len(group.parts)), key=lambda number: group.parts[number].out_features)
    columns = part_rows(group, part)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(ROWS), group.in_features, generator=generator).to(group.device, group.dtype)
    x[:, -1] *= 20  # outliers, which int8 multiplies apart
    want = x.float() @ linear.dense(part).to(group.device).t()
    bias: torch.Tensor | None = getattr(linear, "bias", None)
    if bias is not None:
        want += bias[columns].float()
    for num_rows in sorted({*ROWS, *linear.kernel_rows}):
        got = linear(x[:num_rows])[:, columns].float()
        size = want[:num_rows].norm().clamp(min=torch.finfo(torch.float32).tiny)  # weights may be all zeros
        error = float((got - want[:num_rows]).norm() / size)
        if not error <= bound:  # NaN too
            raise DeviceError(
                f"kernel `{linear.kernel}` computes `{group.parts[part].path}` wrongly on `{group.device}`: "
                f"{error:.1%} off at {num_rows} rows, at most {bound:.0%} is rounding",
                hint="serve with another `--precision`, on a CPU perhaps with `--cpu-kernels torch`, and "
                "report what `halftone doctor` says",
            )
