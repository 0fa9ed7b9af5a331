"""Memory peaks by phase, on a device that a test stands for."""

import pytest
from fake_model import CPU

from service import device as devices
from service.engine.peaks import DECODE_STEPS, PeakWatch
from service.messages import StepStats

MIB = 1 << 20
PREFILL, DECODE = StepStats(num_prefill_tokens=9), StepStats(num_decode_tokens=1)


def test_each_phase_has_its_peak_and_decode_is_looked_at_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([20 * MIB, 10 * MIB, 30 * MIB])
    monkeypatch.setattr(devices, "reset_memory_peak", lambda device: True)
    monkeypatch.setattr(devices, "memory_peak_bytes", lambda device: next(peaks))
    watch = PeakWatch(CPU, 5 * MIB)
    assert watch.after(StepStats()) is None
    assert watch.after(PREFILL) == {"load": 5 * MIB, "prefill": 20 * MIB}
    assert watch.after(DECODE) == {"load": 5 * MIB, "prefill": 20 * MIB, "decode": 10 * MIB}
    for _ in range(DECODE_STEPS - 1):
        assert watch.after(DECODE) is None
    assert watch.after(DECODE) == {"load": 5 * MIB, "prefill": 20 * MIB, "decode": 30 * MIB}
