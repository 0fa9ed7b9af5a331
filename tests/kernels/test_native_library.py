"""The prebuilt library is that of the sources, its pool runs each tile once, and its absence is told."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.engine.startup import choose_kernels
from service.errors import SettingError
from service.kernels import native
from service.kernels.native import Library
from service.kernels.native import build as native_build
from service.messages import EngineConfig

LIBRARY = native.load()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=native.absence())


@pytest.fixture
def library() -> Iterator[Library]:
    """With three threads, whatever the machine has."""
    assert LIBRARY is not None
    LIBRARY.set_threads(3)
    yield LIBRARY
    LIBRARY.set_threads(torch.get_num_threads())


def count(library: Library, tiles: int, rounds: int = 1) -> list[int]:
    counts = (ctypes.c_int64 * max(tiles, 1))()
    function = library.function("halftone_count_tiles", [ctypes.c_void_p, ctypes.c_int64])
    for _ in range(rounds):
        function(ctypes.addressof(counts), tiles)
    return list(counts)[:tiles]


def test_the_library_is_built_from_these_sources() -> None:
    """Read from the file, so that systems which cannot load it notice a forgotten build too."""
    assert native_build.sources_sha256().encode() in native.FILE.read_bytes(), (
        "`python -m service.kernels.native.build`, and commit it"
    )


def test_the_library_is_small_and_needs_no_other() -> None:
    data = native.FILE.read_bytes()
    assert len(data) < 200_000
    assert b".so." not in data, "a name of a library that it would be linked with"
    assert str(native.FILE.parent).encode() not in data


@pytest.mark.skipif(native_build.compiler() is None, reason="no compiler")
def test_the_library_can_be_built(tmp_path: Path) -> None:
    """With warnings as errors; the bytes depend on the compiler's version."""
    native_build.build(tmp_path / "again.so")
    built = native.FILE.read_bytes()
    again = (tmp_path / "again.so").read_bytes()
    assert native_build.sources_sha256().encode() in again
    assert len(again) < 2 * len(built)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 64, 1001])
def test_each_tile_runs_once(library: Library, threads: int, tiles: int) -> None:
    library.set_threads(threads)
    assert count(library, tiles, rounds=50) == [50] * tiles


@needs_library
def test_many_short_jobs(library: Library) -> None:
    """Workers enter and leave while the next job is being opened; one that sees a stale job counts twice."""
    assert count(library, 4, rounds=5_000) == [5_000] * 4


@needs_library
def test_two_callers_at_once(library: Library) -> None:
    """The one that finds the pool taken works alone."""
    unlocked = ctypes.CDLL(str(native.FILE)).halftone_count_tiles
    unlocked.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    counts = [(ctypes.c_int64 * 100)() for _ in range(3)]

    def call(mine: ctypes.Array[ctypes.c_int64]) -> None:
        for _ in range(500):
            unlocked(ctypes.addressof(mine), 100)

    callers = [threading.Thread(target=call, args=(mine,)) for mine in counts]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [list(mine) for mine in counts] == [[500] * 100] * 3


@needs_library
def test_a_forked_child_works_alone(library: Library) -> None:
    count(library, 10)
    child = os.fork()
    if child == 0:
        os._exit(0 if count(library, 10, rounds=3) == [3] * 10 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert count(library, 10) == [1] * 10


@needs_library
def test_the_interpreter_ends_while_workers_wait() -> None:
    program = (
        "from service.kernels import native; library = native.load(); library.set_threads(4);"
        "import ctypes; counts = (ctypes.c_int64 * 9)();"
        "count = library.function('halftone_count_tiles', [ctypes.c_void_p, ctypes.c_int64]);"
        "count(ctypes.addressof(counts), 9);"
        "print(sum(counts))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "9\n", "")


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice, and what was found, are put back."""
    for name in ("choice", "library", "reason"):
        monkeypatch.setattr(native._State, name, getattr(native._State, name))


@pytest.mark.usefixtures("unchosen")
@pytest.mark.parametrize("choice", ["auto", "torch", "native"])
def test_an_engine_without_the_library_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: native.Choice
) -> None:
    """Once, and not where torch was asked for."""
    monkeypatch.setattr(native._State, "library", None)
    monkeypatch.setattr(native._State, "reason", "this CPU is another")
    config = EngineConfig(model_path="/nowhere", precision="bf16", cpu_kernels=choice)
    if choice == "native":
        with pytest.raises(SettingError, match="this CPU is another"):
            choose_kernels(config)
    else:
        choose_kernels(config)
    assert ("this CPU is another" in caplog.text) == (choice == "auto")


@pytest.mark.usefixtures("unchosen")
def test_torch_can_be_chosen() -> None:
    native.choose("torch")
    assert native.load() is None
    assert native.absence() == "`cpu_kernels` is `torch`"


@pytest.mark.usefixtures("unchosen")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("platform.machine", lambda: "aarch64", "on aarch64"),
        ("FILE", Path("/nowhere.so"), "cannot be loaded"),
        ("Library.cpu", 0, "need AVX512"),
    ],
)
def test_a_missing_library_is_told(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str
) -> None:
    monkeypatch.setattr(native._State, "library", None)
    monkeypatch.setattr(native._State, "reason", None)
    monkeypatch.setattr(f"service.kernels.native.{name}", value)
    native.choose("auto")
    assert native.load() is None
    assert reason in native.absence()
    with pytest.raises(SettingError, match=reason):
        native.choose("native")
