"""One client process: `python -m loadtest.worker`, told by frames on its standard input what to send.

fleet --Job--> prepares the bodies, says so --start time--> drive, client --Outcome--> fleet

It ends when its standard input does, also in the middle of a run: nobody is left to hear of it.
"""

import asyncio
import contextlib
import gc
import os
import sys
from typing import Any, NoReturn

import orjson

from loadtest.client import Client
from loadtest.drive import OwnLoad, closed_loop, open_loop
from loadtest.job import Job, Outcome, frame, job_of
from loadtest.statistics import Record

PREPARED = "prepared"


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """-> one message. Raises IncompleteReadError at the end of the stream."""
    line = await reader.readuntil(b"\n")
    return orjson.loads(await reader.readexactly(int(line)))


async def perform(job: Job, client: Client, bodies: dict[int, bytes], start_s: float) -> Outcome:
    """Send a job's requests, from `start_s` of the event loop's clock on -> what was seen."""
    loop = asyncio.get_running_loop()

    async def send(record: Record) -> None:
        record.warmup = record.index < job.num_warmup
        record.asked_tokens = job.workload.asked_tokens(record.index)
        await client.send(bodies[record.index], record)

    own = OwnLoad()
    # what a run allocates lives to its end; a collection would stop every stream to learn that
    gc.collect()
    gc.disable()
    try:
        await asyncio.sleep(max(0.0, start_s - loop.time()))
        async with own.watched():
            if job.streams:
                records = await closed_loop(send, job.indices, job.streams)
            else:
                arrivals = [
                    (index, start_s + due_s) for index, due_s in zip(job.indices, job.due_s, strict=True)
                ]
                records = await open_loop(send, arrivals)
    finally:
        gc.enable()
    return Outcome(records, own.cpu_s, own.wall_s, own.lags_s)


async def serve(reader: asyncio.StreamReader) -> None:
    """Job after job, until the input ends."""
    while True:
        job = job_of(await read_frame(reader))
        client = Client(job.url, job.workload.endpoint, job.api_key, job.timeout_s)
        bodies = {index: job.workload.body(index) for index in job.indices}
        with contextlib.suppress(OSError):  # each request will tell
            await client.locate()
        answer(PREPARED)
        start_s = float(await read_frame(reader))
        watch = asyncio.create_task(abandoned(reader))
        outcome = await perform(job, client, bodies, start_s)
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        answer(outcome)


async def abandoned(reader: asyncio.StreamReader) -> NoReturn:
    """Ends the process where the one that started it has gone. It says nothing while a job runs."""
    await reader.read(1)
    os._exit(1)


def answer(message: Any) -> None:
    sys.stdout.buffer.write(frame(message))
    sys.stdout.buffer.flush()


async def main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    with contextlib.suppress(asyncio.IncompleteReadError):
        await serve(reader)


if __name__ == "__main__":
    asyncio.run(main())
