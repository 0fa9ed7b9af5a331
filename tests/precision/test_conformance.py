"""Every precision of the table against its own `dense()`, its own bytes and its 16-bit source."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.errors import CheckpointError, PrecisionError
from service.kernels.awq_linear.reference import pack
from service.precision import TABLE, backend_of, load_backend
from service.precision.base import LinearGroup, QuantLinear, Read
from service.precision.int8 import Int8Options
from service.precision.linear import LinearSpec

CPU = torch.device("cpu")
IN = 192
OUTS = (128, 64, 64)
GROUP = 64
PRECISIONS = (
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "int8:threshold=0",
    "int8:skip=o_proj",
    "int8:outliers=row",
    "int8:outliers=batch",
    "int8:kernel=bitsandbytes",
    "nf4",
    "nf4:double_quant=off",
    "awq",
    "awq:bits=3",
    "fp8",
    "int3",
)
# rounding of x, y and, in the packed products, of scales; fp16 sums on a CPU are taken in float32
RELATIVE_RMS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INT8_ROWS = 0.012  # int8 activations: 1/127 of each row's maximum, uniformly rounded
FP8_ROWS = 0.03  # E4M3 activations: each to an eighth of its power of two, uniformly rounded


def group_of(
    dtype: torch.dtype, outs: tuple[int, ...] = OUTS, bias: bool = False, name: str = "qkv_proj"
) -> LinearGroup:
    parts = tuple(LinearSpec(f"part{i}", IN, out, bias) for i, out in enumerate(outs))
    return LinearGroup(name, parts, CPU, dtype)


@cache
def source(bias: bool = False) -> dict[str, Tensor]:
    """16-bit weights of the parts."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for i, out in enumerate(OUTS):
        tensors[f"part{i}.weight"] = (torch.randn(out, IN, generator=generator) * 0.05).bfloat16()
        tensors[f"part{i}.bias"] = torch.randn(out, generator=generator).bfloat16()
    return tensors


@cache
def rounded(bits: int) -> dict[str, Tensor]:
    """`source` on an integer grid with plain rounding, in AutoAWQ's layout."""
    tensors = dict(source())
    top = 2**bits - 1
    for i, out in enumerate(OUTS):
        grouped = tensors[f"part{i}.weight"].float().view(out, -1, GROUP)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(0, top)
        codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, top)
        tensors[f"part{i}.qweight"] = pack(codes.view(out, IN).t().int())
        tensors[f"part{i}.qzeros"] = pack(zero.t().int())
        tensors[f"part{i}.scales"] = scale.t().half()
    return tensors


def reader(precision: str) -> Read:
    if not precision.startswith("awq"):
        return source().__getitem__
    return rounded(load_backend(precision).options.bits).__getitem__  # type: ignore[attr-defined]


def dtypes(precision: str) -> list[torch.dtype]:
    alone = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return [alone[precision]] if precision in alone else [torch.float32, torch.bfloat16, torch.float16]


CASES = [pytest.param(p, d, id=f"{p}-{str(d)[6:]}") for p in PRECISIONS for d in dtypes(p)]


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def tolerance(layer: QuantLinear, dtype: torch.dtype) -> float:
    if "fp8" in layer.kernel:
        return FP8_ROWS
    return INT8_ROWS if "int8" in layer.kernel else RELATIVE_RMS[dtype]


def built(precision: str, dtype: torch.dtype, bias: bool = False) -> QuantLinear:
    return load_backend(precision).build(group_of(dtype, bias=bias), reader(precision))


def test_every_row_of_the_table_is_covered() -> None:
    assert {precision.partition(":")[0] for precision in PRECISIONS} == set(TABLE)


@pytest.mark.parametrize("tokens", [1, 7, 33, 257])
@pytest.mark.parametrize(("precision", "dtype"), CASES)
def test_forward_agrees_with_dense(precision: str, dtype: torch.dtype, tokens: int) -> None:
    """What a layer computes is what its stored bits mean, bias included."""
    layer = built(precision, dtype, bias=True)
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    weight = torch.cat([layer.dense(part) for part in range(len(OUTS))])
    assert weight.dtype == torch.float32
    bias = torch.cat([source()[f"part{i}.bias"] for i in range(len(OUTS))]).float()
    y = layer(x)
    assert y.dtype == dtype
    assert relative_rms(y, F.linear(x.float(), weight, bias)) < tolerance(layer, dtype)


@pytest.mark.parametrize(("precision", "dtype"), CASES)
def test_bytes_are_those_of_the_buffers(precision: str, dtype: torch.dtype) -> None:
    """After the first forward too: a library may unpack scales then."""
    layer = built(precision, dtype, bias=True)
    layer(torch.ones(3, IN, dtype=dtype))
    held = sum(b.numel() * b.element_size() for b in (*layer.buffers(), *layer.parameters()))
    own = [v for v in vars(layer).values() if isinstance(v, Tensor)]
    assert not own, "a tensor outside the buffers escapes the count"
    assert sum(layer.bytes().values()) == held


@pytest.mark.parametrize(("precision", "dtype"), CASES)
def test_a_merged_group_is_its_parts_alone(precision: str, dtype: torch.dtype) -> None:
    merged = built(precision, dtype)
    for number, out in enumerate(OUTS):
        tensors = {
            name.replace(f"part{number}", "part0"): t
            for name, t in (
                rounded(load_backend(precision).options.bits) if "awq" in precision else source()  # type: ignore[attr-defined]
            ).items()
            if name.startswith(f"part{number}")
        }
        alone = load_backend(precision).build(group_of(dtype, (out,)), tensors.__getitem__)
        torch.testing.assert_close(merged.dense(number), alone.dense(0), rtol=0, atol=0)


def half_steps(precision: str, weight: Tensor) -> Tensor:
    """Largest error that rounding to the format allows for each weight; only int3 clips."""
    out = weight.shape[0]
    grouped = weight.view(out, -1, GROUP)
    if precision.startswith("int8"):
        return (weight.abs().amax(1, keepdim=True) / 127 / 2).expand_as(weight)
    if precision == "fp8":
        # half of an eighth of a power of two, and below the normal numbers half of 2^-9 of the scale
        return weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 * 2**-10
    if precision.startswith("nf4"):
        # the table's widest gap is 1 - 0.6962; double quantization moves an absmax by under 1 %
        most = 0.3038072 / 2 + (0.01 if precision == "nf4" else 0)
        return (grouped.abs().amax(-1, keepdim=True) * most).expand_as(grouped).reshape(out, -1)
    if precision == "int3":  # it clips: of a group's range at least 65 % is kept, in steps of a seventh
        span = grouped.amax(-1, keepdim=True).clamp(min=0) - grouped.amin(-1, keepdim=True).clamp(max=0)
        return (span * (0.35 + 1 / 7)).expand_as(grouped).reshape(out, -1)
    top = 2 ** (3 if "bits=3" in precision else 4) - 1
    step = (grouped.amax(-1, keepdim=True).clamp(min=0) - grouped.amin(-1, keepdim=True).clamp(max=0)) / top
    return step.expand_as(grouped).reshape(out, -1)  # the zero is rounded too: half a step each


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in ("fp32", "bf16", "fp16")])
def test_weights_are_their_source_within_a_step(precision: str) -> None:
    layer = built(precision, torch.bfloat16)
    for number in range(len(OUTS)):
        weight = source()[f"part{number}.weight"].float()
        error = (layer.dense(number) - weight).abs()
        assert (error <= half_steps(precision, weight) * 1.002).all()
        assert error.max() > 0 or not layer.bytes().get("codes")


def swap_nibbles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    words = tensors["part0.qweight"]
    swapped = (words & 0x0F0F0F0F) << 4 | words >> 4 & 0x0F0F0F0F
    return tensors | {"part0.qweight": swapped}


def test_a_nibble_swap_would_be_seen() -> None:
    """The check against the source has teeth: the same codes in another nibble order fail it."""
    layer = load_backend("awq").build(group_of(torch.bfloat16), swap_nibbles(rounded(4)).__getitem__)
    weight = source()["part0.weight"].float()
    assert (layer.dense(0) - weight).abs().max() > 4 * half_steps("awq", weight).max()


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("int8:threshold=6", "int8"),
        ("int8:threshold=0", "int8:threshold=0"),
        ("int8:skip=down_proj+o_proj", "int8:skip=o_proj+down_proj"),
        ("int8:threshold=5.5,skip=o_proj", "int8:threshold=5.5,skip=o_proj"),
        ("int8:outliers=row,kernel=auto", "int8:outliers=row"),
        ("int8:outliers=auto", "int8"),
        ("int8:kernel=bitsandbytes", "int8:outliers=batch,kernel=bitsandbytes"),
        ("nf4:double_quant=on", "nf4"),
        ("nf4:double_quant=off", "nf4:double_quant=off"),
        ("awq:bits=4,group=0", "awq"),
        ("awq:group=64,bits=3", "awq:bits=3,group=64"),
        ("int3:group=64", "int3"),
        ("int3:group=128", "int3:group=128"),
        (" bf16 ", "bf16"),
    ],
)
def test_canonical_strings(given: str, want: str) -> None:
    assert load_backend(given).canonical == want
    assert load_backend(want).canonical == want


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("int4", "`int4`"),
        ("bf16:bits=4", "`bits=4`"),
        ("int8:threshold=-1", "`threshold=-1`"),
        ("int8:threshold=nan", "`threshold=nan`"),
        ("int8:threshold=inf", "`threshold=inf`"),
        ("int8:skip=lm_head", "`lm_head`"),
        ("int8:outliers=column", "`outliers=column`"),
        ("int8:outliers=row,kernel=bitsandbytes", "`outliers=batch`"),
        ("nf4:double_quant=maybe", "`double_quant=maybe`"),
        ("awq:bits=5", "`bits=5`"),
        ("awq:bits=4.0", "`bits=4.0`"),
        ("awq:group=48", "`group=48`"),
        ("awq:bits", "`bits`"),
        ("int3:group=32", "`group=32`"),
    ],
)
def test_bad_options_are_named(given: str, named: str) -> None:
    with pytest.raises(PrecisionError) as error:
        load_backend(given)
    assert named in error.value.message
    assert error.value.hint


def config(**changed: object) -> dict[str, object]:
    return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, **changed}


def test_which_checkpoints_are_accepted() -> None:
    for precision in PRECISIONS:
        assert load_backend(precision).accepts(None)
        assert not load_backend(precision).accepts({"quant_method": "gptq", "bits": 4})
    assert load_backend("awq").accepts(config())
    assert load_backend("awq").accepts(config(version="GEMM"))
    assert load_backend("awq:group=64").accepts(config())
    assert load_backend("awq:bits=3").accepts(config(bits=3))
    assert not load_backend("nf4").accepts(config())


@pytest.mark.parametrize(
    ("quantization", "mode"),
    [
        (config(), "awq"),
        (config(bits=3), "awq:bits=3"),
        (config(group_size=128), "awq"),
        (config(bits=3, group_size=32), "awq:bits=3"),
        ({"quant_method": "gptq", "bits": 4}, None),
        ({}, None),
    ],
)
def test_a_quantized_checkpoint_names_its_mode(quantization: dict[str, object], mode: str | None) -> None:
    """`awq` alone means four bits, so a checkpoint of three is not what plain `awq` reads."""
    backend = backend_of(quantization)
    assert (backend and backend.canonical) == mode
    assert backend is None or backend.accepts(quantization)


@pytest.mark.parametrize(
    ("precision", "changed", "named"),
    [
        ("awq", {"version": "gemv"}, "`gemv`"),
        ("awq", {"version": "gemv_fast"}, "`gemv_fast`"),
        ("awq", {"bits": 3}, "3"),
        ("awq:bits=3", {}, "`awq:bits=3`"),
        ("awq:group=128", {}, "groups of 128"),
    ],
)
def test_a_contradicting_checkpoint_is_refused(
    precision: str, changed: dict[str, object], named: str
) -> None:
    with pytest.raises(PrecisionError) as error:
        load_backend(precision).accepts(config(**changed))
    assert named in error.value.message
    assert error.value.hint


def narrower(tensor: Tensor) -> Tensor:
    return tensor[:, :-1].contiguous()


@pytest.mark.parametrize(
    ("precision", "name", "damage"),
    [
        ("bf16", "weight", narrower),
        ("int8", "weight", Tensor.int),
        ("nf4", "weight", narrower),
        ("awq", "qweight", Tensor.long),
        ("awq", "qweight", narrower),
        ("awq", "qzeros", narrower),
        ("awq", "scales", narrower),
        ("awq", "scales", lambda t: torch.cat((t, t, t))),
    ],
)
def test_damaged_tensors_are_named(precision: str, name: str, damage: Callable[[Tensor], Tensor]) -> None:
    tensors = dict(rounded(4))
    tensors[f"part1.{name}"] = damage(tensors[f"part1.{name}"])
    with pytest.raises(CheckpointError, match="`part1"):
        load_backend(precision).build(group_of(torch.bfloat16), tensors.__getitem__)


def test_values_beyond_float16_are_refused() -> None:
    tensors = dict(source()) | {"part1.weight": torch.full((64, IN), 1e6).bfloat16()}
    for precision, dtype in (("fp16", torch.float16), ("int8", torch.bfloat16)):
        with pytest.raises(PrecisionError, match=r"`part1\.weight`"):
            load_backend(precision).build(group_of(dtype), tensors.__getitem__)


def test_full_precisions_compute_in_their_own_type_only() -> None:
    with pytest.raises(PrecisionError, match="float32"):
        load_backend("bf16").build(group_of(torch.float32), source().__getitem__)


def test_a_part_without_bias_has_zeros() -> None:
    group = group_of(torch.float32, bias=True)
    parts = (group.parts[0], LinearSpec("part1", IN, 64), group.parts[2])
    layer = load_backend("fp32").build(
        LinearGroup("qkv_proj", parts, CPU, torch.float32), source().__getitem__
    )
    y = layer(torch.zeros(1, IN))[0]
    want = torch.cat((source()["part0.bias"].float(), torch.zeros(64), source()["part2.bias"].float()))
    torch.testing.assert_close(y, want, rtol=0, atol=0)


def test_outliers_are_a_row_s_own_unless_it_is_said_otherwise() -> None:
    ways = {
        "int8": True,
        "int8:outliers=row": True,
        "int8:outliers=batch": False,
        "int8:kernel=bitsandbytes": False,
    }
    for precision, by_row in ways.items():
        options = load_backend(precision).options
        assert isinstance(options, Int8Options)
        assert options.by_row == by_row


def test_what_waits_for_the_host_is_not_captured() -> None:
    assert built("int8:outliers=row", torch.bfloat16).capturable
    assert not built("int8:kernel=bitsandbytes", torch.bfloat16).capturable
    assert all(
        built(precision, torch.bfloat16).capturable for precision in ("bf16", "nf4", "awq", "fp8", "int3")
    )


def test_activations_follow_the_device() -> None:
    gpu = torch.device("cuda")
    for precision in ("int8", "nf4", "awq"):
        backend = load_backend(precision)
        assert backend.activation_dtype(CPU, torch.float16) == torch.bfloat16
        assert backend.activation_dtype(gpu, torch.float16) == torch.float16
        assert backend.activation_dtype(gpu, torch.float32) == torch.bfloat16
    assert load_backend("fp16").activation_dtype(CPU, torch.bfloat16) == torch.float16
