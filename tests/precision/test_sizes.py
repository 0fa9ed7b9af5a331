"""What a precision says its layers will take is what they take: every row of the table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels.w4_linear import layout
from service.precision import TABLE, load_backend, parse_precision
from service.precision.base import LinearGroup
from service.precision.linear import LinearSpec
from service.precision.options import AWQOptions
from service.precision.sizes import choose_awq_group, nf4

CPU = torch.device("cpu")
IN, OUTS = 256, (512, 128, 128)
MODES = (
    *TABLE, "int8:skip=qkv_proj", "int8:threshold=0", "nf4:double_quant=off", "awq:bits=3", "awq:group=64",
    "int3:group=128",
)  # fmt: skip


def parts_of(
    in_features: int = IN, outs: tuple[int, ...] = OUTS, bias: bool = False
) -> tuple[LinearSpec, ...]:
    return tuple(LinearSpec(f"part{i}", in_features, out, bias) for i, out in enumerate(outs))


def read(group_size: int, name: str) -> Tensor:
    """Zeros as a checkpoint has them: 16-bit, or AWQ's."""
    part, _, kind = name.rpartition(".")
    out = OUTS[int(part.removeprefix("part"))]
    groups = IN // group_size
    if kind == "bias":
        return torch.zeros(out, dtype=torch.bfloat16)
    shape, dtype = {
        "weight": ((out, IN), torch.bfloat16),
        "qweight": ((IN, out // 8), torch.int32),
        "qzeros": ((groups, out // 8), torch.int32),
        "scales": ((groups, out), torch.float16),
    }[kind]
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mode", MODES)
def test_sizes_are_those_of_a_built_layer(mode: str, bias: bool) -> None:
    """A precision without a row of sizes cannot be in the table, and one with a wrong row fails here."""
    backend, precision = load_backend(mode), parse_precision(mode)
    options = precision.options
    group_size = 128
    if isinstance(options, AWQOptions):
        group_size = options.group or choose_awq_group(parts_of(), 0)
        precision = type(precision)(precision.name, options.model_copy(update={"group": group_size}))
    dtype = backend.activation_dtype(CPU, torch.bfloat16)
    parts = parts_of(bias=bias)
    layer = backend.build(LinearGroup("qkv_proj", parts, CPU, dtype), lambda name: read(group_size, name))
    told = precision.sizes("qkv_proj", parts, dtype.itemsize)
    if layer.kernel == "torch.int4pack":
        told["zeros"] *= 2  # a byte each
    assert {part: size for part, size in told.items() if size} == {
        part: size for part, size in layer.bytes().items() if size
    }
    assert precision.codebook_bytes == backend.codebook_bytes
    assert options == backend.options
    assert parse_precision(mode).canonical == backend.canonical


def test_nf4_on_an_h100_takes_what_it_takes_on_a_cpu() -> None:
    """Its layout is that of kernels/w4_linear there."""
    blocks = [out * IN // 64 for out in OUTS]
    nested = sum(-(-count // 256) for count in blocks)
    absmax = [torch.zeros(count, dtype=torch.uint8) for count in blocks]
    levels = layout.Nested(torch.zeros(256), torch.zeros(nested), torch.zeros(len(OUTS)))
    packed = layout.pack_nf4(torch.zeros(sum(OUTS) * IN // 2, dtype=torch.uint8), absmax, levels, OUTS)
    told = nf4(parse_precision("nf4").options, "qkv_proj", parts_of(), 2)  # type: ignore[arg-type]
    assert told["codes"] == packed.codes.numel()
    assert told["scales"] == packed.scales.numel() + 4 * (nested + len(OUTS))


@pytest.mark.parametrize(
    ("mode", "in_features", "outs"),
    [("nf4", 96, (64,)), ("int3", 96, (64,)), ("int3:group=128", 192, (64,)), ("int3", 64, (40,))],
)
def test_shapes_without_a_place_are_refused_as_when_they_are_built(
    mode: str, in_features: int, outs: tuple[int, ...]
) -> None:
    parts = parts_of(in_features, outs)
    with pytest.raises(PrecisionError) as told:
        parse_precision(mode).sizes("o_proj", parts, 2)
    group = LinearGroup("o_proj", parts, CPU, torch.bfloat16)
    with pytest.raises(PrecisionError) as built:
        load_backend(mode).build(group, lambda name: torch.zeros(1))
    assert (told.value.message, told.value.hint) == (built.value.message, built.value.hint)


def test_options_are_judged_without_torch() -> None:
    program = (
        "import sys; from service.precision import parse_precision as parse; import service.model.sizes\n"
        "assert parse('nf4:double_quant=off').canonical == 'nf4:double_quant=off'\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
    with pytest.raises(PrecisionError, match="double_quant"):
        parse_precision("nf4:double_quant=perhaps")
    with pytest.raises(PrecisionError, match="does not exist"):
        parse_precision("nf5")
