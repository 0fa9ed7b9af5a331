"""From the command to an answered /ready, stage by stage.

    python tests/benchmarks/start_to_ready.py [--runs 3] [--first-ever] MODEL [flags of halftone serve ...]

Each run is a server of its own, on a free port. `front` is the time until the engine's process exists; then
come the engine's own stages, as /version tells them; `rest` is what they do not explain: its interpreter's
start before them, the ready message and the first GET behind them. Medians of the runs, the first apart,
whose files may still be on their way from the disk. `--first-ever` gives each run empty kernel caches.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
READY = re.compile(r"is ready at (http\S+)")


def started_s(pid: int) -> float:
    """When a process began, in seconds since boot, to a hundredth."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) * TICK_S


def start(arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """One server's stages in seconds, in their order, and `total`."""
    command = [sys.executable, "-m", "service", "serve", *arguments, "--port", "0"]
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        assert server.stdout is not None
        found = next(filter(None, map(READY.search, server.stdout)), None)
        if found is None:
            log.seek(0)
            sys.exit(log.read())
        urllib.request.urlopen(f"{found[1]}/ready").close()
        total = time.monotonic() - began
        [child] = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        front = started_s(int(child)) - started_s(server.pid)
        with urllib.request.urlopen(f"{found[1]}/version") as answer:
            stages = json.load(answer)["engine"]["load_seconds"]
        server.terminate()
        server.communicate()
    return {"front": front, **stages, "rest": total - front - sum(stages.values()), "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--first-ever", action="store_true", help="empty caches of Triton and the driver")
    options, arguments = parser.parse_known_args()
    runs = []
    for number in range(options.runs):
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "CUDA_CACHE_PATH": f"{empty}/cuda"}
            runs.append(start(arguments, {**os.environ, **(caches if options.first_ever else {})}))
        print(f"run {number + 1}: {runs[-1]['total']:.2f} s", flush=True)
    later = runs[1:] or runs
    print(f"\n| seconds | first | median of {len(later)} |\n|---|---|---|")
    for stage in runs[0]:
        print(f"| {stage} | {runs[0][stage]:.2f} | {statistics.median(run[stage] for run in later):.2f} |")


if __name__ == "__main__":
    main()
