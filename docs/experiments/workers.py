"""Tasks on a device that one of them may take away: a worker process does them, and a next one goes on behind what failed.

tasks.json --work--> a line of results.jsonl a task; supervise starts workers until every task has one, or time is over
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SILENT_SECONDS = 40  # of a worker, before it counts as hung
FATAL = (
    "cuda error",
    "illegal",
    "launch failure",
    "trap",
    "unspecified",
    "misaligned",
    "uncorrectable",
    "instruction",
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(folder: Path, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Tasks of tasks.json that no line of results.jsonl tells of, in order."""
    tasks = json.loads((folder / "tasks.json").read_text())
    results = folder / "results.jsonl"
    done = {line["task"] for line in read_lines(results)}
    with results.open("a") as out:
        for number, task in enumerate(tasks):
            if number in done:
                continue
            (folder / "now").write_text(str(number))
            try:
                line = run(task)
            except Exception as error:
                line = {"failed": f"{type(error).__name__}: {error}"[:160]}
            print(json.dumps({"task": number, **line}), file=out, flush=True)
            if any(word in line.get("failed", "").lower() for word in FATAL):
                sys.exit(3)  # the context is lost; the next process goes on


def measure(
    script: Path,
    folder: Path,
    tasks: list[dict[str, Any]],
    compile_all: Callable[[Path, int], dict[str, str]],
    seconds: float,
    kind: Callable[[dict[str, Any]], Any] | None = None,
) -> str:
    """Compiles into `folder`, has `script` work on the tasks for what is left of `seconds`. -> what machine that was.

    `compile_all`: folder and number of compilers at once -> the complaint about each variant that has one. `kind`: as for
    `supervise`.
    """
    start = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").unlink(missing_ok=True)
    (folder / "tasks.json").write_text(json.dumps(tasks))
    for name, complaint in compile_all(folder, os.cpu_count() or 1).items():
        print(f"{name}: {complaint}")
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    supervise(script, folder, start + seconds, kind)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.sm", "--format=csv,noheader"]
    machine = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(machine, f"{time.time() - start:.0f} s in all")
    return machine


def supervise(
    script: Path, folder: Path, deadline: float, kind: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """Workers (`script --work`) until every task has its line or the time is over.

    A task that took its worker down fails, and with it all others of the same `kind`; None: of its own alone.
    """
    tasks, results = json.loads((folder / "tasks.json").read_text()), folder / "results.jsonl"
    kinds = [kind(task) if kind else number for number, task in enumerate(tasks)]
    now = folder / "now"
    while time.time() < deadline and len(read_lines(results)) < len(tasks):
        now.write_text("-1")
        process = subprocess.Popen([sys.executable, str(script), "--work", "--out", str(folder)])
        last, silent_since, why = "", time.time(), ""
        while process.poll() is None:
            time.sleep(0.2)
            state = now.read_text()
            if state != last:
                last, silent_since = state, time.time()
            patience = SILENT_SECONDS * (3 if state == "-1" else 1)  # imports, weights, references
            if time.time() > min(deadline, silent_since + patience):
                why = "hung" if time.time() <= deadline else "out of time"
                process.kill()
                process.wait()
        number = int(now.read_text() or -1)
        if number < 0:
            print(f"the worker ended with {process.returncode} before its first task")
            return
        if process.returncode and why != "out of time":
            told = {line["task"] for line in read_lines(results)}
            with results.open("a") as out:
                for other, each in enumerate(kinds):
                    if each == kinds[number] and other not in told:
                        line = {"task": other, "failed": why or f"ended with {process.returncode}"}
                        print(json.dumps(line), file=out)
