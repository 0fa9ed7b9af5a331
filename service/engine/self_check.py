"""Before anybody is served: does each kernel compute what its bits mean, and do they mean the checkpoint's?

startup --model--> check_linears, check_weights, or DeviceError

One layer of each shape and kernel multiplies random rows, as many as decode and prefill have and as many as
each of its kernels takes, and is compared with its own weights dequantized. That sees a kernel that is wrong
on this device, driver or compiler. Weights that were quantized while they loaded are compared with the 16-bit
ones that they come from. A reader that misunderstands a quantized checkpoint is the affair of likelihood.
"""

import torch

from service import device as devices
from service.errors import DeviceError
from service.kernels.add_rms_norm.reference import add_rms_norm
from service.kernels.gated_silu.reference import gated_silu
from service.model.checkpoint import TensorSource
from service.model.instance import GROUPS, ModelInstance
from service.precision.base import Activation, QuantLinear
from service.precision.source import part_rows

ROWS = (1, 8, 16, 64, 257)
# Relative error (root mean square) of y: 16-bit inputs and sums leave at most 0.6 %, rows of x as int8 1.3 %,
# as E4M3 2.7 %; a wrong nibble, scale or row is worth 10 % and more.
BOUNDS: dict[Activation, float] = {"16bit": 0.02, "int8_rows": 0.04, "fp8_rows": 0.08}
# The same of weights: four bits leave some 10 %, three 20 %, a row or nibble in another's place 140 %.
SOURCE_BOUNDS = {"fp32": 0.001, "bf16": 0.01, "fp16": 0.01, "int3": 0.5}
QUANTIZED_BOUND = 0.3
NORM_EPS = 1e-5


@torch.inference_mode()
def check_linears(model: ModelInstance) -> None:
    """Raises DeviceError that names layer, kernel and error."""
    for linear in kinds(model):
        check(linear, BOUNDS[model.backend.activation])
        if linear.makes_rows:
            check_made(linear, BOUNDS[model.backend.activation])
        if linear.gated_rows:
            check_gated(linear, BOUNDS["16bit"])
    devices.release_cached(model.device)  # the KV cache takes what is free


@torch.inference_mode()
def check_weights(model: ModelInstance, source: TensorSource) -> None:
    """As `check_linears`, for a source that was not quantized before."""
    if source.quantization is not None:
        return
    bound = SOURCE_BOUNDS.get(model.backend.name, QUANTIZED_BOUND)
    for linear in kinds(model):
        number = least_part(linear)
        part = linear.group.parts[number]
        want = source.read(f"{part.path}.weight").to(model.device).float()
        size = want.norm().clamp(min=torch.finfo(torch.float32).tiny)
        error = float((linear.dense(number).to(model.device) - want).norm() / size)
        if not error <= bound:
            raise DeviceError(
                f"`{part.path}` was not quantized to what it is on `{linear.group.device}`: its weights are "
                f"{error:.1%} off their 16-bit source, at most {bound:.1%} is rounding",
                hint="serve with another `--precision`, and report what `halftone doctor` says",
            )
    devices.release_cached(model.device)


def kinds(model: ModelInstance) -> list[QuantLinear]:
    """A layer of each shape and kernel."""
    found: dict[tuple[str, int, int], QuantLinear] = {}
    for layer in model.layers():
        for name in GROUPS:
            linear: QuantLinear = getattr(layer, name)
            group = linear.group
            found.setdefault((linear.kernel, group.in_features, group.out_features), linear)
    return list(found.values())


def least_part(linear: QuantLinear) -> int:
    parts = linear.group.parts
    return min(range(len(parts)), key=lambda number: parts[number].out_features)


def check(linear: QuantLinear, bound: float) -> None:
    """The least part of the layer, behind each number of rows."""
    group = linear.group
    part = least_part(linear)
    columns = part_rows(group, part)
    generator = torch.Generator().manual_seed(0)
    last = max(linear.kernel_rows, default=0) + 1  # the least that the last kernel takes
    numbers = sorted({*ROWS, *linear.kernel_rows, last})
    x = torch.randn(numbers[-1], group.in_features, generator=generator).to(group.device, group.dtype)
    x[:, -1] *= 20  # outliers, which int8 multiplies apart
    want = x.float() @ linear.dense(part).to(group.device).t()
    bias: torch.Tensor | None = getattr(linear, "bias", None)
    if bias is not None:
        want += bias[columns].float()
    for num_rows in numbers:
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


def check_made(linear: QuantLinear, bound: float) -> None:
    """The norm or the gate before the layer, where its own kernels compute that too."""
    group = linear.group
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, max(ROWS), group.in_features, generator=generator).to(group.device, group.dtype)
    for num_rows in (1, max(ROWS)):
        hidden, delta = x[:num_rows], y[:num_rows]
        if group.name == "down_proj":
            both = torch.cat((hidden, delta), 1)
            got, made = linear.gated(both), gated_silu(both)
        elif group.name == "o_proj":
            return
        else:
            got = linear.normed(hidden, delta, x[0].abs(), NORM_EPS)[1]
            made = add_rms_norm(hidden, delta, x[0].abs(), NORM_EPS)[1]
        want = linear(made).float()
        error = float((got.float() - want).norm() / want.norm().clamp(min=torch.finfo(torch.float32).tiny))
        if not error <= bound:
            raise DeviceError(
                f"kernel `{linear.kernel}` computes what comes before `{group.parts[0].path}` wrongly on "
                f"`{group.device}`: {error:.1%} off at {num_rows} rows, at most {bound:.0%} is rounding",
                hint="serve with another `--precision`, and report what `halftone doctor` says",
            )


def check_gated(linear: QuantLinear, bound: float) -> None:
    """The gate behind the layer, where one kernel computes both; `forward` was checked."""
    group = linear.group
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, max(linear.gated_rows), group.in_features, generator=generator).to(
        group.device, group.dtype
    )
    for num_rows in linear.gated_rows:
        told = x[:num_rows], y[:num_rows], x[0].abs(), NORM_EPS
        made, want = linear.normed_gated(*told), gated_silu(linear.normed(*told)[1]).float()
        size = want.norm().clamp(min=torch.finfo(torch.float32).tiny)
        error = float("nan") if made is None else float((made[1].float() - want).norm() / size)
        if not error <= bound:
            raise DeviceError(
                f"kernel `{linear.kernel}` computes the gate behind `{group.parts[0].path}` wrongly on "
                f"`{group.device}`: {error:.1%} off at {num_rows} rows, at most {bound:.0%} is rounding",
                hint="serve with another `--precision`, and report what `halftone doctor` says",
            )
