"""What the engine's process does before it imports torch."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint

from service.engine import early


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("unfrozen")
def test_nothing_is_collected_while_modules_are_imported() -> None:
    frozen = gc.get_freeze_count()
    with early.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


@pytest.mark.usefixtures("unfrozen")
def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), early.importing():
        raise ImportError
    assert gc.isenabled()


START = """
import sys, time
from service.engine.startup import start
from service.messages import EngineConfig

config = EngineConfig(model_path=sys.argv[1], precision=sys.argv[2], device="cpu", kv_tokens=512)
start(config, lambda _: None, time.monotonic())
heavy = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "scipy", "pandas")
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_start_imports_no_compiler_and_no_library_of_models(tmp_path: Path, precision: str) -> None:
    """Torch's compiler alone takes as long as everything else on the way to ready."""
    make_checkpoint(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    command = [sys.executable, "-c", START, str(tmp_path), precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


class Driver:
    """Stands for libcuda; `broken` is the call that fails."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*_: object) -> int:
            self.called.append(name)
            return 999 if name == self.broken else early.SUCCESS

        return call


def torch_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("torch", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(early, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("broken", "called"),
    [
        ("", ["cuInit", "cuDeviceGet", "cuDeviceGetUuid", "cuDevicePrimaryCtxRetain"]),
        ("cuDeviceGetUuid", ["cuInit", "cuDeviceGet", "cuDeviceGetUuid", "cuDevicePrimaryCtxRetain"]),
        ("cuInit", ["cuInit"]),
    ],
    ids=["there", "without a name", "no device"],
)
def test_a_gpu_is_woken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, called: list[str]
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    torch_in(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")  # else it would be set for the tests behind this one
    driver = Driver(broken)
    monkeypatch.setattr(early.ctypes, "CDLL", lambda name: driver)
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(early, "used_bytes", lambda name: asked.append((name, len(driver.called))) or 7)
    opening = early.wake_gpu()
    assert opening is not None
    opening.join()
    assert driver.called == called
    # asked before there is a context of ours, which would count
    assert asked == ([("GPU-00000000-0000-0000-0000-000000000000", 3)] if not broken else [])
    assert opening.used_before == (7 if not broken else None)


def test_a_machine_without_a_driver_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    monkeypatch.setattr(early.ctypes, "CDLL", missing)
    early.open_first_gpu(lambda name: None)


def test_a_torch_for_the_cpu_leaves_the_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_in(tmp_path, monkeypatch)
    assert early.wake_gpu() is None
