"""The ledger of a real engine against what the system says of its process from outside, and its rules."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_child import Child, spawned
from fake_model import FakeCaptured, FakeGraphPool, fake_engine
from tiny_models import make_checkpoint
from torch import Tensor

from service import device as devices
from service.engine import ledger as ledgers
from service.engine.graphs import GraphMemory
from service.engine.ledger import Ledger, LedgerWatch
from service.ledger import PARTS, kv_bytes, weight_bytes
from service.messages import EngineConfig, EngineInfo, Ready, Sampling, Step, Submit

MIB = 1 << 20
NAMES = {part.name for part in PARTS}
BLOCK_BYTES = 2 * 3 * 2 * 16 * 32 * 4  # K and V of three layers, two heads of 32, 16 tokens, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(path, "llama", head_dim=32)
    return path


def held_bytes(child: Child) -> int:
    """Resident, or swapped out."""
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    return sum(int(size) for size in re.findall(r"Vm(?:RSS|Swap):\s+(\d+) kB", status)) * 1024


def ready(child: Child) -> EngineInfo:
    while not isinstance(message := child.receive(), Ready):
        pass
    return message.info


def told(child: Child) -> Iterator[dict[str, int]]:
    """Ledgers of the steps to come."""
    while True:
        message = child.receive()
        if isinstance(message, Step) and message.stats.memory_bytes is not None:
            yield message.stats.memory_bytes


def test_parts_are_the_process_within_one_percent(folder: Path) -> None:
    """And a cache that is larger by 48 MiB is larger by that in its own part and in no other."""
    found = []
    for num_blocks in (64, 64 + 48 * MIB // BLOCK_BYTES):
        config = EngineConfig(
            model_path=str(folder), precision="fp32", device="cpu", kv_tokens=16 * num_blocks
        )
        with spawned(config) as child:
            info = ready(child)
            held = held_bytes(child)
            parts = info.memory_bytes
            assert sum(parts.values()) == pytest.approx(held, rel=0.01)
            assert parts.keys() <= NAMES
            assert kv_bytes(parts) == (num_blocks + 1) * BLOCK_BYTES
            assert parts["activations"] < 4 * MIB  # what loading left is gone
            assert weight_bytes(parts) == info.weight_bytes
            found.append(parts)
    small, large = found
    assert kv_bytes(large) - kv_bytes(small) == 48 * MIB
    others = [sum(parts.values()) - kv_bytes(parts) for parts in found]
    assert abs(others[1] - others[0]) < 8 * MIB


def test_what_requests_hold_is_told_while_they_hold_it(folder: Path) -> None:
    config = EngineConfig(model_path=str(folder), precision="fp32", device="cpu", kv_tokens=512)
    with spawned(config) as child:
        info = ready(child)
        assert info.memory_bytes["kv.used"] == 0
        child.send(*(Submit(id, [1] * 17, Sampling(200, ignore_eos=True)) for id in range(400)))
        parts = next(told(child))
        assert 0 < parts["kv.used"] <= 32 * BLOCK_BYTES
        assert kv_bytes(parts) == 33 * BLOCK_BYTES


def test_a_cpu_s_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """1250 of tensors and 40 of recordings; loading left 300 in the heap, of 500 that nobody else has."""
    held = 1250 + 40 + 500 + 300

    def give_back(device: torch.device) -> None:
        nonlocal held
        held -= 300

    monkeypatch.setattr(devices, "release_cached", give_back)
    monkeypatch.setattr(devices, "memory_used_bytes", lambda device: held)
    ledger = made_up(None, step_bytes=0, used_before=None)
    expected = {
        "weights.codes": 1000, "tables.requests": 50, "kv.used": 60, "kv.free": 140, "activations": 0,
        "workspace": 40, "graphs": 0, "allocator_slack": 0, "outside_torch": 500,
    }  # fmt: skip
    assert ledger.parts() == expected
    held += 70  # steps come
    assert ledger.parts() == expected | {"activations": 70}
    held -= 90  # and others need the room of our files' pages
    assert ledger.parts() == expected | {"outside_torch": 480}


class Device:
    """Stands for a GPU: bytes of the allocator in use and kept, and of all processes on the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live, self.kept, self.taken = 0, 0, 0
        monkeypatch.setattr(devices, "runs_behind", lambda device: True)
        monkeypatch.setattr(devices, "device_uuid", lambda device: "GPU-1")
        monkeypatch.setattr(devices, "memory_used_bytes", lambda device: self.live + self.kept)
        monkeypatch.setattr(devices, "memory_kept_bytes", lambda device: self.kept)
        monkeypatch.setattr(devices, "memory_taken_bytes", lambda device: self.taken)
        monkeypatch.setattr(ledgers, "used_bytes", lambda uuid: self.taken)


def made_up(graphs: GraphMemory | None, step_bytes: int, used_before: int | None) -> Ledger:
    """Weights 1000, tables 50, a cache of 10 blocks of 20."""
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        memory_bytes=lambda: {"weights.codes": 1000},
        decoder=SimpleNamespace(recordings=SimpleNamespace(num_bytes=40)),
    )
    kv: Any = SimpleNamespace(bytes=200, num_blocks=10)
    runner = SimpleNamespace(
        penalties=SimpleNamespace(bytes=40),
        state=SimpleNamespace(bytes=10),
        graphs=SimpleNamespace(memory=graphs) if graphs else None,
    )
    engine: Any = SimpleNamespace(runner=runner, cache=SimpleNamespace(num_held=3))
    return Ledger(model, kv, engine, step_bytes, used_before)


def test_a_gpu_s_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """1250 of tensors, 30 of a workspace, graphs of 100 (60 in tensors) and 5 in the driver, 500 outside."""
    gpu = Device(monkeypatch)
    gpu.live, gpu.kept = 1250 + 30 + 60, 40 + 70
    gpu.taken = 9000 + gpu.live + gpu.kept + 5 + 500
    ledger = made_up(GraphMemory(100, 40, 5), step_bytes=50, used_before=9000)
    expected = {
        "weights.codes": 1000, "tables.requests": 50, "kv.used": 60, "kv.free": 140, "activations": 50,
        "workspace": 30, "graphs": 105, "allocator_slack": 20, "outside_torch": 500,
    }  # fmt: skip
    assert ledger.parts() == expected
    gpu.taken += 4000  # a neighbour comes
    gpu.live, gpu.kept = gpu.live + 45, gpu.kept - 45  # and a step is under way
    assert ledger.parts(is_idle=False) == expected


def test_what_capturing_takes_is_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each capture takes 10 of a pool, of which 4 stay in a tensor, and 3 of the driver's own."""
    gpu = Device(monkeypatch)
    gpu.live, gpu.kept, gpu.taken = 500, 100, 5000

    class Pool(FakeGraphPool):
        def capture(self, run: Callable[[], Tensor], *, is_known: bool = False) -> FakeCaptured:
            gpu.live, gpu.kept, gpu.taken = gpu.live + 4, gpu.kept + 6, gpu.taken + 13
            return super().capture(run)

    engine = fake_engine(max_batch_requests=4)
    monkeypatch.setattr(devices, "GraphPool", Pool)
    monkeypatch.setattr(devices, "runs_behind", lambda device: False)
    engine.runner.capture()  # sizes 4, 2, 1, greedy and drawn, and a step with prompts
    graphs = engine.runner.graphs
    assert graphs is not None
    assert graphs.memory == GraphMemory(buffer_bytes=70, slack_bytes=42, driver_bytes=21)
    gpu.live += 1000  # somebody else's, between two captures
    graphs.forward(2)
    graphs.forward(2)
    assert graphs.memory == GraphMemory(buffer_bytes=80, slack_bytes=48, driver_bytes=24)


def test_a_released_cache_takes_activations_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(monkeypatch)
    gpu.live, gpu.kept, gpu.taken = 1250, 20, 1270
    parts = made_up(None, step_bytes=50, used_before=0).parts()
    assert (parts["activations"], parts["allocator_slack"], parts["graphs"]) == (20, 0, 0)


def test_without_nvml_all_on_the_device_passes_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(monkeypatch)
    gpu.live, gpu.taken = 1250, 5000
    assert made_up(None, 0, used_before=None).parts()["outside_torch"] == 5000 - 1250


def test_the_watch_tells_what_is_worth_it() -> None:
    now = 0.0
    parts = {"kv.used": 0, "allocator_slack": 10 * MIB}
    ledger: Any = SimpleNamespace(parts=lambda is_idle: dict(parts))
    watch = LedgerWatch(ledger, dict(parts), clock=lambda: now)
    now = 1.5
    assert watch.look(is_idle=True) is None
    parts["allocator_slack"] += MIB // 2
    now = 3.0
    assert watch.look(is_idle=True) is None
    parts["allocator_slack"] += MIB // 2
    assert watch.look(is_idle=True) is None  # it has looked a moment ago
    now = 4.5
    assert watch.look(is_idle=True) == parts
    parts["kv.used"] = 1
    now = 6.0
    assert watch.look(is_idle=False) == parts
