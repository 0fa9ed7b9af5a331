"""The place where CPU and CUDA differ for everything but kernels: choice, memory, threads, waiting.

Kernels differ by torch's dispatcher; no other module asks which device it is on.
"""

import platform
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service import process_memory
from service.cores import physical_cores
from service.errors import DeviceError

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE_BYTES = 64 << 20
T = TypeVar("T")
TIMING_WARMUPS = 3
CPU_TIMING_S = 1.0  # of one figure
# CUDA version of torch -> oldest driver that runs it (NVIDIA's CUDA compatibility table, Linux)
OLDEST_DRIVER = {"11": "450.80", "12": "525.60", "13": "580.65"}


@dataclass(frozen=True)
class BatchDefaults:
    """What a step may hold where the user did not say."""

    max_batch_tokens: int
    max_batch_requests: int
    # of max_batch_tokens, while few decode: of 16-bit weights, and of codes that become 16-bit numbers.
    # Products of 8-bit numbers take half the time, and have all of it.
    few_share: float = 1.0
    few_share_decoded: float = 1.0
    crowd_factor: int = 1  # likewise, while a crowd waits: engine/scheduler


def resolve(asked: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """`auto`: CUDA where there is an NVIDIA driver, else the CPU. A GPU that torch cannot use is an error.

    A CPU-only build of torch was asked for (`make install TORCH=cpu`), so `auto` respects it.
    """
    if asked == "cpu":
        return torch.device("cpu")
    driver = nvidia_driver()
    if torch.version.cuda is None:
        if asked == "cuda":
            raise DeviceError(
                f"device `cuda`: this torch ({torch.__version__}) is built for the CPU only; "
                f"NVIDIA driver found: {driver or 'none'}",
                hint="`make install` without TORCH=cpu, or serve with `--device cpu`",
            )
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if driver is None:
        if asked == "cuda":
            raise DeviceError(
                "device `cuda`: no NVIDIA driver found",
                hint="install the driver, or serve with `--device cpu`",
            )
        return torch.device("cpu")
    needed = OLDEST_DRIVER.get(torch.version.cuda.partition(".")[0], "a newer one")
    raise DeviceError(
        f"device `{asked}`: torch {torch.__version__} cannot use the NVIDIA GPU: driver found {driver}, "
        f"needed {needed} or newer for CUDA {torch.version.cuda}",
        hint="update the driver, install a torch built for an older CUDA, or ask for `--device cpu`",
    )


def nvidia_driver() -> str | None:
    """Version of the kernel's NVIDIA driver, or None."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER_VERSION.read_text())
    except OSError:
        return None
    return found[1] if found else "of unknown version"


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_uuid(device: torch.device) -> str:
    """NVML's name of the device, the same whatever CUDA_VISIBLE_DEVICES says; empty for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def batch_defaults(device: torch.device) -> BatchDefaults:
    """A step stays short enough for the others to stream on; a GPU needs a wide one to be busy.

    What decodes in a step with prompts costs next to nothing, where a decode alone reads all weights. So of
    16-bit weights shorter and more steps make as many tokens a second. Codes are read in a third of that time
    or less: of them such steps make fewer, by a simulation (docs/experiments.md, section 5).
    """
    if device.type != "cuda":
        return BatchDefaults(512, 64)
    return BatchDefaults(1024, 256, few_share=0.5, few_share_decoded=0.75, crowd_factor=2)


def runs_behind(device: torch.device) -> bool:
    """Does the host go on while the device computes?"""
    return device.type == "cuda"


def has_e4m3(device: torch.device) -> bool:
    """Does it convert to and from 8-bit floats of this format? A CPU does, in torch."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def synchronize(device: torch.device) -> None:
    """Return when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_cached(device: torch.device) -> None:
    """Give the device back what the allocator keeps of tensors that have ended."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        process_memory.give_back()


# --- copies that nobody waits for --------------------------------------------------------------


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A host array on the device, behind the work that was given to it before."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    # from pageable memory the copy would begin with waiting for all earlier work
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_into(array: npt.NDArray[np.generic], target: Tensor) -> None:
    """As `upload`, into a tensor that stays where it is."""
    tensor = torch.from_numpy(array)
    target.copy_(tensor.pin_memory() if target.device.type == "cuda" else tensor, non_blocking=True)


class Readback:
    """Tensors on their way to the host; work that is given to the device later may overwrite them."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensors = [tensor.clone() for tensor in tensors]
            return
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event(blocking=True)  # else the waiting thread spins on a core
        self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in their order, once the device is done with all work given before."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


# --- captured work -----------------------------------------------------------------------------


class Captured:
    """Work that the device repeats by itself, on the tensors that it was captured with."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self._graph = graph
        self._result = result

    def replay(self) -> Tensor:
        """-> the same tensor each time, with new contents once the device is done."""
        self._graph.replay()
        return self._result


class GraphPool:
    """Captures work; all that it has captured shares memory, so one of them may run at a time."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._first: torch.cuda.CUDAGraph | None = None  # torch gives up a pool whose graphs are all gone
        self._stream = torch.cuda.Stream()

    def capture(self, run: Callable[[], Tensor], *, is_known: bool = False) -> Captured:
        """Runs it once, so that its kernels are compiled and loaded, then captures it; `is_known`: they are.

        `torch.cuda.graph` would collect garbage and empty the allocator's cache around each capture.
        """
        if not is_known:
            run()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            self._first = self._first or graph
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # says only that something failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return Captured(graph, result)


# --- timing ------------------------------------------------------------------------------------


def graph_pool(device: torch.device) -> GraphPool | None:
    """None where nothing is captured."""
    return GraphPool() if device.type == "cuda" else None


def median_s(
    device: torch.device, run: Callable[[], Tensor], repeats: int, pool: GraphPool | None = None
) -> float:
    """Seconds of `run`, the median of `repeats` by the device's own clock; on a GPU as one CUDA graph, where
    there is a `pool`. A CPU that is slow at it ends after CPU_TIMING_S."""
    run()
    times: list[float] = []
    if device.type != "cuda":
        begun = time.perf_counter()
        while len(times) < repeats and (len(times) < 3 or time.perf_counter() - begun < CPU_TIMING_S):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    go = pool.capture(run, is_known=True).replay if pool else run
    for _ in range(TIMING_WARMUPS):
        go()
    for _ in range(repeats):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        go()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) * 1e-3)
    return statistics.median(times)


# --- memory ------------------------------------------------------------------------------------


def last_cache_bytes(device: torch.device) -> int:
    """Of the largest cache before memory; where a system does not tell, what large ones have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [_cache_bytes(path) for path in CPU_CACHES.glob("index*/size")]
    return max(found, default=0) or UNKNOWN_CACHE_BYTES


def _cache_bytes(path: Path) -> int:
    """A size such as `32768K`, 0 where it is none."""
    try:
        found = re.fullmatch(r"(\d+)([KM])\s*", path.read_text())
    except OSError:
        return 0
    return int(found[1]) << {"K": 10, "M": 20}[found[2]] if found else 0


def memory_total_bytes(device: torch.device) -> int:
    """What the device has, or the container may use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return process_memory.total_bytes()


def memory_free_bytes(device: torch.device) -> int:
    """What could still be taken, by anyone: reclaimable page cache counts as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return process_memory.free_bytes()


def memory_taken_bytes(device: torch.device) -> int:
    """What all processes hold."""
    return memory_total_bytes(device) - memory_free_bytes(device)


def memory_used_bytes(device: torch.device) -> int:
    """What this process holds: the allocator's reserve on CUDA, all pages on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return process_memory.held_bytes()


def memory_kept_bytes(device: torch.device) -> int:
    """Of that, what the allocator keeps of tensors that have ended; a CPU's does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device)) - int(torch.cuda.memory_allocated(device))
    return 0


def memory_peak_bytes(device: torch.device) -> int:
    """Most that this process held since `reset_memory_peak`, or since it started where that cannot be."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return process_memory.peak_bytes()


def extra_bytes(device: torch.device, run: Callable[[], T]) -> tuple[T, int]:
    """`run`'s result, and most bytes of tensors that it held on a GPU beside those held before; 0 on a CPU,
    whose heap is not torch's alone. Begins a new peak."""
    reset_memory_peak(device)
    if device.type != "cuda":
        return run(), 0
    before = torch.cuda.memory_allocated(device)
    return run(), int(torch.cuda.max_memory_allocated(device)) - before


def reset_memory_peak(device: torch.device) -> bool:
    """Start a new peak from what is held now; False where the system has no way to."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return process_memory.begin_peak()


# --- threads -----------------------------------------------------------------------------------


def set_threads(num_threads: int) -> int:
    """Use this many CPU threads (0: one a physical core) from now on; returns how many.

    OpenMP reads GOMP_SPINCOUNT when torch is imported, too early for this function: whoever starts the
    process puts it into the environment, for waiting threads spin by default and starve the working ones.
    """
    num_threads = num_threads or physical_cores()
    torch.set_num_threads(num_threads)
    return num_threads
