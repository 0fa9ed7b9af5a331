"""How much of what an engine makes reaches the clients: the fake engine alone, then behind our whole front.

    python tests/benchmarks/http_share.py [--streams 256] [--step-ms 20] [--tokens 400] [--runs 3]

The fake computes nothing and paces its steps. Alone, this process drains its socket; behind the front, the
load generator asks for the same number of streams over HTTP. Both give tokens/s from when the last stream has
its first token to when the first stream ends, and take turns. The front's share of a core is the growth of
its user + system time over the whole run.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "front")]

import msgspec  # noqa: E402
from engine_rig import FAKE_ENGINE, write_tokenizer  # noqa: E402

from loadtest.statistics import Record  # noqa: E402
from service.api.app import create_app  # noqa: E402
from service.config import Settings  # noqa: E402
from service.front.host import Host, run_loop, spare_from_collections  # noqa: E402
from service.messages import (  # noqa: E402
    HEADER,
    EngineConfig,
    EngineMessage,
    Ready,
    Sampling,
    Step,
    Submit,
    engine_decoder,
    frame,
)

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PROMPT_TOKENS = 32
ANSWERED = (0, 4)  # 4: the server counts shorter TTFTs than a client whose requests all come at once


@dataclass
class Served:
    """One run behind the front."""

    tokens_per_s: float
    front_cpu_share: float
    front_us_per_token: float
    client_cpu_share: float
    itl_p50_s: float
    itl_p99_s: float


async def serve(num_streams: int) -> None:
    """The server's process: says its address, serves until its standard input ends."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        settings = Settings(
            model=folder, served_model_name="demo", port=0, max_batch_requests=num_streams,
            max_queue_requests=2 * num_streams,
        )  # fmt: skip
        async with Host(settings, Path(folder), create_app, command=FAKE_ENGINE) as host:
            await host.ready()
            spare_from_collections()  # as `serve` does
            print(host.url, flush=True)
            await asyncio.to_thread(sys.stdin.read)


def messages(connection: socket.socket) -> list[EngineMessage]:
    """What one read brings; a frame that is not whole yet is waited for."""
    data = bytearray(connection.recv(1 << 20))
    found = []
    while data:
        while len(data) < HEADER.size or len(data) < HEADER.size + HEADER.unpack_from(data)[0]:
            data += connection.recv(1 << 20)
        end = HEADER.size + HEADER.unpack_from(data)[0]
        found.append(engine_decoder.decode(bytes(data[HEADER.size : end])))
        del data[:end]
    return found


def alone(options: argparse.Namespace, environment: dict[str, str]) -> float:
    """Tokens/s of the engine's own process while all streams run."""
    ours, theirs = socket.socketpair()
    config = EngineConfig(model_path="/nowhere", precision="auto", max_batch_requests=options.streams)
    command = [*FAKE_ENGINE, "--fd", str(theirs.fileno()), "--config", msgspec.json.encode(config).decode()]
    with ours, subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        while not any(isinstance(message, Ready) for message in messages(ours)):
            pass
        for number in range(options.streams):
            prompt = [5 + number] * PROMPT_TOKENS
            ours.sendall(frame(Submit(number, prompt, Sampling(options.tokens, ignore_eos=True))))
        times_s: list[float] = []
        while len(times_s) < options.tokens // 2:
            steps = [message for message in messages(ours) if isinstance(message, Step)]
            times_s += [time.monotonic()] * sum(len(step.outputs) == options.streams for step in steps)
        process.kill()
    return options.streams * (len(times_s) - 1) / (times_s[-1] - times_s[0])


def behind_front(options: argparse.Namespace, environment: dict[str, str]) -> Served:
    """The same streams through HTTP, read by the load generator."""
    command = [sys.executable, __file__, "--serve", "--streams", str(options.streams)]
    with (
        tempfile.NamedTemporaryFile(suffix=".json") as file,
        subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        load = [
            *(sys.executable, "-m", "loadtest", "--url", url, "--concurrency", str(options.streams)),
            *("--requests", str(options.streams), "--warmup", "0", "--clients", str(options.clients)),
            *("--input-tokens", str(PROMPT_TOKENS), "--output-tokens", str(options.tokens)),
            *("--json", file.name, "--records"),
        ]
        before_s = cpu_s(server.pid)
        told = subprocess.run(load, cwd=ROOT, check=False, capture_output=True, text=True)
        if told.returncode not in ANSWERED:
            raise SystemExit(told.stderr)
        used_s = cpu_s(server.pid) - before_s
        server.communicate()
        (level,) = json.loads(Path(file.name).read_text())["levels"]
    figures = level["figures"]
    tokens_per_s = decoded_per_s([Record(**record) for record in level["runs"][0]["requests"]])
    front_s = used_s / (figures["output_tokens"] + options.tokens)  # the generator's first request too
    return Served(
        tokens_per_s=tokens_per_s,
        front_cpu_share=front_s * tokens_per_s,
        front_us_per_token=1e6 * front_s,
        client_cpu_share=level["runs"][0]["client"]["cpu_share"],
        itl_p50_s=figures["itl_s"]["p50"],
        itl_p99_s=figures["itl_s"]["p99"],
    )


def decoded_per_s(records: list[Record]) -> float:
    """Tokens/s that all streams together receive while each of them decodes."""
    start_s = max(record.arrivals[0][0] for record in records)
    end_s = min(record.finished_s for record in records)
    tokens = sum(record.tokens_by(end_s) - record.tokens_by(start_s) for record in records)
    return tokens / (end_s - start_s)


def cpu_s(process_id: int) -> float:
    """User + system seconds that a process has used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=400, help="length of each answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1, help="processes of the load generator")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        run_loop(serve(options.streams))
        return
    environment = {**os.environ, "FAKE_STEP_MS": str(options.step_ms), "FAKE_CONTEXT": str(10**6)}
    shares = []
    for _ in range(options.runs):
        made, served = alone(options, environment), behind_front(options, environment)
        shares.append(served.tokens_per_s / made)
        print(
            f"engine alone {made:,.0f} tokens/s, through HTTP {served.tokens_per_s:,.0f} = "
            f"{100 * shares[-1]:.1f} %; front {100 * served.front_cpu_share:.0f} % of a core, "
            f"{served.front_us_per_token:.1f} us a token; client {100 * served.client_cpu_share:.0f} %; "
            f"ITL p50 {1e3 * served.itl_p50_s:.1f}, p99 {1e3 * served.itl_p99_s:.1f} ms",
            flush=True,
        )
    low, middle, high = (100 * figure(shares) for figure in (min, statistics.median, max))
    print(
        f"{options.streams} streams, a step each {options.step_ms:g} ms: "
        f"delivered {low:.1f} to {high:.1f} %, median {middle:.1f} %"
    )


if __name__ == "__main__":
    main()
