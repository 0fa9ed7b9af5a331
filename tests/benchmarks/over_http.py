"""Each precision's server in turn, from its start to its figures over HTTP, for docs/performance.md.

    python -m tests.benchmarks.over_http preset:llama-3.1-8b --load-format random --tokenizer FOLDER \
        --precisions fp16,awq --levels 1,16,64,256 --out figures/

What this program does not know goes on to `halftone serve`. Of each precision it keeps the server's log, the
bench's JSON and the last `/metrics` in `--out`, and prints seconds to ready, tokens/s and latencies of each
level, and what the server itself says of a request's phases. A server that does not come up is told, and
the next one follows.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

POLL_S = 0.05
PHASES = ("queue", "prefill", "decode")
COLUMNS = (
    "streams", "tokens/s", "TTFT ms p50 / p99", "ITL ms p50 / p99 / p99.9", "TPOT ms p50", "pauses, ms at s",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
SHOWN_PAUSES = 3


def seconds_to_ready(url: str, server: subprocess.Popen[bytes], limit_s: float) -> float | None:
    """From now on; None where the server ended or took longer."""
    started = time.monotonic()
    while server.poll() is None and time.monotonic() - started < limit_s:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return time.monotonic() - started
        except (urllib.error.URLError, ConnectionError):
            time.sleep(POLL_S)
    return None


def phases(metrics: str) -> str:
    """Mean milliseconds of a request's phases, by the server's own clock."""
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    told = []
    for phase in PHASES:
        name = f"halftone_{phase}_seconds"
        count = values.get(f"{name}_count", 0)
        told.append(f"{phase} {values[f'{name}_sum'] / count * 1e3:.1f}" if count else f"{phase} -")
    return ", ".join(told)


def row(level: dict[str, Any]) -> str:
    figures = level["figures"]

    def ms(figure: str, *points: str) -> str:
        return " / ".join(f"{figures[f'{figure}_s'][point] * 1e3:.1f}" for point in points)

    summary = level["runs"][0]["summary"]
    rate, longest = summary["output_tokens_per_s"], summary["pauses"][:SHOWN_PAUSES]
    pauses = ", ".join(f"{pause['seconds'] * 1e3:.1f} at {pause['start_s']:.1f}" for pause in longest)
    return (
        f"| {level['arrivals']['concurrency']} | {rate:,.0f} | {ms('ttft', 'p50', 'p99')} "
        f"| {ms('itl', 'p50', 'p99', 'p99.9')} | {ms('tpot', 'p50')} | {pauses} |"
    )


def measure(precision: str, arguments: argparse.Namespace, passed_on: list[str]) -> None:
    out: Path = arguments.out / precision.replace(":", "_").replace(",", "_")
    out.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{arguments.port}"
    command = [sys.executable, "-m", "service", "serve", arguments.model, "--precision", precision]
    command += ["--port", str(arguments.port), *passed_on]
    with (
        (out / "server.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            ready_s = seconds_to_ready(url, server, arguments.ready_limit)
            if ready_s is None:
                print(f"{precision}: not ready; the end of {out / 'server.log'}:")
                print((out / "server.log").read_text(errors="replace")[-1500:], flush=True)
                return
            print(f"\n{precision}: ready after {ready_s:.1f} s\n")
            print(HEADER, flush=True)
            for concurrency in arguments.levels.split(","):
                found = out / f"bench-{concurrency}.json"
                bench = [sys.executable, "-m", "service", "bench", "--url", url, "--concurrency", concurrency]
                bench += ["--input-tokens", str(arguments.input_tokens), "--json", str(found)]
                bench += ["--output-tokens", str(arguments.output_tokens)]
                if arguments.requests:
                    bench += ["--requests", str(arguments.requests * int(concurrency))]
                with (out / "bench.log").open("ab") as said:
                    subprocess.run(bench, stdout=said, stderr=said, check=False)
                if found.is_file():
                    for level in json.loads(found.read_bytes())["levels"]:
                        print(row(level), flush=True)
                else:
                    print(f"| {concurrency} | failed, see {out / 'bench.log'} | | | | |", flush=True)
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
                metrics = answer.read().decode()
            (out / "metrics.txt").write_text(metrics)
            print(f"\nof a request, by the server, ms on average: {phases(metrics)}", flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precisions", default="fp16", help="separated by commas")
    parser.add_argument("--levels", default="1,16,64,256", help="streams of each closed loop")
    parser.add_argument("--requests", type=int, default=0, help="of each stream; 0: the bench's own default")
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--ready-limit", type=float, default=180, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    arguments, passed_on = parser.parse_known_args()
    for precision in arguments.precisions.split(","):
        measure(precision, arguments, passed_on)


if __name__ == "__main__":
    main()
