"""Launches in a CUDA graph, timed once or kept up under the card's power cap, with its joules and clock from NVML.

w16_algorithms.py measures with it. A machine captures launches and marks times on its stream; `Cpu` stands in for the GPU
where there is none, so that a dry run takes the same way.
"""

import ctypes
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

SETTLE_SECONDS = 0.15  # of every stretch, which do not count: the clock follows the load
BATCH_MS = 8.0
MAX_AHEAD = 3  # batches that the host is ahead of the GPU
POLL_SECONDS = 0.002
POLLS_A_CLOCK = 5
POWER_CAPPED, CLOCK_SM, TEMPERATURE_GPU = (
    0x4,
    1,
    0,
)  # nvmlClocksThrottleReasonSwPowerCap, NVML_CLOCK_SM, NVML_TEMPERATURE_GPU
Launch = Callable[[], Any]


class Gpu:
    name = "cuda"

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def on_stream(self) -> Any:
        return torch.cuda.stream(self.stream)

    def handle(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def capture(self, launches: Sequence[Launch]) -> Any:
        """Not by torch.cuda.graph, which empties the caches: 1,300 times the checks' buffers would be allocated anew.

        The launches have run on this stream before, so that capturing loads and allocates nothing.
        """
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            for launch in launches:
                launch()
        finally:
            graph.capture_end()
        return graph

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Cpu:
    """Replays by calling; its clock is the host's."""

    name = "cpu"

    class Graph:
        def __init__(self, launches: Sequence[Launch]) -> None:
            self.launches = launches

        def replay(self) -> None:
            for launch in self.launches:
                launch()

    class Event:
        at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Cpu.Event") -> float:
            return (end.at - self.at) * 1e3

    def on_stream(self) -> Any:
        return nullcontext()

    def handle(self) -> int:
        return 0

    def capture(self, launches: Sequence[Launch]) -> "Cpu.Graph":
        return Cpu.Graph(launches)

    def event(self) -> "Cpu.Event":
        return Cpu.Event()

    def synchronize(self) -> None:
        pass


class Board:
    """What NVML counts, read by a thread of its own inside `with`; by ctypes, since a bare machine has only the driver.

    The counter of energy is renewed ten times a second or a little more often, so power is the difference between two
    renewals by the time between them, never between two readings.
    """

    def __init__(self, uuid: str) -> None:
        self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self.device = ctypes.c_void_p()
        self.call("nvmlInit_v2")
        self.call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.device))
        self.renewals: list[tuple[float, int]] = []  # seconds, millijoules
        self.clocks: list[tuple[float, int, int]] = []  # seconds, MHz of the multiprocessors, reasons
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.nvml, name)(*arguments):
            raise OSError(f"{name}: NVML's error {code}")

    def read(self, name: str, kind: Any, *arguments: Any) -> int:
        value = kind()
        self.call(name, self.device, *arguments, ctypes.byref(value))
        return int(value.value)

    def read_energy(self) -> int:
        return self.read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)

    def read_clock(self) -> tuple[int, int]:
        mhz = self.read("nvmlDeviceGetClockInfo", ctypes.c_uint, CLOCK_SM)
        return mhz, self.read("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong)

    def state(self) -> str:
        """Also whether all can be read."""
        limit = self.read("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint) / 1e3
        celsius = self.read("nvmlDeviceGetTemperature", ctypes.c_uint, TEMPERATURE_GPU)
        told = f"power limit {limit:.0f} W, {celsius} degrees, {self.read_clock()[0]} MHz"
        return f"{told}, {self.read_energy() * 1e-3:.0f} J so far"

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()

    def watch(self) -> None:
        last, polls = self.read_energy(), 0
        while not self.stopping.wait(POLL_SECONDS):
            energy = self.read_energy()
            now = time.perf_counter()
            if energy != last:
                self.renewals.append((now, energy))
                last = energy
            polls += 1
            if polls % POLLS_A_CLOCK == 0:
                self.clocks.append((now, *self.read_clock()))

    def between(self, begin: float, end: float) -> tuple[float, float, float]:
        """-> watts, MHz, share of the readings at which the power cap held the clock; NaN where nothing was read."""
        renewals = [each for each in self.renewals if begin <= each[0] <= end]
        clocks = [each for each in self.clocks if begin <= each[0] <= end]
        watts = mhz = capped = float("nan")
        if len(renewals) > 1:
            (first_at, first), (last_at, last) = renewals[0], renewals[-1]
            watts = (last - first) * 1e-3 / (last_at - first_at)
        if clocks:
            mhz = statistics.fmean(each[1] for each in clocks)
            capped = statistics.fmean(bool(each[2] & POWER_CAPPED) for each in clocks)
        return watts, mhz, capped


@dataclass
class Stretch:
    us: float  # of one unit (a layer, or a product)
    watts: float
    mhz: float
    capped: float


@dataclass
class Contender:
    name: str
    graph: Any
    units: int  # that one replay does
    operands: Any = None  # kept alive
    stretches: list[Stretch] = field(default_factory=list)

    def mean(self, what: str) -> float:
        return statistics.fmean(getattr(each, what) for each in self.stretches)

    def told(self) -> dict[str, Any]:
        us, watts = self.mean("us"), self.mean("watts")
        means = {"us": us, "joules": us * watts * 1e-6, "watts": watts}
        return {"name": self.name, **means, "mhz": self.mean("mhz"), "capped": self.mean("capped"),
                "each_us": [each.us for each in self.stretches]}  # fmt: skip


def time_once(machine: Gpu | Cpu, graph: Any) -> float:
    """Microseconds of one replay."""
    start, end = machine.event(), machine.event()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def sustain(machine: Gpu | Cpu, board: Board | None, contender: Contender, seconds: float) -> Stretch:
    """Replays without a gap for `seconds` beyond the time to settle; what comes before does not count."""
    replays = max(1, round(BATCH_MS * 1e3 / max(1.0, time_once(machine, contender.graph))))
    ahead: deque[Any] = deque()
    settled: Any = None
    begin = time.perf_counter()
    first_at = last_at = begin
    batches = 0
    while True:
        over = time.perf_counter() > begin + SETTLE_SECONDS + seconds
        if not over:
            for _ in range(replays):
                contender.graph.replay()
            ahead.append(machine.event())
            ahead[-1].record()
            if len(ahead) <= MAX_AHEAD:
                continue
        if not ahead:
            break
        last = ahead.popleft()
        last.synchronize()
        last_at = time.perf_counter()
        if settled is not None:
            batches += 1
        elif last_at > begin + SETTLE_SECONDS:
            settled, first_at = last, last_at
    us = float("nan")
    if batches:
        us = float(settled.elapsed_time(last)) * 1e3 / (batches * replays * contender.units)
    watts, mhz, capped = board.between(first_at, last_at) if board else (float("nan"),) * 3
    return Stretch(us, watts, mhz, capped)


def there_and_back(
    machine: Gpu | Cpu, board: Board | None, contenders: Sequence[Contender], seconds: float
) -> list[dict[str, Any]]:
    """Each twice, the second time in reverse order, so that a drift of the temperature counts for all the same.

    The first runs once more before all, unread: a card that comes from rest is ahead of itself.
    """
    sustain(machine, None, contenders[0], seconds)
    for contender in (*contenders, *reversed(contenders)):
        contender.stretches.append(sustain(machine, board, contender, seconds))
    return [contender.told() for contender in contenders]
