"""How many threads a process should have here. No torch: the front asks before it starts the engine."""

import os
import subprocess
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """Cores this process may run on, hyperthreads counted once, a container's quota respected."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not allowed:
        return _mac_cores() or os.cpu_count() or 1
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add((TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, min(len(siblings), _quota_cores() or len(siblings)))


def _mac_cores() -> int:
    command = ["sysctl", "-n", "hw.physicalcpu"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _quota_cores() -> int:
    """Whole cores of the container's CPU quota, 0 for none."""
    try:
        quota, period = QUOTA.read_text().split()
    except (OSError, ValueError):
        return 0
    return 0 if quota == "max" else max(1, int(quota) // int(period))
