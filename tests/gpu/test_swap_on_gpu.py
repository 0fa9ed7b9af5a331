"""Engines that take each other's place on one GPU, and two beside each other. `pytest -m gpu -s`, by hand."""

import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.config import Settings
from service.front.engine_client import EngineClient
from service.front.residents import Residents
from service.front.supervisor import Supervisor
from service.front.swap import Swapper
from service.messages import EngineConfig, Output, Sampling
from service.metrics import Metrics
from service.model.hub import PRESETS
from tests.held_resources import held

pytestmark = pytest.mark.gpu
SHAPE = PRESETS / "llama-3.2-1b"
SWAPS_THERE_AND_BACK = 10
TIMEOUTS = {"load_timeout_s": 300.0, "step_timeout_s": 60.0}
GIB = 1 << 30


def used_bytes() -> int:
    """By all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


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


def test_twenty_swaps_leave_the_device_as_it_was() -> None:
    """Memory within 1 % of what the first engine held, the same answers, nothing left in the front."""

    async def run() -> None:
        torch.cuda.init()
        empty = used_bytes()
        seconds: dict[str, list[float]] = {"fp16": [], "nf4": []}
        async with swapping() as (client, swapper):
            answer = await greedy(client)
            for precision in ("nf4", "fp16"):  # what is made once is made
                assert (await swap_to(swapper, precision))["outcome"] == "swapped"
            taken, holding = used_bytes() - empty, held()
            assert taken > 3 * GIB
            for _ in range(SWAPS_THERE_AND_BACK):
                for precision in ("nf4", "fp16"):
                    done = await swap_to(swapper, precision)
                    assert (done["outcome"], done["precision"]) == ("swapped", precision)
                    assert done["canary"]["prefill_kl_nats"] <= done["canary"]["bound_nats"]
                    seconds[precision].append(done["seconds"])
                assert abs(used_bytes() - empty - taken) <= 0.01 * taken
                assert await greedy(client) == answer
            assert held() == holding
            print("canary", done["canary"])
        for precision, values in seconds.items():
            middle, least, most = statistics.median(values), min(values), max(values)
            print(f"to {precision}: {middle:.2f} s, {least:.2f} to {most:.2f} in {len(values)} swaps")
        assert used_bytes() - empty <= 0.01 * taken

    asyncio.run(run())


def test_what_does_not_fit_is_rolled_back() -> None:
    """fp32 needs 2.5 GB more than fp16 holds; a neighbour has taken all but half of that."""

    async def run() -> None:
        async with swapping() as (client, swapper):
            answer = await greedy(client)
            neighbour = torch.empty(torch.cuda.mem_get_info()[0] - GIB, dtype=torch.uint8, device="cuda")
            done = await swap_to(swapper, "fp32")
            assert (done["outcome"], done["precision"]) == ("rolled_back", "fp16")
            assert done["error"]["code"] == "device_memory"
            print(done["error"]["message"])
            assert await greedy(client) == answer
            del neighbour
            torch.cuda.empty_cache()

    asyncio.run(run())


def test_two_precisions_share_the_device() -> None:
    """Each has weights and half of the rest for its KV cache; both answer at once."""

    async def run() -> None:
        settings = Settings(
            model="preset:llama-3.2-1b", resident="fp16,nf4", device="cuda", max_batch_requests=16
        )
        residents = Residents(settings, Path(SHAPE), supervise)
        residents.start()
        try:
            infos = [await resident.client.wait_ready() for resident in residents.all]
            first, second = (info.kv_tokens for info in infos)
            print("KV tokens", first, second, "free GiB", torch.cuda.mem_get_info()[0] / GIB)
            assert 0.8 < first / second < 1.25
            answers = await asyncio.gather(*(greedy(resident.client) for resident in residents.all))
            assert [len(answer) for answer in answers] == [64, 64]
        finally:
            residents.drain()
            await residents.stop()

    asyncio.run(run())
