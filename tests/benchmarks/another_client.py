"""TTFT and TPOT of the same requests by three observers: the wire, guidellm, and our load generator.

    halftone serve demo --precision bf16 --no-prefix-cache --port 8000
    python -m venv /tmp/other && /tmp/other/bin/pip install guidellm==0.8.1
    python tests/benchmarks/another_client.py --guidellm /tmp/other/bin/guidellm --url http://127.0.0.1:8000

A tap stands between a client and the server: it hands every byte on as it comes, and notes its time with the
load generator's own parser. guidellm and then the load generator ask through it, in turn, `--rounds` times.
So every request has two records: the tap's, and that of the client that sent it. guidellm's own TPOT divides
by another count; here both figures are computed from its timestamps with our formulas.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loadtest.client import Recorder
from loadtest.machine import cpu_name
from loadtest.statistics import Record, percentile
from loadtest.wire import Answer

READ_BYTES = 65536
NEAR_S = 0.25  # a client's start and the tap's sight of the same request
LIMIT = 0.03


@dataclass(frozen=True)
class Times:
    """One request by one observer; seconds, `start_s` on the machine's clock."""

    start_s: float
    ttft_s: float
    tpot_s: float
    tokens: int
    id: str = ""  # of the answer, where the observer keeps it


@dataclass
class Tap:
    """Hands bytes on between clients and one server, and keeps a Record of each completion."""

    host: str
    port: int
    seen: list[Times] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(self.host, self.port)
        try:
            while await self.exchange(reader, writer, from_server, to_server):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            to_server.close()
            writer.close()

    async def exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; -> whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        record = Record(0, scheduled_s=time.time())
        lines = head.decode("latin-1").split("\r\n")
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        to_server.write(head + body)
        answer, recorder, id = Answer(), Recorder(record), ""
        while not answer.complete:
            data = await from_server.read(READ_BYTES)
            now_s = time.time()
            writer.write(data)
            if not data:
                answer.end()
                break
            for event in answer.feed(data):
                id = id or json.loads(event)["id"]
                recorder.event(event, now_s)
        await writer.drain()
        recorder.end(time.time())
        if "completions" in lines[0] and record.ok:
            self.seen.append(times_of(record, record.scheduled_s, id))
        return fields.get("connection", "").lower() != "close"


def times_of(record: Record, start_s: float, id: str = "") -> Times:
    """A Record -> TTFT and TPOT by our formulas, from when the request was sent or seen."""
    assert record.ok, record.error
    first_s = record.arrivals[0][0]
    return Times(
        start_s,
        first_s - start_s,
        (record.finished_s - first_s) / (record.output_tokens - 1),
        record.output_tokens,
        id,
    )


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=None
    )
    said, _ = await process.communicate()
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{said.decode()[-3000:]}")


async def guidellm(flags: argparse.Namespace, url: str, streams: int, seed: int, folder: Path) -> list[Times]:
    out = folder / "guidellm.json"
    await run(
        *(flags.guidellm, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={url},model={flags.model},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={streams}"),
        *("--constraint", f"kind=max_requests,count={flags.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={flags.tokenizer}"),
        *(
            "--data",
            f"kind=synthetic_text,prompt_tokens={flags.input_tokens},output_tokens={flags.output_tokens}",
        ),
        *("--seed", f"kind=static,value={seed}"),
        *("--output", f"kind=json,path={out}"),
    )
    (benchmark,) = json.loads(out.read_bytes())["benchmarks"]
    found = []
    for request in benchmark["requests"]["successful"]:
        timings, tokens = request["info"]["timings"], request["output_tokens"]
        start_s, first_s = timings["request_start"], timings["first_token_iteration"]
        tpot_s = (timings["last_token_iteration"] - first_s) / (tokens - 1)
        found.append(Times(start_s, first_s - start_s, tpot_s, tokens, request["response_id"]))
    return found


async def ours(flags: argparse.Namespace, url: str, streams: int, seed: int, folder: Path) -> list[Times]:
    out = folder / "ours.json"
    await run(
        *(sys.executable, "-m", "loadtest", "--url", url, "--model", flags.model, "--no-check"),
        *("--concurrency", str(streams), "--requests", str(flags.requests), "--warmup", "0"),
        *("--input-tokens", str(flags.input_tokens), "--output-tokens", str(flags.output_tokens)),
        *("--seed", str(seed), "--clients", "1", "--json", str(out), "--records"),
    )
    ((one_run,),) = [level["runs"] for level in json.loads(out.read_bytes())["levels"]]
    records = [
        Record(**{**request, "arrivals": [tuple(pair) for pair in request["arrivals"]]})
        for request in one_run["requests"]
    ]
    # our times count from the first request that was due; only differences between them matter here
    return [times_of(record, record.sent_s) for record in records]


def paired(client: list[Times], wire: list[Times]) -> list[tuple[Times, Times]]:
    """The two records of each request: by the answer's id, or in the order of their starts."""
    if client[0].id:
        by_id = {one.id: one for one in wire}
        return [(one, by_id[one.id]) for one in client]
    wire = wire[-len(client) :]  # the first request of all only asks whether the server answers
    client, wire = (sorted(times, key=lambda one: one.start_s) for times in (client, wire))
    shift_s = client[0].start_s - wire[0].start_s
    for one, other in zip(client, wire, strict=True):
        assert abs(one.start_s - other.start_s - shift_s) < NEAR_S
        assert one.tokens == other.tokens
    return list(zip(client, wire, strict=True))


def line(name: str, pairs: list[tuple[Times, Times]]) -> bool:
    """One client against the wire; -> whether both figures are within the limit."""
    cells, fine = [], True
    for figure in ("ttft_s", "tpot_s"):
        seen = [getattr(one, figure) for one, _ in pairs]
        wire = [getattr(other, figure) for _, other in pairs]
        each = [one / other - 1 for one, other in zip(seen, wire, strict=True)]
        mean = statistics.mean(seen) / statistics.mean(wire) - 1
        fine &= abs(mean) <= LIMIT
        cells.append(
            f"{1e3 * percentile(seen, 50):9.2f} {1e3 * percentile(wire, 50):9.2f} {100 * mean:+7.2f} % "
            f"({100 * min(each):+.1f} to {100 * max(each):+.1f})"
        )
    print(f"{name:22} {len(pairs):4}  " + "   ".join(f"{cell:44}" for cell in cells), flush=True)
    return fine


async def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guidellm", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--requests", type=int, default=16, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    flags = parser.parse_args()
    about = json.loads(urlopen(f"{flags.url}/version").read())
    flags.model, flags.tokenizer = about["model"], about["engine"]["model_path"]
    host, _, port = flags.url.removeprefix("http://").partition(":")
    tap = Tap(host, int(port or 80))
    version = subprocess.run([flags.guidellm, "--version"], capture_output=True, text=True).stdout.strip()
    print(
        f"{cpu_name()}, Python {platform.python_version()}, {version}; {about['engine']['architecture']} in "
        f"{about['engine']['precision']} on {about['engine']['device']}, {flags.input_tokens} tokens in, "
        f"{flags.output_tokens} out, {flags.rounds} rounds of {flags.requests} requests"
    )
    print(
        "milliseconds, median over requests: by the client, on the wire; difference of the means "
        "(least to most of one request)"
    )
    print(f"{'client':22} {'n':>4}  {'TTFT':44}   {'TPOT':44}")
    fine = True
    async with await asyncio.start_server(tap.handle, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for streams in map(int, flags.streams.split(",")):
            seen: dict[str, list[tuple[Times, Times]]] = {"guidellm": [], "loadtest": []}
            for number in range(flags.rounds):
                for name, client in (("guidellm", guidellm), ("loadtest", ours)):
                    tap.seen.clear()
                    with tempfile.TemporaryDirectory() as folder:
                        times = await client(flags, url, streams, 1000 * streams + number, Path(folder))
                    seen[name] += paired(times, tap.seen)
            for name, pairs in seen.items():
                fine &= line(f"{name}, {streams} streams", pairs)
    print("within 3 %" if fine else "more than 3 % apart")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
