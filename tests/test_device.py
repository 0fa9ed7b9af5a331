"""Choice of the device, and the CPU's memory figures; CUDA is imitated, to see which error is told."""

import mmap
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from service import device
from service.cores import physical_cores
from service.errors import DeviceError

VERSION_FILES = {
    "closed": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n",
    "open": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build\n",
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a driver; writing the file adds one."""
    path = tmp_path / "version"
    monkeypatch.setattr(device, "DRIVER_VERSION", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return path


def test_cpu_is_the_cpu() -> None:
    assert device.resolve("cpu") == torch.device("cpu")


@pytest.mark.parametrize("build", [None, "13.0"])
def test_auto_without_a_driver_is_the_cpu(
    driver: Path, monkeypatch: pytest.MonkeyPatch, build: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    assert device.resolve("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="cuda"):
        device.resolve("cuda")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
@pytest.mark.parametrize("kind", VERSION_FILES)
def test_driver_that_torch_cannot_use(
    driver: Path, monkeypatch: pytest.MonkeyPatch, asked: str, kind: str
) -> None:
    """Never a silent CPU run: the error names the driver found and the one needed."""
    driver.write_text(VERSION_FILES[kind])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError) as caught:
        device.resolve(asked)  # type: ignore[arg-type]
    assert "535.129.03" in caught.value.message
    assert "580.65" in caught.value.message
    assert "--device cpu" in caught.value.hint


def test_cpu_build_beside_a_driver(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU-only torch was installed on purpose, so `auto` takes it; `cuda` cannot."""
    driver.write_text(VERSION_FILES["closed"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.resolve("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"535\.129\.03") as caught:
        device.resolve("cuda")
    assert "TORCH=cpu" in caught.value.hint


def test_cpu_memory_follows_an_allocation() -> None:
    """A mapping of its own: a tensor may be cut from memory that the allocator kept resident after others."""
    cpu = torch.device("cpu")
    before = device.memory_used_bytes(cpu)
    size = 64 << 20
    with mmap.mmap(-1, size) as block:
        block[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)  # a page is resident once it is written
        assert device.memory_used_bytes(cpu) - before > 0.9 * size
    assert device.memory_peak_bytes(cpu) - before > 0.9 * size
    assert device.memory_used_bytes(cpu) - before < 0.5 * size
    if device.reset_memory_peak(cpu):
        assert device.memory_peak_bytes(cpu) - before < 0.5 * size
    assert 0 < device.memory_free_bytes(cpu) <= device.memory_total_bytes(cpu)


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert device.set_threads(1) == 1 == torch.get_num_threads()
        assert device.set_threads(0) == physical_cores()
    finally:
        torch.set_num_threads(before)


def test_cpu_has_a_name_and_defaults() -> None:
    cpu = torch.device("cpu")
    assert device.device_name(cpu)
    assert device.batch_defaults(cpu).max_batch_tokens >= device.batch_defaults(cpu).max_batch_requests
    device.synchronize(cpu)


def test_nothing_to_read_back_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk in the middle of a prompt has no result: unless the host waits for it all the same, it gives
    the device a whole long prompt at once, and whoever comes next waits behind all of it."""
    waited: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking, "a waiting thread would spin"

        def record(self) -> None:
            waited.append("recorded")

        def synchronize(self) -> None:
            waited.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert device.Readback([], torch.device("cuda")).wait() == []
    assert waited == ["recorded", "waited"]
    assert device.Readback([], torch.device("cpu")).wait() == []
    assert len(waited) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_work_runs_once_before_it_is_captured(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """What fails while capturing is told as it is, and the capture is ended all the same."""
    done: list[str] = []

    class Graph:
        def capture_begin(self, **_: object) -> None:
            done.append("begin")

        def capture_end(self) -> None:
            done.append("end")
            if fails:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self) -> None:
            done.append("replay")

    def run() -> torch.Tensor:
        done.append("run")
        if fails and "begin" in done:
            raise ValueError("a kernel asks the host")
        return torch.ones(1)

    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    torch.cuda.stream.return_value.__exit__.return_value = False
    pool = device.GraphPool()
    if fails:
        with pytest.raises(ValueError, match="asks the host"):
            pool.capture(run)
        assert done == ["run", "begin", "run", "end"]
    else:
        assert pool.capture(run).replay() == torch.ones(1)
        assert done == ["run", "begin", "run", "end", "replay"]
        done.clear()
        pool.capture(run, is_known=True)
        assert done == ["begin", "run", "end"]
