"""`halftone compare`: names resolved and flags read, then the comparison itself."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadtest.errors import LoadTestError
from loadtest.prompts import Prompts
from loadtest.slo import Slo
from service import logs
from service.cli.display import Display
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision
from service.compare.job import load_prompts, run_compare
from service.compare.modes import (
    check_checkpoint,
    parse_modes,
    parse_server,
    reference_of,
    require_unique,
)
from service.compare.options import CompareOptions, Device, defaults, parse_levels
from service.compare.report import Mode
from service.config import Settings
from service.disk import told_disk_errors
from service.errors import HalftoneError, SettingError
from service.model.hub import resolve

HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def compare(
    settings: Settings,
    precisions: str,
    out: Path,
    *,
    kv_dtypes: str,
    servers: Sequence[str],
    reference: str,
    levels: str,
    slo: str,
    given: Mapping[str, object],
) -> None:
    """`given` are the amounts that flags named, by the field of CompareOptions; None: not named.

    Raises HalftoneError before anything is measured, and after the report where a mode of it failed: a
    script that reads the exit code must not take half of a comparison for a whole one.
    """
    logs.configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    device = device_of(settings)
    options = read_options(device, levels, slo, given)
    if kv_dtypes and settings.kv_dtype != "auto":
        raise SettingError(
            f"setting `kv_dtype` = `{settings.kv_dtype}` and `--kv-dtypes {kv_dtypes}` say two things",
            hint="leave one of them out",
        )
    modes = parse_modes(precisions or options.precisions, kv_dtypes or settings.kv_dtype)
    reference_of(modes, reference)
    for mode in modes:
        check_precision(mode.precision)
    modes += [parse_server(server) for server in servers]
    require_unique(modes)
    check_calibration(
        settings.calibration, [mode.precision for mode in modes if not (mode.checkpoint or mode.server)]
    )
    prompts = load_prompts(options)
    with Display() as display:
        settings, model_path = find_model(settings, display, needs_text=True)
        checkpoints = {
            mode.name: resolve(mode.checkpoint, "main", settings.cache_dir, display)
            for mode in modes
            if mode.checkpoint
        }
    hold_checkpoints(modes, checkpoints, settings, model_path, prompts)
    with told_disk_errors(out):
        report = run_compare(
            settings, model_path, modes, out, options, reference=reference, checkpoints=checkpoints
        )
    failed = [row.name for row in report.rows if not row.ok]
    if failed:
        raise HalftoneError(
            f"{len(failed)} of {len(modes)} modes failed: {', '.join(failed)}",
            hint="the report has their reasons; the same command measures them again",
        )


def read_options(device: Device, levels: str, slo: str, given: Mapping[str, object]) -> CompareOptions:
    """The device's defaults under what flags named. Raises SettingError."""
    named = {name: value for name, value in given.items() if value is not None}
    options = replace(defaults(device), **named)  # type: ignore[arg-type]
    if levels:
        options = replace(options, levels=parse_levels(levels))
    if slo:
        try:
            options = replace(options, slo=Slo.parse(slo))
        except LoadTestError as error:
            raise SettingError(error.message, hint=error.hint) from None
    return options


def device_of(settings: Settings) -> Device:
    """Where engines will run; torch, which knows, is asked in a process of its own."""
    if settings.device != "auto":
        return settings.device
    asked = subprocess.run([sys.executable, "-c", HAS_GPU], capture_output=True, check=False)
    return "cpu" if asked.returncode else "cuda"


def hold_checkpoints(
    modes: list[Mode], checkpoints: dict[str, Path], settings: Settings, model_path: Path, prompts: Prompts
) -> None:
    """Raises CheckpointError for a mode whose own checkpoint is another model's."""
    tokenizer = settings.tokenizer_folder(model_path)
    for mode in modes:
        if mode.name in checkpoints:
            check_checkpoint(mode, checkpoints[mode.name], model_path, tokenizer, prompts.texts)
