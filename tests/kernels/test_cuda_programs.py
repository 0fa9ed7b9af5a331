"""CUDA C++ at run time: where the compiler is found, what a cubin's name depends on, what a launch tells."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from service.errors import DeviceError
from service.kernels import cuda
from service.kernels.cuda import Program, cubins, driver, nvrtc

KERNEL = 'extern "C" __global__ void twice(float* y) { *y *= FACTOR; }\n'


class Compiler:
    """Stands for NVRTC."""

    version = (13, 0)

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], list[str]]] = []
        self.before: Callable[[], object] = lambda: None

    def compile(self, name: str, source: str, headers: dict[str, str], options: list[str]) -> bytes:
        self.before()
        self.asked.append((name, source, headers, options))
        return f"code {len(self.asked)}".encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(cubins, "compiler", lambda: found)
    monkeypatch.setattr(cubins._State, "folder", tmp_path / "cache")
    monkeypatch.setattr(cubins._State, "cubins", {})
    return found


@pytest.fixture
def program(tmp_path: Path) -> Program:
    source = tmp_path / "sources" / "twice.cu"
    source.parent.mkdir()
    source.write_text(KERNEL)
    (source.parent / "machine.h").write_text("// a header\n")
    return Program(source, "twice", (("FACTOR", 2),))


def test_a_program_is_compiled_once(compiler: Compiler, program: Program) -> None:
    assert cubins.cubin(program) == cubins.cubin(program) == b"code 1"
    ((name, source, headers, options),) = compiler.asked
    assert (name, source) == ("twice FACTOR=2", KERNEL)
    shared = {path.name for path in cubins.SHARED_HEADERS.glob("*.h")}
    assert set(headers) == {"stdint.h", "machine.h", *shared}
    assert options == ["--gpu-architecture=sm_90a", "--std=c++17", "-DFACTOR=2"]


def test_the_next_process_finds_it_on_disk(
    compiler: Compiler, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubins.cubin(program)
    (file,) = cubins.folder().iterdir()
    assert file.name == f"{program.key((13, 0))}.cubin"
    monkeypatch.setattr(cubins._State, "cubins", {})
    assert cubins.cubin(program) == b"code 1"
    assert len(compiler.asked) == 1


def test_threads_that_want_the_same_wait_for_one(compiler: Compiler, program: Program) -> None:
    both = Barrier(2, timeout=10)
    other = Program(program.source, "twice", (("FACTOR", 3),))
    compiler.before = both.wait  # two programs at once, or nobody goes on
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(cubins.cubin, [program, other, program, other]))
    assert len(compiler.asked) == 2
    assert codes[:2] == codes[2:]


def test_its_key_is_all_that_goes_in(program: Program) -> None:
    def again(**changes: Any) -> str:
        told = {"source": program.source, "kernel": "twice", "definitions": (("FACTOR", 2),)} | changes
        return Program(**told).key((13, 0))

    keys = [again(), again(definitions=(("FACTOR", 3),)), program.key((12, 9))]
    (program.source.parent / "machine.h").write_text("// another header\n")
    keys.append(again())
    program.source.write_text(KERNEL + "\n")
    keys.append(again())
    assert len(set(keys)) == 5
    assert again() == again()


def test_a_folder_that_cannot_be_written_costs_time_alone(
    compiler: Compiler, program: Program, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert cubins.cubin(program) == b"code 1"
    assert "compiled at every start" in caplog.text


def test_a_file_that_cannot_be_read_is_compiled_again(
    compiler: Compiler, program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that another user's server has left in a shared folder; a folder stands for it."""
    (cubins.folder() / f"{program.key((13, 0))}.cubin").mkdir(parents=True)
    assert cubins.cubin(program) == b"code 1"
    assert "cannot be read" in caplog.text


def test_a_program_that_fails_fails_for_all(compiler: Compiler, program: Program) -> None:
    def fail() -> None:
        raise DeviceError("CUDA kernel `twice` does not compile")

    compiler.before = fail
    for _ in range(2):
        with pytest.raises(DeviceError, match="does not compile"):
            cubins.cubin(program)
    assert not cubins.folder().exists()


def test_where_wheels_put_the_compiler(tmp_path: Path) -> None:
    for name in (
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "nvidia/cu13/lib/libnvrtc.so.13",
        "nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
        "nvidia/cu13/lib/libnvrtc.alt.so.13",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in nvrtc.candidates([str(tmp_path)])] == ["libnvrtc.so.13", "libnvrtc.so.12"]


def test_without_a_gpu_there_is_a_reason() -> None:
    assert torch.cuda.is_available() or cuda.absence() == "there is no CUDA device"


class Library:
    """libcuda as far as a launch asks it; what it is given is copied, as the driver does."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.launches: list[tuple[Any, ...]] = []

    def launch(self, config: int, handle: Any, arguments: int, extra: None) -> int:
        told = driver.Config.from_address(config)
        first, second = (ctypes.c_void_p * 2).from_address(arguments)
        values = ctypes.c_int.from_address(first or 0).value, ctypes.c_float.from_address(second or 0).value
        attributes = [
            (told.attributes[i].id, told.attributes[i].value[0]) for i in range(told.num_attributes)
        ]
        self.launches.append((told.grid_x, told.block_x, told.shared_bytes, told.stream, values, attributes))
        return self.code

    def check(self, what: str, code: int) -> None:
        raise DeviceError(f"{what}: {code}")


class Loaded:
    """A kernel that no driver has loaded."""

    name, threads, handle = "twice", 96, ctypes.c_void_p(7)


@pytest.mark.parametrize("dependent", [False, True])
def test_a_launch_tells_what_its_arguments_are_now(monkeypatch: pytest.MonkeyPatch, dependent: bool) -> None:
    library = Library()
    monkeypatch.setattr(driver, "driver", lambda: library)
    number, factor = ctypes.c_int(1), ctypes.c_float(0.5)
    launch = driver.Launch(Loaded(), [number, factor], dependent=dependent)  # type: ignore[arg-type]
    launch(3, 1024, 40)
    number.value = 9
    launch.replace(1, ctypes.c_float(2.5))
    launch(5, 2048, 41)
    attributes = [(6, 1)] if dependent else []
    assert library.launches == [
        (3, 96, 1024, 40, (1, 0.5), attributes),
        (5, 96, 2048, 41, (9, 2.5), attributes),
    ]


def test_a_refused_launch_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(code=700)
    monkeypatch.setattr(driver, "driver", lambda: library)
    launch = driver.Launch(Loaded(), [ctypes.c_int(), ctypes.c_float()], dependent=False)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="twice: 700"):
        launch(1, 0, 0)


def test_structures_are_as_large_as_the_driver_s() -> None:
    """Of cuda.h: CUlaunchAttribute 72, CUlaunchConfig 56, CUtensorMap 128 bytes."""
    assert [ctypes.sizeof(kind) for kind in (driver.Attribute, driver.Config, driver.TensorMap)] == [
        72,
        56,
        128,
    ]
