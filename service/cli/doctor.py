"""`halftone doctor`: what this machine has, and a fix for whatever would stop `serve`."""

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from service import __version__
from service import device as devices
from service.config import Settings
from service.cores import physical_cores
from service.disk import existing_parent, folder_bytes, megabytes
from service.errors import HalftoneError
from service.front.host import bind
from service.kernels import cuda, native
from service.model.demo import NEEDED_BYTES, demo_folder
from service.model.folders import is_whole

LEAST_MEMORY_BYTES = 2_000_000_000  # the demo in fp32 with its cache, front and engine together


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and the fix where that is not enough."""

    name: str
    found: str
    fix: str = ""


def doctor(settings: Settings) -> int:
    """Prints every finding -> exit code: 1 when one of them needs a fix."""
    console = Console(highlight=False, soft_wrap=True)
    findings = [finding for check in CHECKS for finding in check(settings)]
    for finding in findings:
        mark = "[red]fix[/red]" if finding.fix else "[green]ok[/green] "
        console.print(f"{mark}  {finding.name:<13} ", end="")
        console.print(finding.found, markup=False)
        if finding.fix:
            console.print(f"       hint: {finding.fix}", markup=False)
    return int(any(finding.fix for finding in findings))


def check_python(settings: Settings) -> list[Finding]:
    found = f"{platform.python_version()} at {sys.executable}; halftone {__version__}"
    return [Finding("python", found)]


def check_device(settings: Settings) -> list[Finding]:
    """Driver, torch, and whether the one can use the other."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    findings = [
        Finding("driver", devices.nvidia_driver() or "no NVIDIA driver"),
        Finding("torch", f"{torch.__version__} ({cuda})"),
    ]
    try:
        device = devices.resolve(settings.device)
    except HalftoneError as error:
        return [*findings, Finding("device", error.message, error.hint)]
    free = devices.memory_free_bytes(device)
    total = devices.memory_total_bytes(device)
    needed = LEAST_MEMORY_BYTES
    name = f"{device} ({devices.device_name(device)})"
    if device.type == "cpu":
        name += f", {physical_cores()} cores"
    fix = (
        ""
        if free >= needed
        else "end other programs that hold it: the demo model alone needs " + megabytes(needed)
    )
    return [
        *findings,
        Finding("device", name),
        Finding("memory", f"{megabytes(free)} free of {megabytes(total)} on {device}", fix),
    ]


def check_libraries(settings: Settings) -> list[Finding]:
    """What `int8` and `nf4` compute with, and what compiles our own kernels."""
    try:
        from service.precision.bitsandbytes_import import bitsandbytes

        codes, _ = bitsandbytes.quantize_4bit(torch.ones(64, 64), quant_type="nf4")
        version = importlib.metadata.version("bitsandbytes")
        kernels = Finding("bitsandbytes", f"{version}, quantizes here ({codes.numel()} bytes of 4096 values)")
    except Exception as error:  # whatever a broken native library raises
        fix = "`make clean install`; until then `int8` and `nf4` cannot be served"
        kernels = Finding("bitsandbytes", f"does not work: {error}", fix)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    fix = (
        "`make clean install`: torch for CUDA brings it"
        if torch.version.cuda and triton == "not installed"
        else ""
    )
    use = "compiles kernels" if torch.cuda.is_available() else "kernels run by torch on this device"
    found = [kernels, Finding("triton", f"{triton}; {use}", fix)]
    if torch.cuda.is_available():
        reason = cuda.absence()
        found.append(
            Finding("CUDA kernels", f"not used: {reason}" if reason else "compiled by torch's NVRTC")
        )
    return found


def check_cpu_kernels(settings: Settings) -> list[Finding]:
    """Who multiplies on a CPU; without our own kernels it is slower, which is no fault to be mended."""
    try:
        native.choose(settings.cpu_kernels)
    except HalftoneError as error:
        return [Finding("CPU kernels", error.message, error.hint)]
    library = native.load()
    return [Finding("CPU kernels", f"native, {library.isa}" if library else f"torch's: {native.absence()}")]


def check_disk(settings: Settings) -> list[Finding]:
    """Room for the caches and what they hold now."""
    cache = settings.cache_dir
    free = shutil.disk_usage(existing_parent(cache)).free
    has_demo = is_whole(demo_folder(cache))
    fix = ""
    if not has_demo and free < NEEDED_BYTES:
        fix = (
            f"free {megabytes(NEEDED_BYTES)} for the demo model, or choose another folder with `--cache-dir`"
        )
    demo = "demo model in it" if has_demo else "demo model not fetched yet"
    return [
        Finding("cache", f"{cache}: {megabytes(folder_bytes(cache))}, {demo}"),
        Finding("hub cache", f"{hub_cache()}: {megabytes(folder_bytes(hub_cache()))}"),
        Finding("disk", f"{megabytes(free)} free", fix),
    ]


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def check_port(settings: Settings) -> list[Finding]:
    try:
        with bind(settings.host, settings.port, "port"):
            return [Finding("port", f"{settings.host}:{settings.port} is free")]
    except HalftoneError as error:
        return [Finding("port", error.message, error.hint)]


CHECKS: tuple[Callable[[Settings], list[Finding]], ...] = (
    check_python,
    check_device,
    check_libraries,
    check_cpu_kernels,
    check_disk,
    check_port,
)
