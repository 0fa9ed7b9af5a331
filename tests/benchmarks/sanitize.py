"""All kernels of ours before a tool that watches what they do with memory: compute-sanitizer.

    python -m tests.benchmarks.sanitize --under memcheck,racecheck --logs FOLDER
    compute-sanitizer --tool memcheck python -m tests.benchmarks.sanitize [--only NAME,NAME] [--plain]

The second launches every kernel over small ragged shapes (tests/kernels/triton_launches.py and its neighbour
for CUDA C++) and prints a line a case as soon as the device is done with it: what the tool says above it is
that case's. Every tensor is an allocation of its own, so that what lies behind it is nobody's.

The first does that without a tool, which compiles everything, then under each tool: Triton's kernels in one
process, each kernel in CUDA C++ in one of its own, for blocks that wait for each other may not end where
instrumented code leaves no room for all of them. Before, the tool has to find what was planted
(planted_faults.cu). It exits with 1 where a tool found anything else, missed that, or did not end.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # exit status of a tool that found something
# What torch asks the driver in vain is no fault; a kernel that failed leaves the others to be run.
OPTIONS = [
    *("--report-api-errors", "no", "--target-processes", "application-only", "--error-exitcode", str(FOUND)),
    *("--print-limit", "50"),
]
OPTIONS_OF = {"memcheck": ["--padding", "4096", "--destroy-on-device-error", "kernel"]}
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
AHEAD_SECONDS = 300  # for all to be compiled and launched without a tool
PRINTED_LINES, LAST_LINES = 40, 15  # of what a tool found in a run, of what else it said
PLANTED = "planted_faults"  # no case: launched where it alone is asked for
FINDS = {"memcheck": "Invalid __global__ write", "racecheck": "Race reported"}  # of what was planted
BANNER = "========= COMPUTE-SANITIZER"
CASE = re.compile(r"^\S+: \d+ launches")


def main() -> None:
    options = parsed()
    if options.under:
        sys.exit(run_under(options))
    launch_all(options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Launch every kernel of ours, also under compute-sanitizer.")
    parser.add_argument("--only", default="", help="cases, separated by commas; empty: all")
    parser.add_argument("--plain", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--ahead", action="store_true", help="compile all of it first, on all cores")
    parser.add_argument("--under", default="", help=f"tools, separated by commas: {', '.join(TOOLS)}")
    parser.add_argument("--logs", type=Path, default=Path("sanitizer"), help="folder for whole outputs")
    parser.add_argument("--seconds", type=int, default=150, help="for each process under a tool")
    options = parser.parse_args()
    options.under = [tool for tool in options.under.split(",") if tool]
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.under) - set(TOOLS):
        parser.error(f"no such tool: {', '.join(sorted(unknown))}")
    return options


def launch_all(options: argparse.Namespace) -> None:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch takes memory
    import torch

    from service.kernels import launch
    from service.kernels.cuda import cubins
    from tests.kernels import cuda_launches, triton_launches
    from tests.kernels.given import Given
    from tests.kernels.launched import launched

    cases = {case.__name__: case for case in (*triton_launches.CASES, *cuda_launches.CASES)}
    if unknown := set(options.only) - {*cases, PLANTED}:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    cubins.OPTIONS = (*cubins.OPTIONS, "--generate-line-info")
    if options.plain:
        launch.DEPENDENT = False
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    assert not torch.cuda.memory_reserved(), "torch keeps memory, behind whose tensors lie others"
    if options.ahead:
        print(f"{compiled_ahead()} kernels compiled", flush=True)
    if options.only == [PLANTED]:
        launch_planted_faults()
        return
    names: set[str] = set()
    chosen = options.only or list(cases)
    for name in chosen:
        began_s = time.monotonic()
        with launched() as found:
            cases[name](Given(device))
            torch.cuda.synchronize()
        names |= set(found)
        told = ", ".join(sorted(found))
        print(
            f"{name}: {sum(found.values())} launches in {time.monotonic() - began_s:.1f} s of {told}",
            flush=True,
        )
    print(f"{len(chosen)} cases, {len(names)} kernels", flush=True)


def compiled_ahead() -> int:
    """How many there are."""
    import torch

    from service.engine.kernels_ahead import compile_all
    from tests.kernels import cuda_launches, triton_launches
    from tests.kernels.given import Given

    def launch_triton() -> None:
        for case in triton_launches.CASES:
            case(Given(torch.device("meta")))

    return compile_all(launch_triton, cuda_launches.loads())


def launch_planted_faults() -> None:
    from ctypes import c_int, c_void_p

    import torch

    from service.kernels.cuda import Launch, Program, kernel_of

    source = Path(__file__).parents[1] / "kernels" / f"{PLANTED}.cu"
    y = torch.zeros(64).cuda()
    kernel = kernel_of(Program(source, PLANTED), threads=64, most_shared_bytes=0)
    stream = torch.cuda.current_stream().cuda_stream
    Launch(kernel, [c_void_p(y.data_ptr()), c_int(len(y))], dependent=False)(1, 0, stream)
    torch.cuda.synchronize()


def run_under(options: argparse.Namespace) -> int:
    """The exit status."""
    sanitizer = found_sanitizer()
    print(f"{sanitizer}\n{subprocess.check_output([sanitizer, '--version'], text=True).strip()}", flush=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "tests.benchmarks.sanitize", *["--plain"] * options.plain]
    if run("without", [*program, "--ahead"], options.logs, AHEAD_SECONDS):
        return 1
    status = 0
    for tool in options.under:
        watched = [sanitizer, "--tool", tool, *OPTIONS, *OPTIONS_OF.get(tool, []), *program]
        if tool in FINDS:
            command = [*watched, "--only", PLANTED]
            status |= run(f"{tool}-{PLANTED}", command, options.logs, options.seconds, finds=FINDS[tool])
        for name, cases in groups(options.only):
            command = [*watched, "--only", ",".join(cases)]
            status |= run(f"{tool}-{name}", command, options.logs, options.seconds)
    print("NOT clean, or not ended: see above" if status else "clean", flush=True)
    return status


def groups(only: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Cases of a process each, and what to call it."""
    from tests.kernels import cuda_launches, triton_launches

    def chosen(names: list[str]) -> list[str]:
        return [name for name in names if not only or name in only]

    if names := chosen([case.__name__ for case in triton_launches.CASES]):
        yield "triton", names
    for name in chosen([case.__name__ for case in cuda_launches.CASES]):
        yield name, [name]


def found_sanitizer() -> str:
    """Where it is; exits where it is not."""
    places = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    if found := shutil.which("compute-sanitizer", path=places):
        return found
    for root in ("/usr/local", "/opt", "/usr/lib", sys.prefix):
        for file in sorted(Path(root).rglob("compute-sanitizer")):
            if file.is_file() and os.access(file, os.X_OK):
                return str(file)
    sys.exit("compute-sanitizer is not installed: it comes with NVIDIA's CUDA toolkit")


def run(name: str, command: list[str], logs: Path, seconds: int, finds: str = "") -> int:
    """0 where it ends with 0 in time, or its output has what it is to find; 1 elsewhere.

    The output is kept, and told in short.
    """
    log, began_s = logs / f"{name}.log", time.monotonic()
    print(f"== {name}: {' '.join(command)}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        # of a session of its own: what runs under the tool is its child, and ends with it
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    is_right = finds in text if finds else code == 0
    ended = f"no end after {seconds} s" if code is None else f"exit status {code}"
    took_s = time.monotonic() - began_s
    print("\n".join(shortened(text.splitlines())))
    print(
        f"== {name}: {'right' if is_right else 'WRONG'}, {ended}, {took_s:.0f} s, all of it in {log}",
        flush=True,
    )
    return int(not is_right)


def shortened(lines: list[str]) -> list[str]:
    """Cases, each behind how much was found in it; summaries; the first findings; the last of the rest."""
    told: list[str] = []
    found: list[str] = []
    others: list[str] = []
    num_before = 0
    for line in lines:
        if CASE.match(line):
            in_case = len(found) - num_before
            told.append(f"{in_case} lines found in {line}" if in_case else line)
            num_before = len(found)
        elif line.startswith("=========") and "SUMMARY" in line:
            told.append(line)
        elif line.startswith("=========") and line != BANNER:
            found.append(line)
        else:
            others.append(line)
    return [*told, *found[:PRINTED_LINES], *others[-LAST_LINES:]]


if __name__ == "__main__":
    main()
