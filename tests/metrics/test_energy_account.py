"""Whose joules are whose, and that nothing waits for the driver, with a meter made by hand."""

import asyncio
import threading

import msgspec
import pytest

from service.energy import EnergyMeter
from service.errors import DeviceError
from service.messages import EngineInfo
from service.metrics import Metrics, energy_account
from tests.metric_samples import sample
from tests.metrics.test_exposition import info

pytestmark = pytest.mark.anyio
JOULES, WATTS = "halftone_energy_joules_total", "halftone_power_watts"


class Meter(EnergyMeter):
    """Says what it is told to, as soon as `may_answer` is set."""

    def __init__(self) -> None:
        self.total, self.power, self.is_lost, self.is_closed = 5e6, 300.0, False, False
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.readers: set[int] = set()

    def joules(self) -> float:
        self.readers.add(threading.get_ident())
        assert self.may_answer.wait(timeout=30), "who shall let it answer waits for the answer"
        if self.is_lost:
            raise DeviceError("GPU is lost")
        return self.total

    def watts(self) -> float:
        return self.power

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The event loop that serves."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    fake = Meter()
    monkeypatch.setattr(EnergyMeter, "open", lambda uuid: fake)
    return fake


def on_gpu(precision: str = "nf4") -> EngineInfo:
    return msgspec.structs.replace(info(precision), device_uuid="GPU-1")


async def scraped(metrics: Metrics, name: str, precision: str = "nf4") -> float | None:
    await metrics.read_energy()
    return sample(metrics, name, precision=precision)


async def ended(metrics: Metrics, meter: Meter) -> None:
    """The engine is gone and its last joules are counted."""
    thread = metrics._energy._thread  # type: ignore[union-attr]
    metrics.engine_state("down")
    await asyncio.to_thread(thread.shutdown)
    await asyncio.sleep(0)
    assert meter.is_closed


async def test_each_precision_counts_the_energy_of_its_own_time(meter: Meter) -> None:
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(on_gpu())
    assert await scraped(metrics, JOULES) == 0  # not what the card took since it was made
    meter.total += 40
    assert await scraped(metrics, JOULES) == 40
    assert await scraped(metrics, WATTS) == 300
    meter.total += 2
    await ended(metrics, meter)
    meter.total += 1000  # nothing of ours
    metrics.engine_ready(on_gpu("bf16"))
    await metrics.read_energy()
    meter.total += 7
    assert await scraped(metrics, JOULES) == 42
    assert await scraped(metrics, JOULES, "bf16") == 7
    assert await scraped(metrics, WATTS) is None
    assert await scraped(metrics, WATTS, "bf16") == 300


async def test_the_event_loop_does_not_wait_for_the_driver(meter: Meter) -> None:
    metrics = Metrics("demo", "auto")
    meter.may_answer.clear()
    metrics.engine_ready(on_gpu())
    scrapes = [asyncio.create_task(metrics.read_energy()) for _ in range(2)]
    await asyncio.sleep(0)  # they ask
    meter.may_answer.set()
    await asyncio.gather(*scrapes)
    assert sample(metrics, WATTS) == 300
    await ended(metrics, meter)
    assert len(meter.readers) == 1
    assert threading.get_ident() not in meter.readers


async def test_a_driver_that_hangs_does_not_take_the_page_with_it(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No joule is lost either: the counter goes on from where it was."""
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(on_gpu())
    await metrics.read_energy()
    meter.may_answer.clear()
    meter.total += 30
    with monkeypatch.context() as impatient:
        impatient.setattr(energy_account, "PATIENCE_S", 0.0)
        assert await scraped(metrics, JOULES) == 0
        assert await scraped(metrics, WATTS) is None
    meter.may_answer.set()
    assert await scraped(metrics, JOULES) == 30
    assert await scraped(metrics, WATTS) == 300


async def test_a_reading_that_is_late_brings_no_gauge_back(meter: Meter) -> None:
    """It was asked for while nf4 served, and came when bf16 did."""
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(on_gpu())
    await metrics.read_energy()
    meter.may_answer.clear()
    meter.total += 3
    late = asyncio.create_task(metrics.read_energy())
    await asyncio.sleep(0)
    thread = metrics._energy._thread  # type: ignore[union-attr]
    metrics.engine_ready(on_gpu("bf16"))
    meter.may_answer.set()
    await late
    await asyncio.to_thread(thread.shutdown)
    await asyncio.sleep(0)
    assert sample(metrics, JOULES, precision="nf4") == 3
    assert sample(metrics, WATTS, precision="nf4") is None


async def test_a_lost_gpu_does_not_take_the_page_with_it(meter: Meter) -> None:
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(on_gpu())
    await metrics.read_energy()
    meter.is_lost = True
    assert await scraped(metrics, WATTS) is None
    assert await scraped(metrics, JOULES) == 0
    assert meter.is_closed


async def test_without_a_counter_there_is_no_energy_rather_than_none_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EnergyMeter, "open", lambda uuid: None)
    metrics = Metrics("demo", "auto")
    for served in (on_gpu(), info()):  # a GPU that does not count, a CPU
        metrics.engine_ready(served)
        assert await scraped(metrics, JOULES) is None
        assert await scraped(metrics, WATTS) is None
