"""Which precision a plan says to take, and why, in figures that follow from each other."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SHAPE

from service.model.config import parse_config
from service.plan.devices import GPUS, Device, find_device
from service.plan.plan import Plan, PlannedMode, Server, make_plan, to_json
from service.plan.question import read_question
from service.plan.shape import Shape, read_config_alone
from service.precision import TABLE

PRESETS = Path(__file__).parents[2] / "service/model/presets"
GIB = 1 << 30


@pytest.fixture(scope="module")
def shape() -> Shape:
    return read_config_alone(PRESETS / "llama-3.1-8b")


def planned(shape: Shape, device: Device | str, own_precision: str = "", **asked: str) -> Plan:
    device = find_device(device) if isinstance(device, str) else device
    return make_plan("a model", shape, device, read_question(asked), Server(), own_precision)


def mode_of(plan: Plan, precision: str) -> PlannedMode:
    return next(mode for mode in plan.modes if mode.precision == precision)


def test_every_precision_of_the_table_is_planned(shape: Shape) -> None:
    plan = planned(shape, "h100-80gb")
    others = [name for name in TABLE if name not in ("fp32", "bf16", "fp16")]
    assert [mode.precision for mode in plan.modes] == ["bf16", *others]
    for mode in plan.modes:
        assert mode.total_bytes == sum(mode.parts.values()) <= plan.device_bytes
        assert mode.max_requests == mode.kv_tokens // 8192
        assert mode.holds_all == (mode.needed_bytes <= plan.device_bytes)


def test_the_most_bits_that_hold_what_was_asked(shape: Shape) -> None:
    wide = planned(shape, "h100-80gb", concurrency="32")
    assert (wide.take, mode_of(wide, "bf16").holds_all) == ("bf16", True)
    narrow = planned(shape, "24GiB", concurrency="10")
    assert narrow.take == "int8"
    assert "`bf16` 6" in narrow.why
    narrower = planned(shape, "24GiB", concurrency="14")
    assert narrower.take == "awq"
    assert "compare" in narrower.why


def test_where_none_holds_it_the_closest_is_named(shape: Shape) -> None:
    plan = planned(shape, "24GiB", concurrency="64")
    assert plan.take == ""
    assert "`int3` comes closest with 15" in plan.why
    assert "--kv-dtype int8" in plan.why
    codes = planned(shape, "24GiB", concurrency="64", kv_dtype="int8")
    assert "--kv-dtype" not in codes.why
    assert mode_of(codes, "nf4").max_requests == pytest.approx(2 * mode_of(plan, "nf4").max_requests, rel=0.1)
    small = planned(shape, "4GiB")
    assert (small.take, {mode.max_requests for mode in small.modes}) == ("", {0})
    assert "No mode holds one request" in small.why
    assert all(mode.verdict.startswith("no: needs") for mode in small.modes)


def test_what_a_device_cannot_compute_is_refused(shape: Shape) -> None:
    plan = planned(shape, "a100-80gb", precisions="fp8,int8")
    assert "8-bit floats" in mode_of(plan, "fp8").verdict
    assert not mode_of(plan, "fp8").parts
    assert plan.take == "int8"
    assert all("8-bit floats" in mode.verdict for mode in planned(shape, "a100-80gb", kv_dtype="fp8").modes)


def test_a_quantized_checkpoint_has_one_mode(shape: Shape) -> None:
    packed = Shape(shape.config, {"quant_method": "awq", "group_size": 64}, "bf16", shape.num_parameters)
    plan = planned(packed, "24GiB", "awq", concurrency="8")
    assert [mode.precision for mode in plan.modes] == ["awq"]
    assert mode_of(plan, "awq").bits_per_weight == pytest.approx(4 + 20 / 64)
    both = planned(packed, "24GiB", "awq", precisions="nf4,awq:bits=4")
    assert "quantized to `awq`" in mode_of(both, "nf4").verdict


def test_shapes_that_a_layout_has_no_place_for() -> None:
    raw: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}
    odd = Shape(parse_config({**raw, "intermediate_size": 100}), None, "bf16", 1)
    plan = planned(odd, "24GiB", context="64")
    for precision in ("nf4", "awq", "int3", "fp8"):
        assert mode_of(plan, precision).verdict.startswith("no: precision")
    assert plan.take == "bf16"


def test_a_request_longer_than_the_window(shape: Shape) -> None:
    plan = planned(shape, "h100-80gb", context="200k", concurrency="1")
    assert plan.take == ""
    assert {mode.verdict for mode in plan.modes} == {"no: a request ends at 131,072 tokens"}
    assert planned(shape, "h100-80gb").context_tokens == 8192


def test_the_roofline(shape: Shape) -> None:
    """One request: all weights and its K and V at 3.35 TB/s. Many: bound by arithmetic in the end."""
    plan = planned(shape, "h100-80gb", context="1k", concurrency="1", precisions="bf16,fp8")
    one = mode_of(plan, "bf16")
    read = 16.061e9 - 128256 * 4096 * 2 + 1024 * 131072
    assert one.tokens_per_s == pytest.approx(3.35e12 / read, rel=0.001)
    assert one.tokens_per_s == one.one_request_tokens_per_s
    assert one.bound_by == "bandwidth"
    # two operations for each of 6.98e9 weights, and attention: 32 layers, 32 heads of 128
    prefill = 1024 * (2 * 6.979e9 + 4 * 32 * 32 * 128 * 512) / 989e12
    assert one.prefill_s == pytest.approx(prefill, rel=0.001)
    many = planned(shape, "h100-80gb", context="16", concurrency="1024", precisions="bf16,fp8")
    assert {mode.bound_by for mode in many.modes} == {"arithmetic"}
    assert mode_of(many, "fp8").tokens_per_s == pytest.approx(
        2 * mode_of(many, "bf16").tokens_per_s, rel=0.001
    )


def test_without_a_data_sheet_there_are_no_speeds(shape: Shape) -> None:
    plan = planned(shape, "80GiB", concurrency="8")
    assert {mode.tokens_per_s for mode in plan.modes} == {0.0}
    assert plan.take == "bf16"
    assert "faster" not in plan.why


def test_a_plan_is_json(shape: Shape) -> None:
    told = json.loads(json.dumps(to_json(planned(shape, "l4"))))
    assert told["device"] == "l4"
    assert told["device_bytes"] == GPUS["l4"].memory_bytes
    assert told["modes"][0]["parts"]["weights.embedding"] == 128256 * 4096 * 2
