"""A result of `halftone bench --kernels` for a terminal: a table for each number of rows, and what to doubt.

measure() --result--> show()
"""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Key = tuple[str, int | None]  # contestant, outlier columns


def show(result: dict[str, Any], console: Console) -> None:
    """Everything a reader needs to judge the figures."""
    console.print(head(result), markup=False)
    for num_rows in result["rows"]:
        console.print(table_of(result, num_rows))
    for line in notes(result):
        console.print(f"note: {line}", markup=False)


def head(result: dict[str, Any]) -> str:
    """Machine, versions, shape and method in a few lines."""
    versions = [f"{name} {version}" for name, version in result["versions"].items() if version]
    machine = [result["device"]]
    machine += [f"driver {result['driver']}"] if result["driver"] else []
    machine += [f"{result['threads']} threads"] if result["threads"] else []
    shapes = [f"{name} {out}x{width}" for name, (out, width) in result["linears"].items()]
    ceiling = f"{result['ceiling_bytes_per_s'] / 1e9:,.0f} GB/s"
    return "\n".join(
        (
            f"{', '.join(machine)}; halftone {result['halftone']}, {', '.join(versions)}",
            f"{result['model']}, random weights: {', '.join(shapes)}",
            f"{result['method']} ({ceiling} at most)",
        )
    )


def table_of(result: dict[str, Any], num_rows: int) -> Table:
    table = Table(title=f"{num_rows} rows, microseconds", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("linears", no_wrap=True)
    names = [name.removesuffix("_proj") for name in result["linears"]]
    for name in (*names, "layer", "GB/s", "of ceiling"):
        table.add_column(name, justify="right")
    times = {
        (figure["contestant"], figure["outlier_columns"], figure["linear"]): figure["microseconds"]
        for figure in result["figures"]
        if figure["rows"] == num_rows
    }
    sums = {
        (layer["contestant"], layer["outlier_columns"]): layer
        for layer in result["layers"]
        if layer["rows"] == num_rows
    }
    for key in keys(result):
        cells = [cell(times.get((*key, name))) for name in result["linears"]]
        layer = sums.get(key)
        if layer is None:
            cells += ["-"] * 3
        else:
            rate = f"{layer['bytes_per_s'] / 1e9:,.0f}"
            cells += [cell(layer["microseconds"]), rate, f"{layer['ceiling_share']:.0%}"]
        table.add_row(escape(label(key)), *cells)
    return table


def keys(result: dict[str, Any]) -> list[Key]:
    """Whoever has a figure, and then whoever has none, each once."""
    found: dict[Key, None] = {}
    for figure in result["figures"]:
        found[figure["contestant"], figure["outlier_columns"]] = None
    measured = {contestant for contestant, _ in found}
    for each in result["absent"]:
        if each["contestant"] not in measured:
            found[each["contestant"], None] = None
    return list(found)


def label(key: Key) -> str:
    contestant, outliers = key
    return contestant if outliers is None else f"{contestant}, {outliers} outliers"


def cell(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.1f}"


def notes(result: dict[str, Any]) -> list[str]:
    """Who served, who could not, and which figures say less than they seem to."""
    kernels: dict[str, set[str]] = {}
    for figure in result["figures"]:
        kernels.setdefault(f"{figure['contestant']} ({figure['dtype']})", set()).add(figure["kernel"])
    said = [f"{name}: {'; '.join(sorted(names))}" for name, names in kernels.items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in result["absent"]:
        reasons.setdefault((each["contestant"], each["reason"]), []).append(each["linear"])
    said += [f"{name} has no figure for {', '.join(of)}: {why}" for (name, why), of in reasons.items()]
    figures = result["figures"]
    cached = sorted({figure["linear"] for figure in figures if not figure["is_from_memory"]})
    if cached:
        said.append(f"weights of {', '.join(cached)} are so small that some of them stay in a cache")
    if result["threads"] == 0:
        waits = sorted({figure["contestant"] for figure in figures if not figure["is_captured"]})
        said += [f"{', '.join(waits)}: no CUDA graph, the host's time is in it"] if waits else []
    return said
