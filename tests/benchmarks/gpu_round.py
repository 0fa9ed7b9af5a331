"""What docs/performance.md needs a GPU for, step after step, within a limit; the next call goes on.

    python -m tests.benchmarks.gpu_round --tokenizer FOLDER --out FOLDER [--seconds 570] [--only NAME,NAME]
    python -m tests.benchmarks.gpu_round --list

A step is a command of this repository, in whose documentation stands what it measures. Its output goes to
OUT/NAME.log and the end of it here; OUT/ended.json says which have ended, and they are not run again. One
that would not end within the limit is left for the next call, but for those that go on where they stopped.
Steps that time nothing run beside each other.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

LLAMA = "preset:llama-3.1-8b"
SHOWN_LINES = 40
STOPPING_S = 20  # for a command to unwind, once it was terminated
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short")
SERVED = (LLAMA, "--load-format", "random", "--tokenizer", "TOKENIZER")


@dataclass(frozen=True)
class Step:
    """`arguments` of Python; in them TOKENIZER and OUT stand for the two folders. `seconds`: expected, on an
    H100 whose kernel caches are empty. `resumes`: it may be stopped, and goes on at the next call. `beside`:
    nothing in it is timed, so that it may run beside others of its kind."""

    name: str
    seconds: int
    arguments: tuple[str, ...] = field(repr=False)
    resumes: bool = False
    beside: bool = False


def suite(name: str, seconds: int, *arguments: str, beside: bool = False) -> Step:
    return Step(name, seconds, (*PYTEST, *arguments), beside=beside)


def engine(name: str, seconds: int, *arguments: str) -> Step:
    return Step(name, seconds, ("-m", "tests.benchmarks.engine_steps", *arguments))


def over_http(name: str, seconds: int, precision: str, levels: str, *served: str) -> Step:
    asked = ("--requests", "4", "--precisions", precision, "--levels", levels, "--out", "OUT/http")
    return Step(name, seconds, ("-m", "tests.benchmarks.over_http", *SERVED, *asked, *served))


def with_8_bit_cache(precision: str, *arguments: str) -> tuple[Step, ...]:
    work = ("--precision", precision, "--tokens", "768,512", "--streams", "256", "--rounds", "1", *arguments)
    return tuple(
        engine(f"kv-{kv_dtype}-{precision}", 35, *work, "--kv-dtype", kv_dtype)
        for kv_dtype in ("auto", "int8", "fp8")
    )


PLANTED = ("--random-std", "0.01", "--random-outliers", "32")
STEPS = (
    suite("swaps", 280, "tests/gpu/test_swap_on_gpu.py", beside=True),
    Step(
        "sanitize",
        270,
        ("-m", "tests.benchmarks.sanitize", "--under", "memcheck,racecheck", "--logs", "OUT/sanitize"),
        beside=True,
    ),
    suite(
        "linears",
        150,
        *("-n", "4", "tests/gpu/test_fp8_on_gpu.py", "tests/gpu/test_int8_on_gpu.py"),
        *("tests/gpu/test_w4_on_gpu.py", "tests/gpu/test_gated_linear_on_gpu.py"),
        beside=True,
    ),
    suite("filled-device", 60, "tests/gpu/test_filled_device_on_gpu.py"),
    *with_8_bit_cache("fp16"),
    *with_8_bit_cache("awq"),
    over_http("http-fp16", 75, "fp16", "1,16,64,256"),
    over_http("http-fp8", 75, "fp8", "1,16,64,256"),
    over_http("http-nf4", 75, "nf4", "1,16,64,256"),
    over_http("http-awq", 75, "awq", "1,16,64,256"),
    over_http("http-int8", 75, "int8", "1,16,64,256", *PLANTED),
    Step(
        "w4-rings",
        30,
        ("docs/experiments/w4_rings.py", "--codes", "affine 128,nf4 64", "--rows", "1,16"),
    ),
    Step("fp8-chain", 30, ("docs/experiments/fp8_chain.py",)),
    *with_8_bit_cache("nf4"),
    *with_8_bit_cache("int8", *PLANTED),
    *with_8_bit_cache("fp8"),
    Step("w16-tile", 100, ("docs/experiments/w16_tile.py", "--out", "OUT/w16-tile")),
    engine(
        "few-awq", 60, "--precision", "awq", "--streams", "16,64", "--few-tokens", "512,768", "--rounds", "2"
    ),
    over_http("http-int3", 60, "int3", "1,16,64"),
    Step(
        "starts",
        60,
        (
            *("tests/benchmarks/start_to_ready.py", "--runs", "3", LLAMA, "--load-format", "random"),
            *("--tokenizer", "TOKENIZER", "--precision", "fp16"),
        ),
    ),
    Step(
        "first-start",
        40,
        (
            *("tests/benchmarks/start_to_ready.py", "--runs", "1", "--first-ever", LLAMA),
            *("--load-format", "random", "--tokenizer", "TOKENIZER", "--precision", "fp16"),
        ),
    ),
    engine("deterministic", 60, "--deterministic", "--streams", "1,16,64", "--rounds", "2"),
    suite("ledger", 90, "tests/gpu/test_ledger_on_gpu.py", "tests/gpu/test_memory_given_back.py"),
    Step("w16-algorithms", 100, ("docs/experiments/w16_algorithms.py", "--out", "OUT/w16-algorithms")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder of Llama-3.1's tokenizer.json")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=570, help="of this call (570)")
    parser.add_argument("--only", default="", help="steps, separated by commas; empty: all")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        for step in STEPS:
            print(f"{step.seconds:5} s  {step.name}")
        return
    if arguments.out is None or arguments.tokenizer is None:
        parser.error("--tokenizer and --out are needed")
    names = [name for name in arguments.only.split(",") if name]
    if unknown := set(names) - {step.name for step in STEPS}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; --list names all")
    chosen = [step for step in STEPS if not names or step.name in names]
    folders = {"TOKENIZER": str(arguments.tokenizer.absolute()), "OUT": str(arguments.out.absolute())}
    run_all(chosen, arguments.out, folders, arguments.seconds)


def run_all(steps: Sequence[Step], out: Path, folders: dict[str, str], limit_s: float) -> None:
    """Runs what has not ended and fits, and writes down what ended: name -> exit status and seconds."""
    out.mkdir(parents=True, exist_ok=True)
    ended_at = out / "ended.json"
    ended = json.loads(ended_at.read_text()) if ended_at.is_file() else {}
    until = time.monotonic() + limit_s
    waiting = [step for step in steps if step.name not in ended]
    while waiting:
        together = [step for step in waiting if step.beside] if waiting[0].beside else waiting[:1]
        waiting = [step for step in waiting if step not in together]
        left_s = until - time.monotonic()
        fitting = []
        for step in together:
            if left_s < (2 * STOPPING_S if step.resumes else step.seconds):
                print(f"## {step.name}: left, {step.seconds} s do not fit into {left_s:.0f}", flush=True)
            else:
                fitting.append(step)
        with ThreadPoolExecutor(len(together)) as pool:
            outcomes = pool.map(partial(run_one, out=out, folders=folders, left_s=left_s), fitting)
        for step, (status, seconds) in zip(fitting, outcomes, strict=True):
            told = "goes on later" if status is None else status
            print(f"## {step.name}: {told}, {seconds:.0f} s", flush=True)
            if status is not None:
                ended[step.name] = {"status": status, "seconds": round(seconds, 1)}
                ended_at.write_text(json.dumps(ended, indent=2))


def run_one(step: Step, out: Path, folders: dict[str, str], left_s: float) -> tuple[int | None, float]:
    """-> its exit status, None where the limit came first and it goes on later; and its seconds."""
    arguments = list(step.arguments)
    for word, folder in folders.items():
        arguments = [argument.replace(word, folder) for argument in arguments]
    log = out / f"{step.name}.log"
    began = time.monotonic()
    is_late = False
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=said, stderr=said, start_new_session=True
        )
        try:
            status: int | None = process.wait(left_s - STOPPING_S)
        except subprocess.TimeoutExpired:
            is_late = True
            process.terminate()
            try:
                status = process.wait(STOPPING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind holds the GPU's memory
    print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]), flush=True)
    return None if is_late and step.resumes else status, time.monotonic() - began


if __name__ == "__main__":
    main()
