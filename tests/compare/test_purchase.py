"""What a mode's saving buys in a report, and that a plan counts it alike."""

from pathlib import Path

import msgspec

import service
from service.compare.report import Row, purchase
from service.plan.devices import Device
from service.plan.estimate import Serving
from service.plan.plan import PlannedMode, Server, make_plan
from service.plan.question import read_question
from service.plan.shape import read_config_alone
from service.precision import TABLE
from tests.compare.made_up import KV_BYTES_PER_TOKEN, MODES, Made, row

PRESETS = Path(service.__file__).parent / "model/presets"


def test_what_freed_bytes_buy() -> None:
    base, small, large = (
        row(Made(name, size), MODES[0]) for name, size in (("bf16", 16), ("nf4", 6), ("fp32", 32))
    )
    bought = purchase(small, base, 400.0)
    assert bought is not None
    assert bought.freed_bytes == 10_000_000_000
    assert bought.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    assert bought.more_kv_tokens == 76_288  # 76,293 fit; requests hold whole blocks of 16
    assert bought.more_requests == 240 - 50
    assert purchase(base, base, 400.0) is None
    larger = purchase(large, base, 400.0)
    assert larger is not None
    assert larger.more_kv_tokens == -20_000  # all that the reference has
    codes = row(Made("bf16 + kv int8", 16, kv_dtype="int8"), MODES[0])
    held = purchase(codes, base, 400.0)
    assert held is not None
    assert (held.freed_bytes, held.more_kv_tokens) == (
        0,
        38_448 - 20_000,
    )  # no weights, and half of the cache


def test_a_plan_of_the_same_memory_says_the_same() -> None:
    """For every precision, and an 8-bit cache: a device that the reference and its cache fill to the byte."""
    shape = read_config_alone(PRESETS / "llama-3.1-8b")
    serving = Serving(max_batch_requests=256, step_tokens=2048, kv_memory_fraction=1.0)

    def planned(memory_bytes: int, kv_dtype: str = "auto") -> dict[str, PlannedMode]:
        device = Device("a machine", memory_bytes, is_gpu=False, has_e4m3=True)
        question = read_question({"context": "1000", "kv_dtype": kv_dtype})
        modes = make_plan("a model", shape, device, question, Server("auto", serving)).modes
        return {f"{mode.precision} {kv_dtype}": mode for mode in modes}

    roomy = planned(40 * 10**9)["bf16 auto"]
    beside = sum(size for part, size in roomy.parts.items() if part in ("tables.rotary", "outside_torch"))
    memory_bytes = roomy.weight_bytes + beside + roomy.kv_tokens * roomy.kv_token_bytes
    found = {name: mode for kv in ("auto", "int8") for name, mode in planned(memory_bytes, kv).items()}
    reference = found["bf16 auto"]
    assert reference.kv_tokens == roomy.kv_tokens
    assert len(found) == 2 * (len(TABLE) - 2)

    def as_row(name: str, mode: PlannedMode) -> Row:
        made = row(Made(name, 0), MODES[0])
        assert made.memory
        memory = msgspec.structs.replace(
            made.memory,
            weight_bytes=mode.weight_bytes,
            kv_tokens=mode.kv_tokens,
            kv_bytes_per_token=mode.kv_token_bytes,
        )
        return msgspec.structs.replace(made, memory=memory)

    base = as_row("bf16 auto", reference)
    for name, mode in found.items():
        if mode is not reference:
            bought = purchase(as_row(name, mode), base, 1000.0)
            assert bought is not None
            assert bought.more_kv_tokens == mode.kv_tokens - reference.kv_tokens
            assert bought.more_requests == mode.max_requests - reference.max_requests
