"""What the system says of this process's memory and of the machine's: /proc, cgroup v2 and the C library.

device --on a CPU--> these. A figure that a system does not tell is 0.
"""

import ctypes
import os
import re
import resource
import sys
from functools import cache
from pathlib import Path

STATUS, MEMINFO, CGROUP = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def total_bytes() -> int:
    """What the machine has, or the container may use."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, _cgroup_bytes("memory.max") or physical)


def free_bytes() -> int:
    """What could still be taken, by anyone: reclaimable page cache counts as free."""
    free = _field_bytes(MEMINFO, "MemAvailable")
    if not free:  # macOS tells no such figure
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit, current = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit and current:
        free = min(free, limit - current + _reclaimable_bytes())
    return max(free, 0)


def held_bytes() -> int:
    """Pages of this process, resident or swapped out."""
    resident = _field_bytes(STATUS, "VmRSS")
    return resident + _field_bytes(STATUS, "VmSwap") if resident else _peak_resident_bytes()


def peak_bytes() -> int:
    """Most pages that were resident since `begin_peak`, or since the process started."""
    return _field_bytes(STATUS, "VmHWM") or _peak_resident_bytes()


def begin_peak() -> bool:
    """A new peak begins with what is resident now; False where the system has no way to."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """What was freed to the C library goes back to the system, where it is glibc."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _field_bytes(path: Path, field: str) -> int:
    """A `Name:  123 kB` line of /proc, 0 where there is none."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cgroup_bytes(name: str) -> int:
    """A limit of the container (cgroup v2), 0 for none."""
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _reclaimable_bytes() -> int:
    try:
        text = (CGROUP / "memory.stat").read_text()
    except OSError:
        return 0
    found = re.search(r"^inactive_file (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
