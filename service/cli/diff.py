"""`halftone compare --diff A.json B.json`: two reports in, what changed printed, an exit code for CI."""

from pathlib import Path

from rich.console import Console

from service.compare.diff import diff_reports, read_report
from service.compare.forms.changes import print_differences
from service.errors import HalftoneError


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
