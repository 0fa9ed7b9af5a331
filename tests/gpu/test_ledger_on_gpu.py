"""Ledger and plan against what a neighbour sees the engine take of the GPU. `pytest -m gpu`, by hand."""

from collections.abc import Callable

import pytest
import torch

from service.ledger import kv_bytes, weight_bytes
from service.messages import EngineConfig, Fatal, Ready, Sampling, Step, Submit
from service.model.hub import PRESETS
from service.model.sizes import for_model
from service.plan.devices import Device
from service.plan.estimate import Serving, estimate
from service.plan.shape import read_config_alone
from service.precision import parse_precision
from tests.engine_child import Child, spawned

pytestmark = pytest.mark.gpu
SHAPE = PRESETS / "llama-3.2-1b"
KV_TOKENS = 65_536  # 2.1 GB: 1 % of the whole is then less than a CUDA context
GIB = 1 << 30


def used_bytes() -> int:
    """By all processes; the first call opens this process's own context."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    return total - free


def ledger_of(child: Child) -> dict[str, int]:
    """The next that the engine tells."""
    while True:
        message = child.receive()
        if isinstance(message, Step) and message.stats.memory_bytes is not None:
            return message.stats.memory_bytes


@pytest.mark.parametrize("precision", ["fp16", "nf4", "awq", "int8", "fp8"])
def test_parts_sum_to_what_is_taken(precision: str, record_property: Callable[[str, object], None]) -> None:
    """When the engine is ready, and with requests under way."""
    before = used_bytes()
    config = EngineConfig(
        model_path=str(SHAPE),
        precision=precision,
        device="cuda",
        load_format="random",
        max_batch_requests=16,
        kv_tokens=KV_TOKENS,
    )
    with spawned(config) as child:
        child.connection.settimeout(300)
        while not isinstance(message := child.receive(), Ready):
            assert not isinstance(message, Fatal), message
        taken, parts = used_bytes() - before, message.info.memory_bytes
        told = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in parts.items())
        record_property("figure", f"{precision}: {taken / 1e6:.1f} MB taken; {told}")
        assert sum(parts.values()) == pytest.approx(taken, rel=0.01)
        # what is found as a remainder is no cover for something that was forgotten
        assert 0.3 * GIB < parts["outside_torch"] < 1.2 * GIB
        assert parts["workspace"] < GIB / 4
        assert 0 < parts["activations"] < GIB
        assert parts["graphs"] > 0
        assert parts["allocator_slack"] < GIB / 4
        assert parts["kv.used"] == 0
        config_json = read_config_alone(SHAPE).config
        mode = for_model(parse_precision(precision), config_json)
        device = Device("this", message.info.device_bytes)
        planned = estimate(config_json, mode, "auto", device, Serving(16, 2048, 0.9, kv_tokens=KV_TOKENS))
        told = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in planned.parts.items())
        record_property("figure", f"{precision}: {planned.total_bytes / 1e6:.1f} MB planned; {told}")
        assert weight_bytes(planned.parts) == pytest.approx(weight_bytes(parts), rel=0.01)
        assert kv_bytes(planned.parts) == kv_bytes(parts)
        assert planned.total_bytes == pytest.approx(sum(parts.values()), rel=0.03)

        child.send(*(Submit(id, [id] * 500, Sampling(20_000, ignore_eos=True)) for id in range(12)))
        while not (busy := ledger_of(child))["kv.used"]:
            pass
        taken = used_bytes() - before
        record_property("figure", f"{precision}: {taken / 1e6:.1f} MB, busy {sum(busy.values()) / 1e6:.1f}")
        assert sum(busy.values()) == pytest.approx(taken, rel=0.01)
        assert kv_bytes(busy) == kv_bytes(parts)
