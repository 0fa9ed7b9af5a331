"""What this process holds, as the kernel counts it: for tests that nothing is left behind."""

import asyncio
import os
import re
import threading
from pathlib import Path


def held() -> dict[str, int]:
    """Children, descriptors (sockets among them), threads and, inside an event loop, tasks."""
    return {
        "processes": len(children(os.getpid())),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


def children(process_id: int) -> list[int]:
    """Processes that it has started and that are not gone, those that nobody has waited for among them."""
    found = []
    for thread in Path(f"/proc/{process_id}/task").iterdir():
        found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def anonymous_bytes(process_id: int) -> int:
    """Memory of its own, in RAM and in swap; files that are mapped do not count."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE))
