"""One phase of load, by the load generator in a process of its own: its pauses are not the server's.

mode.measure() --phase--> python -m loadtest --JSON--> Run; the JSON stays, with every request's timestamps
"""

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest.prompts import DEFAULT_PROMPTS
from loadtest.slo import Slo
from loadtest.statistics import Record
from service.compare.figures import Energy, Latency, Run
from service.compare.plan import Phase
from service.compare.power import PowerLog
from service.compare.report import Turn
from service.errors import HalftoneError

ANSWERED = (0, 3, 4)  # 3: some requests failed, 4: client and server count differently; the result says which


def package_folder() -> Path:
    """Where `loadtest` can be imported from, installed or not."""
    spec = importlib.util.find_spec("loadtest")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


async def run_load(
    url: str,
    model: str,
    phase: Phase,
    output_tokens: int,
    prompts: str,
    raw: Path,
    *,
    is_ours: bool = True,
) -> None:
    """Drive `url` through `phase`; the whole result, with every request's timestamps, goes to `raw`.

    `is_ours`: a Halftone, which counts the tokens of each event and takes every field, so that no first
    answer has to tell. Raises HalftoneError with the generator's own line where it got no answer at all.
    """
    arrivals = (
        ["--concurrency", str(phase.concurrency)] if phase.concurrency else ["--rate", repr(phase.rate_per_s)]
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--url", url, *(("--model", model) if model else ()), *arrivals),
        *("--requests", str(phase.num_requests), "--warmup", str(phase.num_warmup)),
        *("--output-tokens", str(output_tokens), "--seed", str(phase.seed), "--clients", "1"),
        *("--prompts", str(Path(prompts or DEFAULT_PROMPTS).absolute())),
        *(("--continuous-usage", "--no-first-answer") if is_ours else ()),
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
    if process.returncode not in ANSWERED:
        said = complaint.decode("utf-8", "replace").strip()
        raise HalftoneError(
            f"load phase `{phase.id}` failed: {said.removeprefix('error: ') or process.returncode}"
        )


def one_run(raw: Path) -> dict[str, Any]:
    """The only run of the only level in loadtest's JSON."""
    (level,) = msgspec.json.decode(raw.read_bytes())["levels"]
    (run,) = level["runs"]
    found: dict[str, Any] = run
    return found


def read_run(raw: Path, turn: Turn, phase: Phase, slo: Slo | None, power: PowerLog | None) -> Run:
    """loadtest's JSON -> the report's figures. Raises HalftoneError where no request was answered."""
    run = one_run(raw)
    summary, client = run["summary"], run["client"]
    if not summary["num_ok"]:
        reasons = "; ".join(summary["errors"]) or "no request was answered"
        raise HalftoneError(f"load phase `{phase.id}` got no answer: {reasons}")

    def latency(name: str) -> Latency | None:
        return msgspec.convert(summary[name], Latency) if summary[name] else None

    return Run(
        repeat=turn.repeat,
        order=turn.order,
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
        goodput_per_s=goodput_per_s(counted(run), slo, summary["window_s"]) if slo else None,
        ttft_s=latency("ttft_s"),
        itl_s=latency("itl_s"),
        tpot_s=latency("tpot_s"),
        e2e_s=latency("e2e_s"),
        energy=energy_of(run, power) if power else None,
        client_cpu_share=client["cpu_share"],
        client_lag_p99_s=(client["lag_s"] or {"p99": 0.0})["p99"],
        raw=f"{raw.parent.name}/{raw.name}",
        disagreements=[
            f"{name}: the server counts {100 * figure['difference']:+.1f} %"
            for name, figure in run["server_check"]["figures"].items()
            if not figure["agrees"]
        ],
    )


def counted(run: dict[str, Any]) -> list[Record]:
    """Requests that count, answered or not; no warm-up."""
    records = [Record(**request) for request in run["requests"]]
    return [record for record in records if not record.warmup]


def goodput_per_s(records: Sequence[Record], slo: Slo, window_s: float) -> float:
    """Requests/s that kept every limit; a failed one kept none."""
    return sum(not slo.missed(record) for record in records) / window_s


def energy_of(run: dict[str, Any], power: PowerLog) -> Energy:
    """Joules from the first request that counted to the last answer, on the clock that both processes
    read."""
    done = [record for record in counted(run) if record.ok]
    start_s = run["monotonic_s"] + min(record.scheduled_s for record in done)
    end_s = run["monotonic_s"] + max(record.finished_s for record in done)
    return Energy(
        joules=power.joules_between(start_s, end_s), window_s=end_s - start_s, idle_watts=power.idle_watts
    )
