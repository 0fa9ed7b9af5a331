"""One phase of load, by the load generator in a process of its own: its pauses are not the server's.

mode.measure() --phase--> python -m loadtest --JSON--> Level
"""

import asyncio
import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from loadtest.prompts import DEFAULT_PROMPTS
from loadtest.statistics import Record, percentile
from service.compare.figures import Figures, Interval, Latency, Level, Run
from service.compare.plan import Phase
from service.errors import HalftoneError

CURVE_PERCENTS = range(0, 101, 2)


def package_folder() -> Path:
    """Where `loadtest` can be imported from, installed or not."""
    spec = importlib.util.find_spec("loadtest")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


async def run_load(
    url: str, model: str, phase: Phase, rate_per_s: float, output_tokens: int, prompts: str, raw: Path
) -> Level:
    """Drive `url` through `phase` -> its figures; every request's timestamps go to `raw`.

    Raises HalftoneError with the generator's own line where it got no answer at all.
    """
    arrivals = (
        ["--concurrency", str(phase.concurrency)] if phase.concurrency else ["--rate", repr(rate_per_s)]
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--url", url, "--model", model, *arrivals),
        *("--requests", str(phase.num_requests), "--warmup", str(phase.num_warmup)),
        *("--output-tokens", str(output_tokens), "--seed", str(phase.seed), "--clients", "1"),
        *("--prompts", str(Path(prompts or DEFAULT_PROMPTS).absolute()), "--continuous-usage"),
        *("--json", str(raw.absolute()), "--records"),
        cwd=package_folder(),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # ctrl-C is for compare, which ends this process itself
    )
    try:
        _, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    # 3: some requests failed, 4: the server's own counts say something else; the result tells which
    if process.returncode not in (0, 3, 4):
        said = complaint.decode("utf-8", "replace").strip()
        raise HalftoneError(
            f"load phase `{phase.id}` failed: {said.removeprefix('error: ') or process.returncode}"
        )
    return level_of(msgspec.json.decode(raw.read_bytes()), phase, f"{raw.parent.name}/{raw.name}")


def level_of(result: dict[str, Any], phase: Phase, raw: str) -> Level:
    """loadtest's JSON -> the report's figures."""
    (level,) = result["levels"]
    (run,) = level["runs"]
    summary, client = run["summary"], run["client"]

    def latency(name: str) -> Latency | None:
        return msgspec.convert(summary[name], Latency) if summary[name] else None

    def once(value: float) -> Interval:
        return Interval(estimate=value, low=None, high=None, n=1)

    latencies = {name: latency(f"{name}_s") for name in ("ttft", "itl", "tpot", "e2e")}
    figures = {
        f"{name}_{percent}_s": once(getattr(found, percent))
        for name, found in latencies.items()
        for percent in ("p50", "p95", "p99")
        if found
    }
    return Level(
        id=phase.id,
        concurrency=phase.concurrency,
        rate_per_s=level["arrivals"].get("rate_per_s", 0.0),
        num_requests=phase.num_requests,
        num_warmup=phase.num_warmup,
        runs=[
            Run(
                repeat=0,
                order=0,
                seed=phase.seed,
                num_ok=summary["num_ok"],
                num_errors=summary["num_errors"],
                num_short=summary["num_short"],
                errors=summary["errors"],
                window_s=summary["window_s"],
                prompt_tokens=summary["prompt_tokens"],
                output_tokens=summary["output_tokens"],
                output_tokens_per_s=summary["output_tokens_per_s"],
                requests_per_s=summary["requests_per_s"],
                goodput_per_s=None,
                ttft_s=latencies["ttft"],
                itl_s=latencies["itl"],
                tpot_s=latencies["tpot"],
                e2e_s=latencies["e2e"],
                energy=None,
                client_cpu_share=client["cpu_share"],
                client_lag_p99_s=(client["lag_s"] or {"p99": 0.0})["p99"],
                raw=raw,
            )
        ],
        figures=Figures(
            output_tokens_per_s=once(summary["output_tokens_per_s"]),
            requests_per_s=once(summary["requests_per_s"]),
            **figures,
        ),
        itl_curve_s=gap_curve(run["requests"]),
    )


def gap_curve(requests: list[dict[str, Any]]) -> list[float]:
    """Quantiles of all measured gaps between tokens; empty where there are none."""
    records = [Record(**request) for request in requests]
    gaps = sorted(gap for record in records if record.ok and not record.warmup for gap in record.gaps_s())
    return [percentile(gaps, percent) for percent in CURVE_PERCENTS] if gaps else []
