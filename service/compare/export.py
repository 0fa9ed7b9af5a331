"""A finished Report as files: JSON, the page, Markdown, CSV.

job --Report--> write_report() --forms--> files in `--out`
"""

from pathlib import Path

import msgspec

from service.compare.files import write_whole
from service.compare.forms.comma import levels_csv, modes_csv
from service.compare.forms.page import render_page
from service.compare.forms.tables import markdown
from service.compare.plan import REPORT_FILE
from service.compare.report import Report


def write_report(report: Report, out: Path) -> None:
    """report.json, report.html, report.md, report.csv and levels.csv in `out`."""
    write_whole(out / REPORT_FILE, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    write_whole(out / "report.html", render_page(report).encode())
    write_whole(out / "report.md", markdown(report).encode())
    write_whole(out / "report.csv", modes_csv(report).encode())
    write_whole(out / "levels.csv", levels_csv(report).encode())
