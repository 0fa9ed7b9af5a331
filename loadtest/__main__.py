"""`python -m loadtest --url URL --model NAME (--concurrency N | --rate R) [--json OUT]`

flags --measure()--> records and figures --> a few lines here, all of it in OUT
"""

import argparse
import asyncio
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import orjson

from loadtest.client import Client
from loadtest.drive import OwnLoad, closed_loop, open_loop
from loadtest.statistics import Record, summarize
from loadtest.workload import DEFAULT_PROMPTS, Prompts, Workload, poisson_arrivals

FORMAT = "loadtest/1"
BUSY_CPU_SHARE = 0.5
LATE_WAKE_S = 0.01


class NoAnswerError(Exception):
    """The server answered not even one small request."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    parser.add_argument("--url", required=True, help="root of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="name to ask for")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    arrivals = parser.add_mutually_exclusive_group(required=True)
    arrivals.add_argument("--concurrency", type=positive_int, help="closed loop: streams that each wait")
    arrivals.add_argument("--rate", type=positive_float, help="open loop: requests/s, Poisson by --seed")
    parser.add_argument("--requests", type=positive_int, default=64, help="measured requests")
    parser.add_argument("--warmup", type=int, default=8, help="requests before them that do not count")
    parser.add_argument("--output-tokens", type=positive_int, default=64, help="length of every answer")
    parser.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS, help="JSONL with a `prompt` a line")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="random ids of this length, no texts")
    parser.add_argument("--vocab-size", type=int, default=0, help="random ids are drawn below it")
    parser.add_argument("--seed", type=int, default=0, help="order of prompts, ids and arrivals")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--timeout", type=positive_float, default=600.0, help="seconds for one request")
    parser.add_argument("--json", type=Path, help="where the records and figures go")
    options = parser.parse_args(arguments)
    if options.prompt_tokens and (options.endpoint == "chat" or options.vocab_size < 1):
        parser.error("--prompt-tokens needs --endpoint completions and --vocab-size")
    return options


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def positive_float(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


async def negotiate(client: Client, workload: Workload) -> dict[str, bool]:
    """Which extensions the server takes: one short request each, the fullest first.

    A server that refuses one with a 4xx is asked again without it; what was settled stands in the result.
    """
    short = dataclasses.replace(workload, output_tokens=2)
    for ignore_eos, continuous_usage in ((True, True), (True, False), (False, True), (False, False)):
        record = Record(-1, asyncio.get_running_loop().time())
        body = short.body(0, ignore_eos=ignore_eos, continuous_usage=continuous_usage)
        status = await client.send(body, record)
        if record.ok:
            return {"ignore_eos": ignore_eos, "continuous_usage": continuous_usage}
        if status not in (400, 422):
            break
    raise NoAnswerError(record.error)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run -> what `--json` holds."""
    prompts = Prompts.load(options.prompts)
    workload = Workload(
        model=options.model,
        prompts=prompts,
        output_tokens=options.output_tokens,
        endpoint=options.endpoint,
        seed=options.seed,
        prompt_tokens=options.prompt_tokens,
        vocab_size=options.vocab_size,
    )
    client = Client(options.url, options.endpoint, options.api_key, options.timeout)
    features = await negotiate(client, workload)

    async def send(index: int, record: Record) -> None:
        await client.send(workload.body(index, **features), record)

    own = OwnLoad()
    watch = asyncio.create_task(own.watch())
    if options.rate:
        arrivals_s = poisson_arrivals(options.warmup + options.requests, options.rate, options.seed)
        records = await open_loop(send, arrivals_s, options.warmup)
        arrivals: dict[str, Any] = {"kind": "poisson", "rate_per_s": options.rate}
    else:
        records = await closed_loop(send, options.warmup, options.requests, options.concurrency)
        arrivals = {"kind": "closed", "concurrency": options.concurrency}
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    zero_s = min(record.scheduled_s for record in records)
    for record in records:
        record.rebase(zero_s)
    return {
        "format": FORMAT,
        "url": options.url,
        "model": options.model,
        "endpoint": options.endpoint,
        "arrivals": arrivals,
        "seed": options.seed,
        "num_requests": options.requests,
        "num_warmup": options.warmup,
        "output_tokens": options.output_tokens,
        "prompts": {
            "source": f"{options.prompt_tokens} random ids" if options.prompt_tokens else prompts.source,
            "sha256": "" if options.prompt_tokens else prompts.sha256,
        },
        "features": features,
        "summary": summarize(records, options.output_tokens),
        "client": own.summary(records),
        "requests": records,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for a terminal, with what the generator itself cost."""
    summary, own = result["summary"], result["client"]
    said = [
        f"{summary['num_ok']} requests answered, {summary['num_errors']} failed, "
        f"{summary['num_short']} shorter than {result['output_tokens']} tokens; "
        f"{result['num_warmup']} more for warm-up ({summary['num_warmup_errors']} failed)",
        f"{summary['output_tokens_per_s']:.1f} output tokens/s, {summary['requests_per_s']:.2f} requests/s "
        f"over {summary['window_s']:.1f} s",
    ]
    said += [f"  {count} x {error}" for error, count in summary["errors"].items()]
    for name in ("ttft", "itl", "tpot", "e2e"):
        if figures := summary[f"{name}_s"]:
            values = "  ".join(f"{key} {1e3 * figures[key]:8.2f}" for key in ("p50", "p95", "p99"))
            said.append(f"{name.upper():4} ms  {values}  n {figures['n']}")
    lag = own["lag_s"]
    late = f"woke late by p99 {1e3 * lag['p99']:.1f} ms" if lag else "ended before a first wake-up"
    said.append(f"load generator: {100 * own['cpu_share']:.0f} % of one core, {late}")
    if own["cpu_share"] > BUSY_CPU_SHARE or (lag and lag["p99"] > LATE_WAKE_S):
        said.append("  warning: the generator was short of CPU; latencies above hold some of its own")
    if summary["counted_by"] == ["chunks"]:
        said.append("  note: the server counts no tokens a chunk; ITL is the gap between chunks")
    if not result["features"]["ignore_eos"]:
        said.append("  note: the server does not take `ignore_eos`; answers may be shorter than asked")
    return said


def main(arguments: list[str] | None = None) -> int:
    """-> exit status: 0, 2 where no request could be made, 3 where some failed (1 is a crash)."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        result = asyncio.run(measure(options))
    except (NoAnswerError, OSError, ValueError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_bytes(orjson.dumps(result))
    print("\n".join(lines(result)))
    return 3 if result["summary"]["num_errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
