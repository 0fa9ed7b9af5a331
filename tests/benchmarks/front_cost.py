"""CPU time of the front per streamed token: the real app on a real socket, over the fake engine.

    python tests/benchmarks/front_cost.py [--streams 64] [--step-ms 20] [--seconds 5] [--runs 3] [--profile]

The server is a process of its own, so is the engine; this one is the client. The figure is the growth of the
server's user + system time in /proc/PID/stat, over the `data:` events that arrived meanwhile. It is CPU time,
not elapsed time: other work on the machine moves it little, but not by nothing, so the spread is printed.
"""

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "front")]

from engine_rig import FAKE_ENGINE, write_tokenizer  # noqa: E402

from service.api.app import create_app  # noqa: E402
from service.config import Settings  # noqa: E402
from service.front.host import Host, run_loop  # noqa: E402

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


async def serve(profile: bool) -> None:
    """The server's process: says its address, serves until its standard input ends."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        async with Host(
            Settings(model=folder, served_model_name="demo", port=0),
            Path(folder),
            create_app,
            command=FAKE_ENGINE,
        ) as host:
            await host.ready()
            print(host.url, flush=True)
            profiler = cProfile.Profile()
            if profile:
                profiler.enable()
            await asyncio.to_thread(sys.stdin.read)
            if profile:
                profiler.disable()
                pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(30)


def cpu_s(process_id: int) -> tuple[float, float]:
    """(user, system) seconds that a process has used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) * TICK_S, int(fields[12]) * TICK_S


class Client:
    """Streams that are read as bytes; only events are counted."""

    def __init__(self) -> None:
        self.num_events = 0
        self.num_started = 0

    async def stream(self, host: str, port: int, number: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        body = json.dumps(
            {"model": "demo", "stream": True, "max_tokens": 10**8, "prompt": [5, number], "temperature": 0}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b"200" not in status:
            raise SystemExit(f"the server answered {status!r}: {await reader.read(2000)!r}")
        started = False
        while data := await reader.read(1 << 16):
            num_events = data.count(b"data: ")
            self.num_events += num_events
            if num_events and not started:
                started = True
                self.num_started += 1


async def measure(url: str, process_id: int, num_streams: int, seconds: float) -> tuple[float, float, float]:
    """-> (user, system) microseconds a token, tokens a second."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    client = Client()
    streams = [asyncio.create_task(client.stream(host, int(port), number)) for number in range(num_streams)]
    while client.num_started < num_streams:
        await asyncio.sleep(0.1)
        for stream in streams:
            if stream.done():
                stream.result()
    await asyncio.sleep(1)
    loop = asyncio.get_running_loop()
    start_s, (user_s, system_s), num_events = loop.time(), cpu_s(process_id), client.num_events
    await asyncio.sleep(seconds)
    elapsed_s, (user_end_s, system_end_s) = loop.time() - start_s, cpu_s(process_id)
    num_events = client.num_events - num_events
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return (
        (user_end_s - user_s) / num_events * 1e6,
        (system_end_s - system_s) / num_events * 1e6,
        num_events / elapsed_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the server's hottest functions")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        run_loop(serve(arguments.profile))
        return
    environment = {**os.environ, "FAKE_STEP_MS": str(arguments.step_ms), "FAKE_CONTEXT": str(10**9)}
    command = [sys.executable, __file__, "--serve", *(["--profile"] if arguments.profile else [])]
    totals = []
    for _ in range(arguments.runs):
        with subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            user_us, system_us, rate = asyncio.run(
                measure(url, server.pid, arguments.streams, arguments.seconds)
            )
            server.communicate()
        totals.append(user_us + system_us)
        print(f"{totals[-1]:6.1f} us ({user_us:.1f} user, {system_us:.1f} system) at {rate:.0f} tokens/s")
    print(
        f"{arguments.streams} streams, a step each {arguments.step_ms:g} ms: median "
        f"{statistics.median(totals):.1f} us of front CPU a token, {min(totals):.1f} to {max(totals):.1f}"
    )


if __name__ == "__main__":
    main()
