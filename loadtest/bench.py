"""Levels of load, each repeated, against one server -> one self-describing result.

__main__ --Options--> measure() --Plan--> runs, one level after another --> the JSON of `--json`
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.client import Client
from loadtest.errors import LoadTestError
from loadtest.fleet import Fleet, num_clients
from loadtest.level import Level
from loadtest.machine import machine
from loadtest.prompts import Prompt, Prompts
from loadtest.runs import Plan, measure_level
from loadtest.scrape import Scraper
from loadtest.slo import Slo
from loadtest.statistics import FORMULAS, SYMBOLS
from loadtest.target import Target, first_answer, look
from loadtest.trace import Trace, Traced
from loadtest.workload import Endpoint, Workload

FORMAT = "halftone-bench/1"


@dataclass(frozen=True)
class Options:
    """What is measured. `num_requests`, `num_warmup` None: the level's own number."""

    url: str
    levels: Sequence[Level]  # none where there is a trace
    trace: Path | None = None  # a recording, replayed as the only level
    trace_speed: float = 1.0
    label: str = ""
    model: str = ""
    api_key: str = ""
    endpoint: Endpoint = "completions"
    prompts: Path | None = None  # None: random ids, or the trace's own
    input_tokens: int = 512
    output_tokens: int = 256
    ignore_eos: bool | None = None  # None: where the server takes it
    continuous_usage: bool = False
    vocab_size: int = 0  # 0: the server's
    num_requests: int | None = None
    num_warmup: int | None = None
    repeats: int = 1
    clients: int = 0  # 0: by load and cores
    seed: int = 0
    timeout_s: float = 600.0
    slo: Slo | None = None
    asks_first: bool = True  # one request that must succeed, before the runs
    check: bool = True  # the clients' account against the server's
    metrics_url: str = ""  # empty: /metrics of `url`
    keep_records: bool = False


async def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole bench -> what `--json` holds; `say` gets a line for each run that has ended.

    Raises LoadTestError before the first run where the prompts or the server cannot be used.
    """
    client = Client(options.url, options.endpoint, options.api_key, options.timeout_s)
    prompts, trace = read_prompts(options), read_trace(options)
    target = await look(client, options.url, options.model)
    workload = make_workload(options, target, prompts, trace)
    planned = [trace_level(options, workload.trace)] if trace else options.levels
    workload = dataclasses.replace(workload, prompts=sample(prompts, options, planned))
    scraper = make_scraper(options, client, target.model) if options.check else None
    started = datetime.now(UTC)
    first: dict[str, float] | None = None
    lacks: list[str] = []
    if options.asks_first:
        record, workload, lacks = await first_answer(
            client, workload, needs_ignore_eos=options.ignore_eos is True
        )
        first = {"ttft_s": record.ttft_s, "e2e_s": record.e2e_s}
    plan = Plan(
        url=options.url,
        api_key=options.api_key,
        timeout_s=options.timeout_s,
        workload=workload,
        repeats=options.repeats,
        num_requests=options.num_requests,
        num_warmup=options.num_warmup,
        slo=options.slo,
        keep_records=options.keep_records,
        scraper=scraper,
    )
    crews = [num_clients(level.concurrency, options.clients) for level in planned]
    levels: list[dict[str, Any]] = []
    async with Fleet(max(crews)) as fleet:
        for number, (level, crew) in enumerate(zip(planned, crews, strict=True)):
            levels.append(await measure_level(plan, level, number, fleet, crew, say))
            if not levels[-1]["figures"]["num_ok"]:
                say(f"{level.label}: no request was answered; the levels after it are left out")
                break
    return {
        "format": FORMAT,
        "label": options.label or options.url,
        "started_at": started.isoformat(timespec="seconds"),
        "formulas": {**FORMULAS, "where": SYMBOLS},
        "machine": machine(),
        "server": {
            "url": options.url,
            "kind": kind_of(levels),
            "version": target.version,
            "model_card": target.card,
            "lacks": lacks,
        },
        "workload": account(options, workload, prompts, trace),
        "first_answer": first,
        "levels": levels,
    }


def read_prompts(options: Options) -> Prompts | None:
    """Raises LoadTestError for a file that cannot be used."""
    if options.prompts is None:
        return None
    try:
        prompts = Prompts.load(options.prompts)
    except (OSError, ValueError) as error:
        raise LoadTestError(
            f"`--prompts` cannot be used: {error}",
            hint='write one object a line, {"prompt": "..."}, or name a ShareGPT file',
        ) from None
    if options.endpoint == "chat" and len(prompts.texts) < len(prompts.items):
        raise LoadTestError("`--endpoint chat` takes texts, and `--prompts` holds token ids")
    return prompts


def read_trace(options: Options) -> Trace | None:
    """Raises LoadTestError for a file that cannot be used."""
    if options.trace is None:
        return None
    try:
        trace = Trace.load(options.trace)
    except (OSError, ValueError) as error:
        raise LoadTestError(
            f"`--trace` cannot be used: {error}",
            hint="docs/bench.md has the formats, with an example of each",
        ) from None
    if options.endpoint == "chat" and not options.prompts and not all(item.text for item in trace.requests):
        raise LoadTestError(
            "`--endpoint chat` takes texts, and `--trace` has lengths alone", hint="add `--prompts FILE`"
        )
    return trace


def make_workload(options: Options, target: Target, prompts: Prompts | None, trace: Trace | None) -> Workload:
    """Raises LoadTestError where the server's vocabulary is unknown, or its window too short."""
    draws_ids = not prompts and not (trace and trace.has_prompts)
    vocab_size = (options.vocab_size or target.vocab_size) if draws_ids else 0
    if draws_ids and not vocab_size:
        raise LoadTestError(
            "the server does not tell the size of its vocabulary, below which random ids are drawn",
            hint="`--vocab-size N`, or texts with `--prompts FILE`, such as `--prompts builtin`",
        )
    window = target.max_context_tokens
    recorded = trace.requests if trace else ()
    if trace and window and not prompts:
        recorded = trace.fitting(window).requests
        if not recorded:
            raise LoadTestError(
                f"no request of `--trace` fits the window of `{target.model}`, {window} tokens"
            )
    input_tokens = options.input_tokens if draws_ids and not trace else 0
    if not trace and window and input_tokens + options.output_tokens > window:
        raise LoadTestError(
            f"a request of {input_tokens + options.output_tokens} tokens is too long: the window of "
            f"`{target.model}` is {window}",
            hint="fewer `--input-tokens` or `--output-tokens`",
        )
    return Workload(
        model=target.model,
        prompts=prompts.items if prompts else (),
        output_tokens=options.output_tokens,
        endpoint=options.endpoint,
        seed=options.seed,
        input_tokens=input_tokens,
        vocab_size=vocab_size,
        ignore_eos=options.ignore_eos is not False,
        continuous_usage=options.continuous_usage,
        trace=recorded,
    )


def trace_level(options: Options, recorded: Sequence[Traced]) -> Level:
    """The requests that fit -> their load. Raises LoadTestError where more are asked for."""
    level = Level("trace", recorded_s=tuple(request.due_s for request in recorded), speed=options.trace_speed)
    num_requests, num_warmup = level.counts(options.num_requests, options.num_warmup)
    if num_requests < 1 or num_requests + num_warmup > len(recorded):
        raise LoadTestError(
            f"{num_requests} requests and {num_warmup} of warm-up before them are asked for, and `--trace` "
            f"has {len(recorded)} that fit",
            hint="fewer `--requests` or `--warmup`",
        )
    return level


def sample(prompts: Prompts | None, options: Options, planned: Sequence[Level]) -> tuple[Prompt, ...]:
    """As many of a file's prompts as the largest level has requests, drawn by the seed: all runs share them,
    and a file of a hundred thousand does not go through every pipe."""
    if prompts is None:
        return ()
    most = max(sum(level.counts(options.num_requests, options.num_warmup)) for level in planned)
    if most >= len(prompts.items):
        return prompts.items
    return tuple(random.Random(f"{options.seed}:sample").sample(prompts.items, most))


def make_scraper(options: Options, client: Client, model: str) -> Scraper:
    """Raises LoadTestError for an address that is none."""
    if not options.metrics_url:
        return Scraper(client, "/metrics", model)
    root, _, path = options.metrics_url.rpartition("/")
    # the key is for the API: a metrics port of its own may be anybody's
    return Scraper(Client(root, timeout_s=options.timeout_s), f"/{path}", model)


def kind_of(levels: Sequence[dict[str, Any]]) -> str:
    """What the server is by the names of its metrics; empty where it showed none that are known."""
    sources = [run["server_check"]["source"] for level in levels for run in level["runs"]]
    return next((source for source in sources if source), "")


def account(
    options: Options, workload: Workload, prompts: Prompts | None, trace: Trace | None
) -> dict[str, Any]:
    """What was asked, as the JSON says it."""
    if prompts:
        source = str(options.prompts)
    else:
        source = f"{options.trace}" if trace and trace.has_prompts else "random token ids"
    return {
        "model": workload.model,
        "endpoint": workload.endpoint,
        "prompts": source,
        "prompts_sha256": prompts.sha256 if prompts else "",
        "input_tokens": workload.input_tokens or None,
        "vocab_size": workload.vocab_size or None,
        "output_tokens": None if trace else workload.output_tokens,
        "trace": trace
        and {
            "file": str(options.trace),
            "sha256": trace.sha256,
            "num_requests": len(trace.requests),
            "shares_beginnings": any(request.hash_ids for request in workload.trace),
            "num_too_long": len(trace.requests) - len(workload.trace),
        },
        "ignore_eos": workload.ignore_eos,
        "continuous_usage": workload.continuous_usage,
        "temperature": 0,
        "stream": True,
        "seed": workload.seed,
    }
