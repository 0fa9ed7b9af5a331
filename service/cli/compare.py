"""`halftone compare`: names resolved and the list of modes split, then the comparison itself."""

from pathlib import Path

from service import logs
from service.cli.display import Display
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision
from service.compare.job import run_compare
from service.compare.plan import CompareOptions
from service.config import Settings
from service.disk import told_disk_errors
from service.errors import HalftoneError
from service.precision.spec import split_list


def compare(settings: Settings, precisions: str, out: Path, *, text: str, prompts: str, seed: int) -> None:
    """Raises HalftoneError before anything is measured, and after the report where a mode of it failed: a
    script that reads the exit code must not take half of a comparison for a whole one."""
    logs.configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    modes = split_list(precisions)
    for mode in modes:
        check_precision(mode)
    check_calibration(settings.calibration, modes)
    with Display() as display:
        settings, model_path = find_model(settings, display, needs_text=True)
    options = CompareOptions(text=text, prompts=prompts, seed=seed)
    with told_disk_errors(out):
        report = run_compare(settings, model_path, modes, out, options)
    failed = [row.name for row in report.rows if not row.ok]
    if failed:
        raise HalftoneError(
            f"{len(failed)} of {len(modes)} modes failed: {', '.join(failed)}",
            hint="the report has their reasons; the same command measures them again",
        )
