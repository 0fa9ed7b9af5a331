"""One level's repeats on the client processes -> its part of the result.

bench --Plan, Level--> measure_level() --Job--> fleet, and Outcomes --statistics, check--> JSON
"""

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.check import compare, unchecked
from loadtest.fleet import Fleet
from loadtest.job import Job, Outcome
from loadtest.level import Level
from loadtest.scrape import ScrapeError, Scraper, Totals
from loadtest.slo import Slo, goodput
from loadtest.statistics import Record, describe, pool, summarize
from loadtest.workload import Workload

SEEDS = 1_000_000  # of a user; each run adds as much, so that no run asks what another has asked
SETTLE_TRIES = 20  # a server counts an answer's end when it has sent it: a moment after we have it
SETTLE_S = 0.05


@dataclass(frozen=True)
class Plan:
    """What all levels of a bench share."""

    url: str
    api_key: str
    timeout_s: float
    workload: Workload
    repeats: int
    num_requests: int | None
    num_warmup: int | None
    slo: Slo | None
    keep_records: bool
    scraper: Scraper | None  # None: nobody wants the server's account


async def measure_level(
    plan: Plan, level: Level, number: int, fleet: Fleet, crew: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The `number`-th level's repeats by `crew` processes; `say` gets a line for each that has ended.

    A closed loop warms up once, and that ends before the first request that counts; an open loop's first
    requests are its warm-up, in each repeat, so that it is measured under load.
    """
    num_requests, num_warmup = level.counts(plan.num_requests, plan.num_warmup)
    runs: list[list[Record]] = []
    results = []
    for repeat in range(plan.repeats):
        seed = plan.workload.seed + SEEDS * (number * plan.repeats + repeat)
        job = Job(
            url=plan.url,
            api_key=plan.api_key,
            timeout_s=plan.timeout_s,
            workload=dataclasses.replace(plan.workload, seed=seed),
            indices=tuple(range(num_warmup + num_requests)),
            num_warmup=num_warmup,
        )
        warmed: list[Outcome] = []
        if level.kind == "closed":
            job = dataclasses.replace(job, streams=tuple(range(level.concurrency)))
            warm, counted = job.indices[:num_warmup], job.indices[num_warmup:]
            if warm and not repeat:
                warmed = await fleet.run(dataclasses.replace(job, indices=warm), crew)
            job = dataclasses.replace(job, indices=counted)
        else:
            job = dataclasses.replace(job, due_s=level.due_s(len(job.indices), seed))
        measured, server_check = await checked(plan.scraper, fleet, job, crew)
        records, zero_s = records_of([*warmed, *measured])
        runs.append(records)
        summary = summarize(records)
        summary["goodput"] = goodput_of(records, plan.slo, summary["window_s"])
        result: dict[str, Any] = {
            "seed": seed,
            "monotonic_s": zero_s,  # of this machine's clock: where the times of requests count from
            "summary": summary,
            "client": own_load(measured),
            "server_check": server_check,
        }
        if plan.keep_records:
            result["requests"] = records
        results.append(result)
        say(
            f"{level.label}, run {repeat + 1} of {plan.repeats}: {summary['output_tokens_per_s']:,.1f} "
            f"tokens/s, {summary['num_ok']} answered, {summary['num_errors']} failed, "
            f"{summary['window_s']:.1f} s"
        )
    figures = pool(runs)
    figures["goodput"] = pooled_goodput([result["summary"]["goodput"] for result in results])
    return {
        "arrivals": level.arrivals,
        "label": level.label,
        "num_requests": num_requests,
        "num_warmup": num_warmup,
        "num_clients": crew,
        "figures": figures,
        "runs": results,
    }


async def checked(
    scraper: Scraper | None, fleet: Fleet, job: Job, crew: int
) -> tuple[list[Outcome], dict[str, Any]]:
    """Run a job -> what the clients saw, and how the server's own account of it compares."""
    if scraper is None:
        return await fleet.run(job, crew), unchecked("not asked for")
    try:
        before = await scraper.totals()
    except ScrapeError as error:
        return await fleet.run(job, crew), unchecked(str(error))
    outcomes = await fleet.run(job, crew)
    records = [record for outcome in outcomes for record in outcome.records]
    try:
        after = await settled(scraper, before, sum(record.ok for record in records))
    except ScrapeError as error:
        return outcomes, unchecked(str(error))
    return outcomes, compare(records, before, after)


async def settled(scraper: Scraper, before: Totals, num_ok: int) -> Totals:
    """The server's totals once it has counted the last answer, or when it has had the time to."""
    for _ in range(SETTLE_TRIES):
        after = await scraper.totals()
        if after.since(before).get("requests", num_ok) >= num_ok:
            break
        await asyncio.sleep(SETTLE_S)
    return after


def goodput_of(records: Sequence[Record], slo: Slo | None, window_s: float) -> dict[str, Any] | None:
    if slo is None:
        return None
    return goodput([record for record in records if not record.warmup], slo, window_s)


def pooled_goodput(runs: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of a level: rates are those of the repeats, least to most; the share is over all their requests."""
    known = sorted((run for run in runs if run), key=lambda run: run["requests_per_s"])
    if not known:
        return None
    rates = [run["requests_per_s"] for run in known]
    num_measured = sum(run["num_measured"] for run in known)
    num_good = sum(run["num_good"] for run in known)
    return {
        "slo": known[0]["slo"],
        "good_share": num_good / num_measured if num_measured else 0.0,
        "requests_per_s": {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]},
        "missed": {name: sum(run["missed"][name] for run in known) for name in known[0]["missed"]},
    }


def records_of(outcomes: Sequence[Outcome]) -> tuple[list[Record], float]:
    """All processes' records in the order of their requests, counted from the first that was due; and when
    that was on the clock that all processes of this machine share."""
    records = sorted((record for outcome in outcomes for record in outcome.records), key=lambda r: r.index)
    zero_s = min(record.scheduled_s for record in records)
    for record in records:
        record.rebase(zero_s)
    return records, zero_s


def own_load(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the processes cost: `cpu_share` is the busiest one's share of a core."""
    num_events = sum(len(record.arrivals) for outcome in outcomes for record in outcome.records)
    return {
        "cpu_share": max(outcome.cpu_share for outcome in outcomes),
        "cpu_us_per_event": 1e6 * sum(outcome.cpu_s for outcome in outcomes) / max(1, num_events),
        "lag_s": describe(lag_s for outcome in outcomes for lag_s in outcome.lags_s),
        "dispatch_delay_s": describe(
            record.sent_s - record.scheduled_s for outcome in outcomes for record in outcome.records
        ),
        "processes": [{"cpu_s": outcome.cpu_s, "wall_s": outcome.wall_s} for outcome in outcomes],
    }
