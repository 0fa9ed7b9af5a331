"""What a process and those that it has started hold: counted over a driver's library that is made up."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

from tests.held_resources import descendants, device_bytes

UUID = "GPU-5f0e3a1c-0000-4444-8888-123456789abc"
WAITS = "import sys; print('begun', flush=True); sys.stdin.read()"
HAS_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}], check=True)"
NOBODY = 1 << 30  # no process has this number


class FakeNVML(ModuleType):
    """pynvml as far as it is called; `running` is process -> bytes, or None where they are not told."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.running: dict[int, int | None] | None = {}
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == UUID
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        assert handle == "handle"
        if self.running is None:
            raise self.NVMLError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.running.items()]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def family() -> Iterator[list[int]]:
    """A child of this process and a child of that."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HAS_A_CHILD], stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield [child.pid, *descendants(child.pid)]
        child.communicate()


def test_children_and_theirs_count_and_nobody_else(nvml: FakeNVML, family: list[int]) -> None:
    assert len(family) == 2
    assert set(family) <= set(descendants(os.getpid()))  # other tests may have left it a child
    nvml.running = {os.getpid(): 1, family[0]: 20, family[1]: 300, NOBODY: 4000}
    assert device_bytes(UUID) == 321
    del nvml.running[family[0]]  # which has no context
    assert device_bytes(UUID) == 301
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    "running",
    [None, {NOBODY: 1}, {os.getpid(): None}],
    ids=["not supported", "numbers of another namespace", "no memory of a process"],
)
def test_what_nvml_does_not_tell(nvml: FakeNVML, running: dict[int, int | None] | None) -> None:
    nvml.running = running
    assert device_bytes(UUID) is None
    assert nvml.num_open == 0


def test_a_process_that_is_gone_has_no_descendants() -> None:
    assert descendants(NOBODY) == []
