"""Engines under a supervisor on a GPU, one of which takes the other's place."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from service.front.engine_client import EngineClient
from service.front.supervisor import Supervisor
from service.front.swap import Swapper
from service.messages import EngineConfig, Output, Sampling
from service.metrics import Metrics
from service.model.hub import PRESETS

SHAPE = PRESETS / "llama-3.2-1b"
TIMEOUTS = {"load_timeout_s": 300.0, "step_timeout_s": 60.0}
GIB = 1 << 30


def supervise(config: EngineConfig, client: EngineClient, metrics: Metrics) -> Supervisor:
    return Supervisor(config, client, metrics, **TIMEOUTS)


@contextlib.asynccontextmanager
async def swapping(**settings: Any) -> AsyncIterator[tuple[EngineClient, Swapper]]:
    metrics = Metrics("llama", "fp16")
    client = EngineClient(64, metrics)
    config = EngineConfig(
        model_path=str(SHAPE),
        precision="fp16",
        device="cuda",
        load_format="random",
        kv_tokens=32768,
        max_batch_requests=16,
        **settings,
    )
    supervisor = supervise(config, client, metrics)
    swapper = Swapper(client, supervisor, metrics, drain_timeout_s=60)
    supervisor.start()
    try:
        await client.wait_ready()
        yield client, swapper
    finally:
        await swapper.close()
        await supervisor.stop()


async def swap_to(swapper: Swapper, precision: str) -> dict[str, Any]:
    events = [event async for event in (await swapper.begin(precision)).events()]
    return events[-1]


async def greedy(client: EngineClient) -> list[int]:
    ended = asyncio.Event()
    token_ids: list[int] = []

    def sink(output: Output, received_at: float) -> None:
        token_ids.extend(output.token_ids)
        if output.finish_reason is not None:
            ended.set()

    client.open(list(range(100, 200)), Sampling(64, temperature=0, ignore_eos=True), b"", sink)
    await ended.wait()
    return token_ids
