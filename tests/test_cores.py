"""How many cores are counted: hyperthreads once, a container's quota respected, on Linux and elsewhere."""

import os
from pathlib import Path

import pytest

from service import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four hyperthreads of two cores, and no quota."""
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return tmp_path


def test_hyperthreads_count_once(machine: Path) -> None:
    assert cores.physical_cores() == 2
    (machine / "cpu3" / "topology" / "thread_siblings_list").unlink()
    assert cores.physical_cores() == 3, "one whose sibling is not known counts by itself"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("800000 100000", 2)],
)
def test_a_quota_bounds_them(machine: Path, quota: str, expected: int) -> None:
    (machine / "cpu.max").write_text(f"{quota}\n")
    assert cores.physical_cores() == expected


def test_systems_without_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The front counted by Linux's call alone, and could not start an engine on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(cores, "_mac_cores", lambda: 8)
    assert cores.physical_cores() == 8
