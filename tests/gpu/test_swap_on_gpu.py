"""Engines that take each other's place on one GPU. `pytest -m gpu -s`, by hand."""

import asyncio
import statistics
from collections.abc import Callable

import pytest
import torch

from service import device as devices
from tests.gpu.swaps import GIB, greedy, swap_to, swapping
from tests.held_resources import device_bytes, held

pytestmark = pytest.mark.gpu
SWAPS_THERE_AND_BACK = 10


def meter() -> Callable[[], int]:
    """Tells what this process and its engines hold, in bytes; where NVML does not, what all processes do."""
    torch.zeros(1, device="cuda")  # a context: NVML lists who has one
    uuid = devices.device_uuid(torch.device("cuda"))
    if device_bytes(uuid) is None:
        print("the memory of all processes counts: NVML does not tell ours apart")
        return used_by_all

    def used_by_us() -> int:
        ours = device_bytes(uuid)
        assert ours is not None
        return ours

    return used_by_us


def used_by_all() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_twenty_swaps_leave_the_device_as_it_was() -> None:
    """Memory within 1 % of what the second swap left, the same answers, nothing left in the front."""

    async def run() -> None:
        used_bytes = meter()
        empty = used_bytes()
        seconds: dict[str, list[float]] = {"fp16": [], "nf4": []}
        async with swapping() as (client, swapper):
            answer = await greedy(client)
            for turn in range(SWAPS_THERE_AND_BACK):
                for precision in ("nf4", "fp16"):
                    done = await swap_to(swapper, precision)
                    assert (done["outcome"], done["precision"]) == ("swapped", precision)
                    assert done["canary"]["prefill_kl_nats"] <= done["canary"]["bound_nats"]
                    seconds[precision].append(done["seconds"])
                if turn == 0:  # what is made once is made
                    taken, holding = used_bytes() - empty, held()
                    assert taken > 3 * GIB
                assert abs(used_bytes() - empty - taken) <= 0.01 * taken
                assert await greedy(client) == answer
            assert held() == holding
            print("canary", done["canary"])
        for precision, values in seconds.items():
            middle, least, most = statistics.median(values), min(values), max(values)
            print(f"to {precision}: {middle:.2f} s, {least:.2f} to {most:.2f} in {len(values)} swaps")
        assert used_bytes() - empty <= 0.01 * taken

    asyncio.run(run())
