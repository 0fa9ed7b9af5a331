"""What changed between two reports, for a terminal or the log of a CI.

diff --Differences--> print_differences()
"""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.compare.diff import Change, Differences
from service.compare.forms.tables import MODES_A_TABLE, STYLES
from service.compare.forms.words import (
    MILLISECONDS,
    PLAIN,
    SIGNS,
    UNTOLD,
    Unit,
    measured,
    percent_of,
    signed,
    size_unit,
)

NAMES = {
    "output_tokens_per_s": "tokens/s",
    "goodput_per_s": "goodput, requests/s",
    "joules_per_output_token": "J per output token",
    "load_s": "load, s",
    "weight_bytes": "weights",
    "peak_bytes": "peak",
    "kl": "KL, nats/token",
}


def print_differences(found: Differences, console: Console) -> None:
    """Circumstances, every change by mode, and last what is worse."""
    console.print(f"\n[bold]{escape(found.before.first_line)}[/bold]\n", highlight=False)
    for what, before, after in found.circumstances:
        console.print(
            f"{escape(what)}: {escape(before or 'none')} → {escape(after or 'none')}", highlight=False
        )
    modes = list(dict.fromkeys(change.mode for change in found.changes))
    for first in range(0, len(modes), MODES_A_TABLE):
        console.print()
        console.print(table(modes[first : first + MODES_A_TABLE], found.changes))
    console.print(
        f"\nChanges from the first report to the second, with their interval at 95 %; {UNTOLD} is within "
        f"noise, or smaller than {100 * found.tolerance:g} %. Bytes and quality are counted, without noise.",
        style="dim",
        highlight=False,
    )
    for said in found.left_out:
        console.print(f"Not compared: {escape(said)}", highlight=False)
    for effect, title in (("better", "Better"), ("worse", "Worse beyond noise")):
        for change in found.changes:
            if change.effect == effect:
                console.print(f"[{STYLES[effect]}]{title}[/]: {escape(told(change))}", highlight=False)
    for said in found.lost:
        console.print(f"[red]Lost[/]: {escape(said)}", highlight=False)


def table(modes: Sequence[str], changes: Sequence[Change]) -> Table:
    by_place = {(change.figure, change.where, change.mode): change for change in changes}
    made = Table(show_edge=False, pad_edge=False)
    made.add_column("")
    for mode in modes:
        made.add_column(escape(mode), justify="right")
    for figure, where in dict.fromkeys((change.figure, change.where) for change in changes):
        row = [by_place.get((figure, where, mode)) for mode in modes]
        if any(row):
            made.add_row(title(figure, where), *(cell(change) if change else "" for change in row))
    return made


def cell(change: Change) -> str:
    style = STYLES[change.effect]
    return f"{values(change)}\n[{style}]{percent(change)}[/]" + (
        f"\n[dim]{ends(change)}[/]" if change.interval else ""
    )


def values(change: Change) -> str:
    unit = unit_of(change)
    name = f" {unit.name}" if change.figure.endswith("_bytes") else ""
    return f"{measured(change.before, unit)} → {measured(change.after, unit)}{name}"


def percent(change: Change) -> str:
    if change.before == change.after and change.interval is None:
        return "same"
    said = f"{signed(percent_of(change.ratio))} %"
    return f"{UNTOLD} {said}" if change.effect == "undecided" else said + SIGNS[change.effect]


def ends(change: Change) -> str:
    if change.interval is None:
        return ""
    low, high = (signed(percent_of(end)) for end in change.interval)
    return f"{low} to {high}"


def told(change: Change) -> str:
    """`nf4, tokens/s, 64 streams: 1,344 → 1,201, −11 % (−13 to −8.4)`."""
    interval = f" ({ends(change)})" if change.interval else ""
    return (
        f"{change.mode}, {title(change.figure, change.where)}: {values(change)}, {percent(change)}{interval}"
    )


def title(figure: str, where: str) -> str:
    """`TTFT p95, ms, 8 requests/s`."""
    name = NAMES.get(figure)
    if name is None and figure.endswith("_s"):
        latency, percentile, _ = figure.split("_")
        name = f"{latency.upper()} {percentile}, ms"
    name = name or figure
    return f"{name}, {where}" if where else name


def unit_of(change: Change) -> Unit:
    if change.figure.endswith("_bytes"):
        return size_unit(max(change.before, change.after))
    return MILLISECONDS if change.figure.startswith(("ttft", "itl", "tpot", "e2e")) else PLAIN
