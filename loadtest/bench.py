"""Levels of load, each repeated, against one server -> one self-describing result.

__main__ --Options--> measure() --Job--> fleet, and Outcomes --statistics--> the JSON of `--json`
"""

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.client import Client
from loadtest.errors import LoadTestError
from loadtest.fleet import Fleet, num_clients, usable_cores
from loadtest.job import Job, Outcome
from loadtest.statistics import FORMULAS, SYMBOLS, Record, describe, pool, summarize
from loadtest.target import Target, first_answer, look
from loadtest.workload import Endpoint, Prompts, Workload, poisson_arrivals

FORMAT = "halftone-bench/1"
SEEDS = 1_000_000  # of a user; each run adds as much, so that no run asks what another has asked
REQUESTS_PER_STREAM = 4
LEAST_REQUESTS = 16
OPEN_LOOP_S = 30  # as much load as it takes to see a queue build up
LEAST_OPEN_REQUESTS = 32


@dataclass(frozen=True)
class Level:
    """One load: streams that wait for their answers, or (0) requests by a Poisson process."""

    concurrency: int = 0
    rate_per_s: float = 0.0

    @property
    def label(self) -> str:
        if not self.concurrency:
            return f"{self.rate_per_s:g} requests/s"
        return f"{self.concurrency} stream{'s' if self.concurrency > 1 else ''}"

    @property
    def num_requests(self) -> int:
        """Where nobody says how many."""
        if self.concurrency:
            return max(LEAST_REQUESTS, REQUESTS_PER_STREAM * self.concurrency)
        return max(LEAST_OPEN_REQUESTS, round(OPEN_LOOP_S * self.rate_per_s))

    @property
    def num_warmup(self) -> int:
        """One for each stream; in an open loop the first that come, which find no queue."""
        return self.concurrency or min(LEAST_OPEN_REQUESTS, max(2, round(self.rate_per_s)))


@dataclass(frozen=True)
class Options:
    """What is measured. `num_requests`, `num_warmup` None: the level's own number."""

    url: str
    levels: Sequence[Level]
    model: str = ""
    api_key: str = ""
    endpoint: Endpoint = "completions"
    prompts: Path | None = None  # None: random ids
    input_tokens: int = 512
    output_tokens: int = 256
    ignore_eos: bool = True
    continuous_usage: bool = False
    vocab_size: int = 0  # 0: the server's
    num_requests: int | None = None
    num_warmup: int | None = None
    repeats: int = 1
    clients: int = 0  # 0: by load and cores
    seed: int = 0
    timeout_s: float = 600.0
    keep_records: bool = False


async def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole bench -> what `--json` holds; `say` gets a line for each run that has ended.

    Raises LoadTestError before the first run where the prompts or the server cannot be used.
    """
    client = Client(options.url, options.endpoint, options.api_key, options.timeout_s)
    try:
        prompts = Prompts.load(options.prompts) if options.prompts else None
    except (OSError, ValueError) as error:
        raise LoadTestError(
            f"`--prompts` cannot be used: {error}", hint='write one object a line: {"prompt": "..."}'
        ) from None
    target = await look(client, options.url, options.model)
    workload = make_workload(options, target, prompts)
    started = datetime.now(UTC)
    first = await first_answer(client, workload)
    crews = [num_clients(level.concurrency, options.clients) for level in options.levels]
    levels = []
    async with Fleet(max(crews)) as fleet:
        for number, (level, crew) in enumerate(zip(options.levels, crews, strict=True)):
            levels.append(await measure_level(options, workload, level, number, fleet, crew, say))
            if not levels[-1]["figures"]["num_ok"]:
                say(f"{level.label}: no request was answered; the levels after it are left out")
                break
    return {
        "format": FORMAT,
        "started_at": started.isoformat(timespec="seconds"),
        "formulas": {**FORMULAS, "where": SYMBOLS},
        "machine": machine(),
        "server": {"url": options.url, "version": target.version, "model_card": target.card},
        "workload": {
            "model": target.model,
            "endpoint": options.endpoint,
            "prompts": f"{options.prompts}" if options.prompts else "random token ids",
            "prompts_sha256": prompts.sha256 if prompts else "",
            "input_tokens": workload.input_tokens or None,
            "vocab_size": workload.vocab_size or None,
            "output_tokens": options.output_tokens,
            "ignore_eos": options.ignore_eos,
            "continuous_usage": options.continuous_usage,
            "temperature": 0,
            "stream": True,
            "seed": options.seed,
        },
        "first_answer": {"ttft_s": first.ttft_s, "e2e_s": first.e2e_s},
        "levels": levels,
    }


def make_workload(options: Options, target: Target, prompts: Prompts | None) -> Workload:
    """Raises LoadTestError where the server's vocabulary is unknown, or its window too short."""
    vocab_size = 0 if prompts else options.vocab_size or target.vocab_size
    if not prompts and not vocab_size:
        raise LoadTestError(
            "the server does not tell the size of its vocabulary, below which random ids are drawn",
            hint="`--vocab-size N`, or texts with `--prompts FILE.jsonl`",
        )
    needed, window = (
        options.output_tokens + (0 if prompts else options.input_tokens),
        target.max_context_tokens,
    )
    if window and needed > window:
        raise LoadTestError(
            f"a request of {needed} tokens is too long: the window of `{target.model}` is {window}",
            hint="fewer `--input-tokens` or `--output-tokens`",
        )
    return Workload(
        model=target.model,
        texts=prompts.texts if prompts else (),
        output_tokens=options.output_tokens,
        endpoint=options.endpoint,
        seed=options.seed,
        input_tokens=0 if prompts else options.input_tokens,
        vocab_size=vocab_size,
        ignore_eos=options.ignore_eos,
        continuous_usage=options.continuous_usage,
    )


async def measure_level(
    options: Options,
    workload: Workload,
    level: Level,
    number: int,
    fleet: Fleet,
    crew: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One level's repeats. A closed loop warms up once, and that ends before the first request that counts;
    an open loop's first requests are its warm-up, in each repeat, so that it is measured under load."""
    num_requests = level.num_requests if options.num_requests is None else options.num_requests
    num_warmup = level.num_warmup if options.num_warmup is None else options.num_warmup
    runs: list[list[Record]] = []
    results = []
    for repeat in range(options.repeats):
        seed = options.seed + SEEDS * (number * options.repeats + repeat)
        job = Job(
            url=options.url,
            api_key=options.api_key,
            timeout_s=options.timeout_s,
            workload=dataclasses.replace(workload, seed=seed),
            indices=tuple(range(num_warmup + num_requests)),
            num_warmup=num_warmup,
        )
        outcomes: list[Outcome] = []
        if level.concurrency:
            job = dataclasses.replace(job, streams=tuple(range(level.concurrency)))
            warm, counted = job.indices[:num_warmup], job.indices[num_warmup:]
            if warm and not repeat:
                outcomes += await fleet.run(dataclasses.replace(job, indices=warm), crew)
            job = dataclasses.replace(job, indices=counted)
        else:
            arrivals_s = poisson_arrivals(len(job.indices), level.rate_per_s, seed)
            job = dataclasses.replace(job, due_s=tuple(arrivals_s))
        measured = await fleet.run(job, crew)
        records = records_of([*outcomes, *measured])
        runs.append(records)
        summary = summarize(records, options.output_tokens)
        result = {"seed": seed, "summary": summary, "client": own_load(measured)}
        if options.keep_records:
            result["requests"] = records
        results.append(result)
        say(
            f"{level.label}, run {repeat + 1} of {options.repeats}: {summary['output_tokens_per_s']:,.1f} "
            f"tokens/s, {summary['num_ok']} answered, {summary['num_errors']} failed, "
            f"{summary['window_s']:.1f} s"
        )
    return {
        "arrivals": {"kind": "closed", "concurrency": level.concurrency}
        if level.concurrency
        else {"kind": "poisson", "rate_per_s": level.rate_per_s},
        "label": level.label,
        "num_requests": num_requests,
        "num_warmup": num_warmup,
        "num_clients": crew,
        "figures": pool(runs, options.output_tokens),
        "runs": results,
    }


def records_of(outcomes: Sequence[Outcome]) -> list[Record]:
    """All processes' records in the order of their requests, counted from the first that was due."""
    records = sorted((record for outcome in outcomes for record in outcome.records), key=lambda r: r.index)
    zero_s = min(record.scheduled_s for record in records)
    for record in records:
        record.rebase(zero_s)
    return records


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


def machine() -> dict[str, Any]:
    """Where the clients ran: the server may be elsewhere, and tells of itself in its `/version`."""
    return {
        "cpu": cpu_name(),
        "usable_cores": usable_cores(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
