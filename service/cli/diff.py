"""`halftone compare --diff A.json B.json`: two reports in, what changed printed, an exit code for CI."""

from pathlib import Path

import typer
from rich.console import Console

from service.compare.diff import TOLERANCE, diff_reports, read_report
from service.compare.forms.changes import print_differences
from service.errors import HalftoneError, SettingError


def compare_reports(context: typer.Context, paths: tuple[Path, Path] | None, tolerance: float | None) -> None:
    """Raises SettingError for whatever else was asked on the same line: it would be accepted and ignored."""
    given = [name for name in context.params if name not in ("diff", "tolerance") and is_given(context, name)]
    if paths is None:
        raise SettingError(
            "`--tolerance` was given without `--diff`", hint="write `--diff A.json B.json --tolerance 0.05`"
        )
    if given:
        names = ", ".join("MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in given)
        raise SettingError(
            f"`--diff` compares two reports and measures nothing, but `{names}` was given too",
            hint="write `halftone compare --diff A.json B.json`, or measure first",
        )
    diff(*paths, TOLERANCE if tolerance is None else tolerance)


def is_given(context: typer.Context, name: str) -> bool:
    """On the command line, and not by default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def diff(before: Path, after: Path, tolerance: float, console: Console | None = None) -> None:
    """Raises HalftoneError where a figure is worse beyond noise, or a mode is lost."""
    found = diff_reports(read_report(before), read_report(after), tolerance)
    print_differences(found, console or Console())
    if found.is_worse:
        worse = found.having("worse")
        told = [f"{len(worse)} figure{'s' if len(worse) != 1 else ''} worse beyond noise"] if worse else []
        told += [f"{len(found.lost)} mode{'s' if len(found.lost) != 1 else ''} lost"] if found.lost else []
        raise HalftoneError(
            f"`{after}` against `{before}`: {' and '.join(told)}",
            hint="the lines above name them; measure again before you trust one alone",
        )
