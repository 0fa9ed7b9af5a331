"""What this process holds, as the kernel counts it: for tests that nothing is left behind."""

import asyncio
import contextlib
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


def descendants(process_id: int) -> list[int]:
    """Its children and theirs; of those that end meanwhile perhaps none."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in children(process_id):
            found += [child, *descendants(child)]
    return found


def device_bytes(device_uuid: str) -> int | None:
    """Of a GPU's memory, what this process, which has a context there, and its descendants hold.

    None where NVML does not tell: no memory of a process, or processes by other numbers than a container's.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device_uuid)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    bytes_of = {process.pid: process.usedGpuMemory for process in running}
    ours = [bytes_of[pid] for pid in (os.getpid(), *descendants(os.getpid())) if pid in bytes_of]
    return sum(ours) if os.getpid() in bytes_of and None not in ours else None


def anonymous_bytes(process_id: int) -> int:
    """Memory of its own, in RAM and in swap; files that are mapped do not count."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE))
