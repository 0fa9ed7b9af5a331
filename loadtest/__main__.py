"""`halftone bench`, `python -m loadtest`: flags in, tables out, the whole result in `--json FILE`.

flags --Options--> bench.measure() --result--> table.show(), FILE
"""

import argparse
import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import orjson
from rich.console import Console

from loadtest.bench import Options, measure
from loadtest.errors import LoadTestError
from loadtest.level import Level
from loadtest.prompts import BUILTIN, DEFAULT_PROMPTS
from loadtest.runs import SEEDS
from loadtest.slo import Slo
from loadtest.table import show

DEFAULT_CONCURRENCY = "1,16"
PIPED_WIDTH = 110
EXIT_REFUSED = 2
EXIT_FAILED_REQUESTS = 3
EXIT_DISAGREEMENT = 4
EXIT_INTERRUPTED = 130

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Complains as every other command does: one line, and where to look."""

    def error(self, message: str) -> NoReturn:
        raise LoadTestError(message, hint=f"see `{self.prog} --help`")


def make_parser(program: str, more: str = "") -> Parser:
    """`more` ends the help."""
    parser = Parser(
        prog=program,
        epilog=more,
        description="Drive an OpenAI-compatible server with streamed completions of a fixed length, and "
        "report tokens/s, TTFT, ITL, TPOT and E2E.",
        allow_abbrev=False,
    )
    load = parser.add_argument_group("load: any number of levels, measured one after another")
    load.add_argument(
        "--concurrency", type=positive_ints, metavar="N,...", help="closed loops of N streams (default 1,16)"
    )
    load.add_argument(
        "--rate",
        type=positive_floats,
        default=[],
        metavar="R,...",
        help="open loops of R requests/s",
    )
    load.add_argument(
        "--arrivals",
        choices=("poisson", "constant"),
        default="poisson",
        help="when the requests of --rate come (poisson)",
    )
    load.add_argument(
        "--trace", type=Path, metavar="FILE", help="requests at recorded times, with recorded lengths"
    )
    load.add_argument(
        "--trace-speed", type=positive_float, default=1.0, metavar="X", help="times as fast as recorded (1)"
    )
    load.add_argument(
        "--requests",
        type=positive_int,
        help="a level's requests (4 a stream and 16 at least; 30 s of arrivals)",
    )
    load.add_argument(
        "--warmup",
        type=natural_int,
        help="requests before them that do not count (1 a stream; 1 s of arrivals)",
    )
    load.add_argument("--repeats", type=positive_int, default=1, help="runs of each level (1)")
    load.add_argument("--seed", type=natural_int, help="of prompts and arrivals (drawn, and printed)")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="its root (http://127.0.0.1:8000)")
    server.add_argument("--model", default="", help="name to ask for (the first that it serves)")
    server.add_argument("--api-key", default="", help="sent as a bearer token")
    server.add_argument("--timeout", type=positive_float, default=600.0, help="seconds for a request (600)")
    work = parser.add_argument_group("requests")
    work.add_argument("--input-tokens", type=positive_int, default=512, help="random ids in a prompt (512)")
    work.add_argument("--output-tokens", type=positive_int, default=256, help="length of each answer (256)")
    work.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="answers go on past an end-of-text token (where the server takes it)",
    )
    work.add_argument(
        "--prompts",
        type=prompts_path,
        metavar="FILE",
        help='texts or ids of yours: {"prompt": "..."} a line, a ShareGPT file, or `builtin`',
    )
    work.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="chat needs --prompts"
    )
    work.add_argument(
        "--vocab-size", type=positive_int, default=0, help="ids are drawn below it (the server's)"
    )
    work.add_argument(
        "--continuous-usage",
        action="store_true",
        help="have the server count the tokens of each event: exact, and more work for it",
    )
    client = parser.add_argument_group("client")
    client.add_argument(
        "--clients",
        type=client_count,
        default=0,
        metavar="N|auto",
        help="processes (auto: by load and cores)",
    )
    client.add_argument(
        "--slo", type=Slo.parse, metavar="LIMITS", help="such as ttft=500ms,itl=30ms: goodput"
    )
    client.add_argument(
        "--first-answer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for one answer before the runs, which must succeed; without it the server is known to take "
        "every field (on)",
    )
    client.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the server's own counts, and fail where they differ by more than 5 %% (on)",
    )
    client.add_argument(
        "--metrics-url", default="", metavar="URL", help="where these are (/metrics of --url)"
    )
    client.add_argument("--label", default="", help="what the JSON calls the server (its address)")
    client.add_argument("--json", type=Path, metavar="FILE", help="where the whole result goes")
    client.add_argument("--records", action="store_true", help="with the times of every token in it")
    return parser


def positive_int(text: str) -> int:
    return at_least(int, text, 1)


def natural_int(text: str) -> int:
    return at_least(int, text, 0)


def positive_float(text: str) -> float:
    value = at_least(float, text, 0)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def at_least(kind: Callable[[str], T], text: str, least: int) -> T:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number") from None
    if value < least:  # type: ignore[operator]
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value


def positive_ints(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def positive_floats(text: str) -> list[float]:
    return [positive_float(part) for part in text.split(",")]


def prompts_path(text: str) -> Path:
    return DEFAULT_PROMPTS if text == BUILTIN else Path(text)


def client_count(text: str) -> int:
    return 0 if text == "auto" else positive_int(text)


def parse_options(flags: argparse.Namespace) -> Options:
    """Raises LoadTestError for flags that do not go together."""
    if flags.endpoint == "chat" and not flags.prompts and not flags.trace:
        raise LoadTestError("`--endpoint chat` takes texts", hint="name them: `--prompts FILE.jsonl`")
    if flags.trace and (flags.concurrency or flags.rate):
        raise LoadTestError(
            "`--trace` is a load of its own", hint="leave out `--concurrency` and `--rate`, or measure twice"
        )
    if flags.arrivals != "poisson" and not flags.rate:
        raise LoadTestError("`--arrivals` is of an open loop", hint="add `--rate R`")
    if flags.trace_speed != 1 and not flags.trace:
        raise LoadTestError("`--trace-speed` is of a trace", hint="add `--trace FILE`")
    if flags.metrics_url and not flags.check:
        raise LoadTestError("`--metrics-url` is for the check", hint="leave out `--no-check`")
    if flags.records and not flags.json:
        raise LoadTestError("`--records` goes into the file of `--json`", hint="add `--json FILE`")
    if flags.json and not flags.json.absolute().parent.is_dir():
        raise LoadTestError(f"`--json` {flags.json}: there is no such folder")
    others = flags.rate or flags.trace
    closed = flags.concurrency or ([] if others else positive_ints(DEFAULT_CONCURRENCY))
    return Options(
        url=flags.url.rstrip("/"),
        levels=[
            *(Level("closed", concurrency=streams) for streams in closed),
            *(Level(flags.arrivals, rate_per_s=rate) for rate in flags.rate),
        ],
        trace=flags.trace,
        trace_speed=flags.trace_speed,
        label=flags.label,
        model=flags.model,
        api_key=flags.api_key,
        endpoint=flags.endpoint,
        prompts=flags.prompts,
        input_tokens=flags.input_tokens,
        output_tokens=flags.output_tokens,
        ignore_eos=flags.ignore_eos,
        continuous_usage=flags.continuous_usage,
        vocab_size=flags.vocab_size,
        num_requests=flags.requests,
        num_warmup=flags.warmup,
        repeats=flags.repeats,
        clients=flags.clients,
        # a seed that was used before finds its prompts in the server's prefix cache
        seed=random.randrange(SEEDS) if flags.seed is None else flags.seed,
        timeout_s=flags.timeout,
        slo=flags.slo,
        asks_first=flags.first_answer,
        check=flags.check,
        metrics_url=flags.metrics_url,
        keep_records=flags.records,
    )


def main(arguments: Sequence[str] | None = None, program: str = "python -m loadtest", more: str = "") -> int:
    """-> exit status: 0, 2 where nothing could be measured, 3 where some requests failed, 4 where client and
    server disagree on what happened (1 is a crash)."""
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        flags = make_parser(program, more).parse_args(arguments)
        result = asyncio.run(measure(parse_options(flags), lambda line: progress.print(line, markup=False)))
        if flags.json:
            write(flags.json, result)
    except LoadTestError as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    show(result, Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH))
    if any(level["figures"]["num_errors"] for level in result["levels"]):
        return EXIT_FAILED_REQUESTS
    checks = [run["server_check"]["agrees"] for level in result["levels"] for run in level["runs"]]
    return EXIT_DISAGREEMENT if False in checks else 0


def write(path: Path, result: dict[str, Any]) -> None:
    """Raises LoadTestError where the disk is full, say."""
    try:
        path.write_bytes(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))
    except OSError as error:
        raise LoadTestError(f"`--json` {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
