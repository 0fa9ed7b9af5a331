"""Who is measured: every precision of ours, as the server would build it, and what others have for the same.

measure --LinearGroup, read--> Contestant.build --> Built, called with x [rows, in_features]

Ours come out of the table of precisions, so a new row of it is measured without a word here. Others are what
their users call: torch's own product, bitsandbytes' modules, torch's tinygemm.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from service.precision import TABLE, load_backend
from service.precision.base import Backend, LinearGroup, Read
from service.precision.full import DTYPES
from service.precision.source import merged_weight, tensor_bytes

TINYGEMM_GROUP = 128  # weights under one scale
TINYGEMM_INNER_TILES = 8  # its order of memory on a GPU: 16-wide tiles that a thread reads at once
LLM_INT8_THRESHOLD = 6.0


@dataclass(frozen=True)
class Built:
    """One linear, ready to be called."""

    call: Callable[[Tensor], Tensor]  # [rows, in_features] -> [rows, out_features]
    kernel: str
    num_bytes: int  # that a call has to read of the weight
    is_capturable: bool = True


@dataclass(frozen=True)
class Contestant:
    name: str  # a canonical precision, or a library and what of it
    dtype: torch.dtype  # of x
    build: Callable[[LinearGroup, Read], Built]
    backend: Backend | None = None  # None: not ours
    has_outliers: bool = False  # its time depends on how many columns of x reach LLM.int8()'s threshold


def ours(names: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[Contestant]:
    """`names` empty: the whole table, of the unquantized modes the one that computes in `dtype`."""
    names = names or [name for name in TABLE if DTYPES.get(name, dtype) == dtype]
    found = []
    for backend in map(load_backend, names):
        # `dtype` stands for the checkpoint's own type; some modes compute in one type only
        of_x = backend.activation_dtype(device, dtype)
        has_outliers = backend.activation == "int8_rows"
        build = partial(build_ours, backend)
        found.append(Contestant(backend.canonical, of_x, build, backend, has_outliers))
    return found


def build_ours(backend: Backend, group: LinearGroup, read: Read) -> Built:
    layer = backend.build(group, read)
    return Built(layer.forward, layer.kernel, sum(layer.bytes().values()), layer.capturable)


def others(device: torch.device, dtype: torch.dtype) -> list[Contestant]:
    """What this machine's torch and bitsandbytes have."""
    sixteen_bit = "cuBLAS" if device.type == "cuda" else "torch.linear"
    return [
        Contestant(sixteen_bit, dtype, partial(build_16bit, sixteen_bit)),
        Contestant("bitsandbytes nf4", dtype, build_bitsandbytes_nf4),
        # its kernels read fp16 and bf16 would be cast, which is not what is asked about
        Contestant("bitsandbytes int8", torch.float16, build_bitsandbytes_int8, has_outliers=True),
        Contestant("torch tinygemm int4", torch.bfloat16, build_tinygemm),
    ]


def build_16bit(name: str, group: LinearGroup, read: Read) -> Built:
    weight = merged_weight(group, read, group.dtype)
    return Built(lambda x: F.linear(x, weight), name, tensor_bytes(weight))


def build_bitsandbytes_nf4(group: LinearGroup, read: Read) -> Built:
    """bitsandbytes.nn.Linear4bit with double quantization, as transformers makes it."""
    nn = bitsandbytes_modules()
    linear = nn.Linear4bit(
        group.in_features, group.out_features, bias=False, compute_dtype=group.dtype, quant_type="nf4"
    )
    weight = nn.Params4bit(
        merged_weight(group, read, group.dtype).cpu(), requires_grad=False, quant_type="nf4"
    )
    linear.weight = weight.to(group.device)
    state = linear.weight.quant_state
    num_bytes = tensor_bytes(linear.weight.data, state.absmax, state.state2.absmax)
    return Built(linear.forward, "bitsandbytes.nn.Linear4bit", num_bytes)


def build_bitsandbytes_int8(group: LinearGroup, read: Read) -> Built:
    """bitsandbytes.nn.Linear8bitLt at its usual threshold; it finds outliers on the host."""
    nn = bitsandbytes_modules()
    linear = nn.Linear8bitLt(
        group.in_features,
        group.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=LLM_INT8_THRESHOLD,
    )
    weight = merged_weight(group, read, torch.float16).cpu()
    linear.weight = nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(group.device)
    linear.eval()
    num_bytes = group.out_features * (group.in_features + torch.float32.itemsize)
    return Built(linear.forward, "bitsandbytes.nn.Linear8bitLt", num_bytes, is_capturable=False)


def bitsandbytes_modules() -> Any:
    from service.precision.bitsandbytes_import import bitsandbytes

    assert bitsandbytes is not None  # the import above keeps torch's compiler out of the one below
    from bitsandbytes import nn

    return nn


def build_tinygemm(group: LinearGroup, read: Read) -> Built:
    """torch's int4 product over random codes, scales and zeros: what they say does not change its time."""
    shape = group.out_features, group.in_features
    generator = torch.Generator(group.device).manual_seed(0)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.int32, device=group.device)
    pairs = torch.rand(
        shape[1] // TINYGEMM_GROUP, shape[0], 2, generator=generator, device=group.device
    ).bfloat16()
    if group.device.type == "cuda":
        halves = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(halves, TINYGEMM_INNER_TILES)
        product = torch.ops.aten._weight_int4pack_mm
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Built(
        lambda x: product(x, packed, TINYGEMM_GROUP, pairs),
        product.__name__,
        tensor_bytes(packed, pairs),
    )


def versions() -> dict[str, str]:
    """Of everything whose kernels or compiler take part; empty for what is not installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found["cuda"] = str(torch.version.cuda or "")
    for name in ("triton", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
