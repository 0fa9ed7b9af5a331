"""The energy counter against power integrated over time, on a GPU that is kept busy. `pytest -m gpu`."""

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from service.device import device_uuid
from service.energy import EnergyMeter

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# the counter is renewed some ten times a second, power is a mean over the last: neither edge is sharp
AGREEMENT = 0.05
BUSY_S = 6.0
SETTLE_S = 2.0


def test_joules_are_watts_times_seconds(record_property: Callable[[str, object], None]) -> None:
    meter = EnergyMeter.connect(device_uuid(torch.device("cuda", torch.cuda.current_device())))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=CUDA)
    begun = time.perf_counter()
    samples: list[tuple[float, float, float]] = []  # seconds, joules, watts
    reading_s: list[float] = []
    while (now := time.perf_counter() - begun) < SETTLE_S + BUSY_S:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
        asked = time.perf_counter()
        joules, watts = meter.joules(), meter.watts()
        reading_s.append((time.perf_counter() - asked) / 2)
        if now > SETTLE_S:
            samples.append((asked, joules, watts))
    meter.close()
    joules_of = [joules for _, joules, _ in samples]
    assert joules_of == sorted(joules_of)
    counted = joules_of[-1] - joules_of[0]
    integrated = sum(
        (later - earlier) * (power + next_power) / 2
        for (earlier, _, power), (later, _, next_power) in itertools.pairwise(samples)
    )
    renewals = len(set(joules_of)) / (samples[-1][0] - samples[0][0])
    record_property(
        "figure",
        f"energy: {counted:.0f} J counted, {integrated:.0f} J by integrating watts "
        f"({counted / integrated:.3f}); {renewals:.0f} renewals a second in {len(samples)} readings; "
        f"a reading takes {statistics.median(reading_s) * 1e6:.0f} us, at most {max(reading_s) * 1e6:.0f}",
    )
    assert counted == pytest.approx(integrated, rel=AGREEMENT)
    assert counted > 0
