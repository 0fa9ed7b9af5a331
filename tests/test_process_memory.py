"""Figures of /proc and the C library follow what a process does; made-up files for what no test can do."""

import ctypes
import mmap
from pathlib import Path

import pytest

from service import process_memory

MIB = 1 << 20


def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks of 64 KiB come from the heap; one behind them keeps it from shrinking."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    blocks = [libc.malloc(64 << 10) for _ in range(320)]
    for block in blocks:
        libc.memset(block, 1, 64 << 10)
    last = libc.malloc(64 << 10)
    before = process_memory.held_bytes()
    for block in blocks:
        libc.free(block)
    assert before - process_memory.held_bytes() < 2 * MIB
    process_memory.give_back()
    assert before - process_memory.held_bytes() > 18 * MIB
    libc.free(last)


def test_swapped_pages_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("VmHWM:\t    9000 kB\nVmRSS:\t    7000 kB\nVmSwap:\t     500 kB\n")
    monkeypatch.setattr(process_memory, "STATUS", status)
    assert process_memory.held_bytes() == 7500 * 1024
    assert process_memory.peak_bytes() == 9000 * 1024


def test_a_system_without_proc_tells_its_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "STATUS", tmp_path / "none")
    assert process_memory.held_bytes() == process_memory.peak_bytes() > MIB


def test_a_container_s_limit_bounds_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "CGROUP", tmp_path)
    for name, text in (
        ("memory.max", "3000000"),
        ("memory.current", "2500000"),
        ("memory.stat", "anon 1\ninactive_file 400000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert process_memory.total_bytes() == 3_000_000
    assert process_memory.free_bytes() == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert process_memory.total_bytes() > 3_000_000


def test_a_mapping_is_held_once_it_is_touched() -> None:
    before = process_memory.held_bytes()
    with mmap.mmap(-1, 64 * MIB) as pages:
        pages.write(b"x" * (64 * MIB))
        assert process_memory.held_bytes() - before > 60 * MIB
