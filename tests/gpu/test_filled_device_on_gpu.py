"""Swaps and engines for which a GPU is too small, or just large enough. `pytest -m gpu -s`, by hand.

They fill the device: beside them nothing else finds room.
"""

import asyncio
from pathlib import Path

import pytest
import torch

from service.config import Settings
from service.front.residents import Residents
from tests.gpu.swaps import GIB, SHAPE, greedy, supervise, swap_to, swapping

pytestmark = pytest.mark.gpu


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
