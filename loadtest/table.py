"""A bench's result for a terminal: rates, latencies, what they mean, and what to doubt.

bench.measure() --result--> show()
"""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.statistics import FORMULAS, SYMBOLS

BUSY_CPU_SHARE = 0.7
LATE_WAKE_S = 0.01
CACHED_SHARE = 0.01
FIGURES = ("ttft", "itl", "tpot", "e2e")
PERCENTS = ("p50", "p95", "p99", "p99.9")


def show(result: dict[str, Any], console: Console) -> None:
    """Everything a reader needs to judge the figures."""
    console.print(server_line(result["server"]), markup=False)
    work = result["workload"]
    console.print(work_line(work), markup=False)
    console.print(rates(result))
    console.print(times(result))
    if any(level["figures"]["goodput"] for level in result["levels"]):
        console.print(goodputs(result))
    for line in doubts(result):
        console.print(f"warning: {line}", markup=False, style="yellow")
    for line in notes(result):
        console.print(f"note: {line}", markup=False)
    formulas = "\n".join(f"  {name} = {formula}" for name, formula in FORMULAS.items())
    console.print(f"{formulas}\n  {SYMBOLS}", markup=False, style="dim")


def work_line(work: dict[str, Any]) -> str:
    """What was asked of it."""
    most = "" if work["ignore_eos"] else " at most"
    if work["trace"]:
        trace = work["trace"]
        asked = f"lengths and times of {trace['file']}"
        if work["prompts"] != trace["file"]:
            asked += f", prompts: {work['prompts']}"
    else:
        given = f"{work['input_tokens']} random ids" if work["input_tokens"] else work["prompts"]
        asked = f"{given} in, {work['output_tokens']} tokens out{most}"
    return f"{work['model']}: {asked}, greedy, streamed, seed {work['seed']}"


def server_line(server: dict[str, Any]) -> str:
    """What was measured, as far as the server tells."""
    version = server["version"] or {}
    engine = version.get("engine") or {}
    facts = [f"version {version['version']}"] if version.get("version") else []
    facts += [str(engine[name]) for name in ("architecture", "precision", "device_name") if engine.get(name)]
    return ", ".join([server["url"], *facts])


def rates(result: dict[str, Any]) -> Table:
    table = Table(
        title="rates: median of the repeats (least to most)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("load", no_wrap=True)
    for name in ("output tokens/s", "while all busy", "requests/s", "answered", "failed", "client CPU"):
        table.add_column(name, justify="right")
    for level in result["levels"]:
        figures, repeated = level["figures"], len(level["runs"]) > 1
        cpu_share = max(run["client"]["cpu_share"] for run in level["runs"])
        table.add_row(
            escape(level["label"]),
            rate(figures["output_tokens_per_s"], repeated),
            rate(figures["all_busy_tokens_per_s"], repeated),
            f"{figures['requests_per_s']['median']:,.2f}",
            f"{figures['num_ok']:,}",
            f"{figures['num_errors']:,}",
            f"{level['num_clients']} x {100 * cpu_share:.0f} %",
        )
    return table


def goodputs(result: dict[str, Any]) -> Table:
    slo = next(level["figures"]["goodput"]["slo"] for level in result["levels"])
    table = Table(title=f"requests that met {slo}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("load", no_wrap=True)
    for name in ("goodput, requests/s", "share that met it", "missed"):
        table.add_column(name, justify="right")
    for level in result["levels"]:
        good = level["figures"]["goodput"]
        table.add_row(
            escape(level["label"]),
            rate(good["requests_per_s"], len(level["runs"]) > 1, digits=2),
            f"{100 * good['good_share']:.1f} %",
            ", ".join(f"{name.upper()} {count:,}" for name, count in good["missed"].items() if count) or "-",
        )
    return table


def rate(figure: dict[str, float] | None, repeated: bool, digits: int = 1) -> str:
    """Median, with the least and the most where there are several runs, to a digit less."""
    if figure is None:
        return "-"
    spread = f" ({figure['min']:,.{digits - 1}f} to {figure['max']:,.{digits - 1}f})" if repeated else ""
    return f"{figure['median']:,.{digits}f}{spread}"


def times(result: dict[str, Any]) -> Table:
    table = Table(
        title="milliseconds, over the requests of all repeats", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("load", no_wrap=True)
    table.add_column("figure")
    for name in (*PERCENTS, "mean", "max", "n"):
        table.add_column(name, justify="right")
    for level in result["levels"]:
        label = escape(level["label"])
        for name in FIGURES:
            figure = level["figures"][f"{name}_s"]
            if figure is None:
                continue
            cells = [f"{1e3 * figure[p]:,.2f}" if p in figure else "" for p in (*PERCENTS, "mean", "max")]
            table.add_row(label, name.upper(), *cells, f"{figure['n']:,}", end_section=name == FIGURES[-1])
            label = ""
    return table


def doubts(result: dict[str, Any]) -> list[str]:
    """What makes a figure wrong, or less than it seems."""
    said = []
    trace = result["workload"]["trace"]
    for level in result["levels"]:
        figures, label = level["figures"], level["label"]
        said += [f"{label}: {count} x {error}" for error, count in figures["errors"].items()]
        if figures["num_short"]:
            said.append(f"{label}: {figures['num_short']} answers are shorter than what was asked for")
        shares = trace and trace["shares_beginnings"]
        if figures["cached_tokens"] > CACHED_SHARE * figures["prompt_tokens"] and not shares:
            share = figures["cached_tokens"] / figures["prompt_tokens"]
            said.append(
                f"{label}: {100 * share:.0f} % of the prompts' tokens came from the server's prefix cache; "
                "another `--seed` asks what it has not seen"
            )
        said += disagreements(level)
        clients = [run["client"] for run in level["runs"]]
        if not figures["num_ok"]:
            continue
        cpu_share = max(client["cpu_share"] for client in clients)
        late_s = max((client["lag_s"]["p99"] for client in clients if client["lag_s"]), default=0.0)
        if cpu_share > BUSY_CPU_SHARE or late_s > LATE_WAKE_S:
            said.append(
                f"{label}: a client process was {100 * cpu_share:.0f} % busy and woke {1e3 * late_s:.1f} ms "
                "late (p99); latencies hold some of its own. More `--clients`, or another machine"
            )
    return said


def disagreements(level: dict[str, Any]) -> list[str]:
    """Where the server's own counts of a run are not what the clients saw."""
    said = []
    for number, run in enumerate(level["runs"], 1):
        for name, figure in run["server_check"]["figures"].items():
            if not figure["agrees"]:
                said.append(
                    f"{level['label']}, run {number}, {name}: {figure['client']:,.6g} by the clients, "
                    f"{figure['server']:,.6g} by the server ({100 * figure['difference']:+.1f} %); somebody "
                    "else uses the server, or one of the two is wrong"
                )
    return said


def agreement(result: dict[str, Any]) -> str:
    """How far the two accounts of all runs are apart, and what there is only one of."""
    checks = [run["server_check"] for level in result["levels"] for run in level["runs"]]
    widest: dict[str, float] = {}
    for check in checks:
        for name, figure in check["figures"].items():
            widest[name] = max(widest.get(name, 0.0), figure["difference"], key=abs)
    unknown = {f"{name} ({why})" for check in checks for name, why in check["not_checked"].items()}
    compared = ", ".join(f"{name} {100 * difference:+.1f} %" for name, difference in widest.items())
    parts = [f"the server's own counts, less the clients': {compared}"] if compared else []
    parts += [f"not checked against the server: {', '.join(sorted(unknown))}"] if unknown else []
    return "; ".join(parts)


def longest_pause(result: dict[str, Any]) -> str:
    """Of all levels: nobody got anything, whoever's fault that was."""
    told = [
        (pause, level["label"]) for level in result["levels"] if (pause := level["figures"]["longest_pause"])
    ]
    if not told:
        return ""
    pause, label = max(told, key=lambda pair: pair[0]["seconds"])
    return (
        f"the longest time in which no stream got anything: {1e3 * pause['seconds']:.1f} ms, {label}, "
        f"{pause['num_answers']:.0f} answers on their way"
    )


def own_times(result: dict[str, Any]) -> str:
    """What the client processes were late by: it is a part of every latency above."""
    clients = [run["client"] for level in result["levels"] for run in level["runs"]]

    def worst_ms(name: str) -> str:
        known = [client[name]["p99"] for client in clients if client[name]]
        return f"{1e3 * max(known):.2f} ms" if known else "not known"

    return (
        f"the clients woke {worst_ms('lag_s')} late and sent {worst_ms('dispatch_delay_s')} after due (p99)"
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What agreed, what the server does not take, and how tokens were counted, where not one by one."""
    levels = [level["figures"] for level in result["levels"]]
    said = [line for line in (agreement(result), own_times(result), longest_pause(result)) if line]
    lacks = result["server"]["lacks"]
    if lacks:
        said.append(
            f"the server does not take {', '.join(f'`{name}`' for name in lacks)}; requests went without"
        )
    trace = result["workload"]["trace"]
    if trace and trace["num_too_long"]:
        said.append(
            f"{trace['num_too_long']} of the trace's {trace['num_requests']} requests are longer than the "
            "model's window, and were left out"
        )
    if any("events" in figures["counted_by"] for figures in levels):
        said.append("the server sends no usage; each event with a text counts as one token")
    if trace and trace["shares_beginnings"]:
        cached, prompt = (
            sum(figures[name] for figures in levels) for name in ("cached_tokens", "prompt_tokens")
        )
        said.append(
            f"requests begin alike as in the trace; {100 * cached / max(1, prompt):.0f} % of the prompts' "
            "tokens came from the server's prefix cache"
        )
    brought = [figures["tokens_per_event"] for figures in levels if "usage" in figures["counted_by"]]
    if brought:
        said.append(
            f"ITL is the gap between events, which bring {min(brought):.3f} to {max(brought):.3f} "
            "tokens each; `--continuous-usage` counts every token"
        )
    return said
