"""Client processes: started once, given their shares of each run, started together, ended with the bench.

bench --Job--> Fleet.run --shares--> worker processes, and Outcomes --> bench

One process stamps the tokens of a step one after another; several do so at once, and none is the limit.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtest.errors import LoadTestError
from loadtest.job import Job, Outcome, frame, outcome_of, shares
from loadtest.machine import usable_cores
from loadtest.worker import PREPARED, read_frame

STREAMS_PER_CLIENT = 32
START_DELAY_S = 0.05  # from the word to start until all begin


def num_clients(num_streams: int, asked: int) -> int:
    """Processes for one run: `asked` of them, or (0) one for every 32 streams on at most a quarter of the
    cores, as the server may be on the same machine. `num_streams` 0: an open loop, which may open many."""
    if asked:
        return min(asked, num_streams) if num_streams else asked
    most = max(1, usable_cores() // 4)
    return min(most, -(-num_streams // STREAMS_PER_CLIENT)) if num_streams else min(most, 4)


class Fleet:
    """So many client processes, for the length of a `with` block."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            for _ in range(self._size):
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "loadtest.worker"),
                        cwd=Path(__file__).resolve().parent.parent,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        start_new_session=True,  # Ctrl-C is for the bench, which ends them
                    )
                )
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes:
            await process.wait()

    async def run(self, job: Job, num_clients: int) -> list[Outcome]:
        """A whole run, shared by the first `num_clients` processes, all beginning at one time."""
        parts = shares(job, num_clients)
        crew = self._processes[: len(parts)]
        for process, part in zip(crew, parts, strict=True):
            await tell(process, part)
        for process in crew:
            said = await hear(process)
            assert said == PREPARED
        start_s = asyncio.get_running_loop().time() + START_DELAY_S
        for process in crew:
            await tell(process, start_s)
        return [outcome_of(said) for said in await asyncio.gather(*map(hear, crew))]


async def tell(process: asyncio.subprocess.Process, message: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(frame(message))
    with contextlib.suppress(ConnectionError):  # `hear` tells that it has ended
        await process.stdin.drain()


async def hear(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    try:
        return await read_frame(process.stdout)
    except asyncio.IncompleteReadError:
        code = await process.wait()
        raise LoadTestError(f"a client process ended by itself, with exit code {code}") from None
