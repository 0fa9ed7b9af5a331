"""One precision in the place of another: what is told, what is lost (nothing), and the way back."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from engine_rig import Rig, Stream, running
from fake_engine import CANARY, reply
from held_resources import anonymous_bytes, held
from metric_samples import sample

from service.errors import ConflictError, EngineUnavailableError, HalftoneError, RequestError
from service.front import supervisor
from service.front.swap import Swap, Swapper

pytestmark = pytest.mark.anyio

both_loops = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": use}) for use in (True, False)], ids=["uvloop", "asyncio"]
)


@contextlib.asynccontextmanager
async def swapping() -> AsyncIterator[tuple[Rig, Swapper]]:
    async with running() as rig:
        swapper = Swapper(rig.client, rig.supervisor, rig.metrics, drain_timeout_s=30)
        try:
            yield rig, swapper
        finally:
            await swapper.close()


async def told(swap: Swap) -> list[dict[str, Any]]:
    return [event async for event in swap.events()]


def counted(rig: Rig, name: str, precision: str, **labels: str) -> float | None:
    return sample(rig.metrics, f"halftone_{name}", model="demo", precision=precision, **labels)


@both_loops
async def test_there_and_back() -> None:
    async with swapping() as (rig, swapper):
        first_process = rig.process_id
        events = await told(await swapper.begin("nf4"))
        stages = [event["stage"] for event in events]
        assert stages == ["drain", "stop", "import", "load", "done"]
        assert events[3] == {"stage": "load", "done": 268_000_000, "total": 268_000_000, "unit": "bytes"}
        done = events[-1]
        assert (done["outcome"], done["precision"], done["previous"]) == ("swapped", "nf4", "bf16")
        assert done["canary"] == CANARY
        assert done["error"] is None
        assert rig.client.info is not None
        assert rig.client.info.precision == "nf4"
        assert rig.client.state == "ready"
        assert rig.process_id != first_process
        with pytest.raises(ProcessLookupError):
            os.kill(first_process, 0)
        back = (await told(await swapper.begin("bf16")))[-1]
        assert (back["outcome"], back["precision"]) == ("swapped", "bf16")
        _, stream = rig.open([5], max_tokens=3)
        await stream.ended.wait()
        assert stream.token_ids == reply([5], 3)
        for precision in ("nf4", "bf16"):
            assert counted(rig, "precision_swaps_total", precision, outcome="swapped") == 1
            assert counted(rig, "precision_swap_seconds_count", precision) == 1
        assert counted(rig, "engine_restarts_total", "bf16") == 0, "none of them died"


async def test_open_requests_end_first_and_new_ones_wait() -> None:
    async with swapping() as (rig, swapper):
        _, running_stream = rig.open([7], max_tokens=300)
        await running_stream.started.wait()
        swap = await swapper.begin("nf4")
        await rig.client.wait_for("swapping")
        waiting = [asyncio.create_task(late_request(rig, [8, number])) for number in range(5)]
        events = await told(swap)
        assert events[0] == {"stage": "drain", "done": 0, "total": 1, "unit": "requests"}
        assert running_stream.token_ids == reply([7], 300)
        assert running_stream.finish_reason == "length"
        for number, stream in enumerate(await asyncio.gather(*waiting)):
            await stream.ended.wait()
            assert stream.token_ids == reply([8, number], 4)
        assert counted(rig, "requests_accepted_total", "nf4") == 5


async def late_request(rig: Rig, prompt: list[int]) -> Stream:
    """As the API does it: past the swap, then to whatever serves."""
    await rig.client.engine_state.past_swap()
    return rig.open(prompt, max_tokens=4)[1]


async def test_nobody_waits_longer_than_allowed_nor_in_a_line_without_end() -> None:
    async with swapping() as (rig, swapper):
        _, endless = rig.open([7])
        state = rig.client.engine_state
        state.max_held_requests, state.swap_wait_s = 1, 0.05
        swap = await swapper.begin("nf4")
        await rig.client.wait_for("swapping")
        patient = asyncio.create_task(state.past_swap())
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError, match="is changing its precision") as refused:
            await state.past_swap()  # the line is full
        assert refused.value.retry_after_s >= 1
        with pytest.raises(EngineUnavailableError, match="is changing its precision"):
            await patient
        with pytest.raises(EngineUnavailableError, match="is changing its precision"):
            rig.open([9])
        assert counted(rig, "requests_rejected_total", "bf16", reason="swapping") == 3
        rig.client.abort(1)
        assert (await told(swap))[-1]["outcome"] == "swapped"
        assert not endless.ended.is_set(), "who aborts is told nothing more"


async def test_a_swap_is_given_up_for_a_stream_that_does_not_end() -> None:
    async with swapping() as (rig, swapper):
        _, endless = rig.open([7])
        await endless.started.wait()
        process_id = rig.process_id
        done = (await told(await swapper.begin("nf4", drain_timeout_s=0.05)))[-1]
        assert (done["outcome"], done["precision"]) == ("given_up", "bf16")
        assert rig.client._idle_waiters == []
        assert done["error"]["code"] == "drain_timeout"
        assert "1 of 1 open requests did not end in 0.05 s" in done["error"]["message"]
        assert rig.process_id == process_id
        assert rig.client.state == "ready"
        num_outputs = len(endless.outputs)
        while len(endless.outputs) == num_outputs:
            await asyncio.sleep(0)
        assert not endless.ended.is_set()
        assert counted(rig, "precision_swaps_total", "bf16", outcome="given_up") == 1


@pytest.mark.parametrize(
    ("failpoint", "value", "code", "message"),
    [
        ("FAKE_FATAL", "canary_failed:`nf4` is 9.1 nats off", "canary_failed", "9.1 nats off"),
        ("FAKE_FATAL", "device_unusable:no room for the weights", "device_unusable", "no room"),
        ("FAKE_DIE_AT_LOAD", "1", "engine_unavailable", "the engine in `nf4`: killed by SIGKILL"),
        ("FAKE_HANG_AT_LOAD", "1", "engine_unavailable", "not ready after 1 s"),
    ],
    ids=["canary", "memory", "dies", "hangs"],
)
async def test_what_does_not_come_up_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch, failpoint: str, value: str, code: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_ONLY", "nf4")
    monkeypatch.setenv(failpoint, value)
    async with swapping() as (rig, swapper):
        if failpoint == "FAKE_HANG_AT_LOAD":
            rig.supervisor.load_timeout_s = 1
        swap = await swapper.begin("nf4")
        await rig.client.wait_for("swapping")
        late = asyncio.create_task(late_request(rig, [3]))
        events = await told(swap)
        stages = [event["stage"] for event in events]
        at = stages.index("roll_back")
        assert stages[at + 1 :] == ["import", "load", "done"]
        assert events[at]["error"]["code"] == events[-1]["error"]["code"] == code
        assert message in events[-1]["error"]["message"]
        assert (events[-1]["outcome"], events[-1]["precision"]) == ("rolled_back", "bf16")
        stream = await late
        await stream.ended.wait()
        assert stream.token_ids == reply([3], 4)
        assert rig.supervisor.config.precision == "auto", "the next restart is of what serves"
        assert counted(rig, "precision_swaps_total", "bf16", outcome="rolled_back") == 1
        monkeypatch.delenv(failpoint)
        assert (await told(await swapper.begin("nf4")))[-1]["outcome"] == "swapped"


async def test_when_the_way_back_is_shut_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swapping() as (rig, swapper):
        monkeypatch.setenv("FAKE_FATAL", "device_unusable:the device is gone")
        swap = await swapper.begin("nf4")
        await rig.client.wait_for("swapping")
        late = asyncio.create_task(rig.client.engine_state.past_swap())
        done = (await told(swap))[-1]
        assert (done["outcome"], rig.client.state) == ("failed", "failed")
        await late
        with pytest.raises(EngineUnavailableError, match="the device is gone"):
            rig.open([1])


async def test_a_swapped_engine_that_dies_comes_back_as_what_it_was() -> None:
    async with swapping() as (rig, swapper):
        await told(await swapper.begin("nf4"))
        os.kill(rig.process_id, 9)
        await rig.client.wait_for("down")
        assert (await rig.client.wait_ready()).precision == "nf4"
        assert rig.client.info is not None
        assert rig.client.info.canary == {}, "it has passed it once"


async def test_an_engine_that_dies_while_it_is_drained_loses_nothing_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with swapping() as (rig, swapper):
        _, stream = rig.open([7])
        await stream.started.wait()
        swap = await swapper.begin("nf4")
        await rig.client.wait_for("swapping")
        os.kill(rig.process_id, 9)
        await stream.ended.wait()
        assert stream.outputs[-1].error == "engine died"
        assert (await told(swap))[-1]["outcome"] == "swapped"


async def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swapping() as (rig, swapper):
        _, endless = rig.open([7])
        first = asyncio.create_task(swapper.begin("nf4"))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="another swap is under way"):
            await swapper.begin("int8")  # it is still being looked at
        swap = await first
        with pytest.raises(ConflictError, match="another swap is under way"):
            await swapper.begin("int8")
        rig.client.abort(1)
        assert (await told(swap))[-1]["outcome"] == "swapped"
        assert not endless.ended.is_set()


async def test_what_can_never_be_served_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swapping() as (rig, swapper):
        process_id = rig.process_id
        for text in ("nf5", "nf4:double_quant", "nf4:x=1"):
            with pytest.raises(RequestError) as refused:
                await swapper.begin(text)
            assert (refused.value.status, refused.value.param) == (400, "precision")
        with pytest.raises(RequestError, match="accepted are auto, fp32, bf16"):
            await swapper.begin("nf5")
        monkeypatch.setenv("FAKE_REFUSE", "invalid_precision:`nf4` does not read it")
        with pytest.raises(RequestError, match="does not read it") as refused:
            await swapper.begin("nf4")
        assert refused.value.code == "invalid_precision"
        monkeypatch.setenv("FAKE_REFUSE", "internal_error:MemoryError")
        with pytest.raises(HalftoneError, match="MemoryError") as failed:
            await swapper.begin("nf4")
        assert failed.value.status == 500, "the request was right"
        assert (rig.process_id, rig.client.state) == (process_id, "ready")


async def test_what_is_served_is_not_swapped_for_itself() -> None:
    async with swapping() as (rig, swapper):
        process_id = rig.process_id
        for text in ("bf16", "auto"):
            (done,) = await told(await swapper.begin(text))
            assert (done["outcome"], done["precision"]) == ("unchanged", "bf16")
        assert rig.process_id == process_id


async def test_without_an_engine_to_go_back_to_there_is_no_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANG_AT_LOAD", "1")
    async with running(ready=False) as rig:
        swapper = Swapper(rig.client, rig.supervisor, rig.metrics, drain_timeout_s=1)
        with pytest.raises(EngineUnavailableError, match="is loading"):
            await swapper.begin("nf4")


@pytest.mark.parametrize("phase", ["drain", "load"])
async def test_a_server_that_is_shut_down_does_not_wait_for_a_swap(
    monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setenv("FAKE_ONLY", "nf4")
    monkeypatch.setenv("FAKE_HANG_AT_LOAD", "1")
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 0.1)
    async with swapping() as (rig, swapper):
        if phase == "drain":
            rig.open([7])
        swap = await swapper.begin("nf4")
        events = swap.events()
        async for event in events:
            if event["stage"] == ("drain" if phase == "drain" else "import"):
                break
        await swapper.close()
        await rig.supervisor.stop()
        assert rig.supervisor.process is not None
        assert rig.supervisor.process.returncode is not None
        assert rig.client.state == "down"


async def test_who_does_not_listen_keeps_nothing_waiting() -> None:
    async with swapping() as (rig, swapper):
        swap = await swapper.begin("nf4")
        async for _ in swap.events():
            break
        await rig.client.wait_for("swapping", "ready")
        await rig.client.wait_for("ready")
        assert rig.client.info is not None
        assert rig.client.info.precision == "nf4"


async def test_twenty_swaps_leave_nothing_behind() -> None:
    """Processes, descriptors, threads, tasks; memory within the noise of an allocator."""
    async with swapping() as (rig, swapper):

        async def swap_to(precision: str) -> None:
            _, stream = rig.open([len(precision)], max_tokens=2)
            done = (await told(await swapper.begin(precision)))[-1]
            assert done["outcome"] == "swapped"
            assert stream.finish_reason == "length"

        for precision in ("nf4", "bf16"):  # what is made once is made
            await swap_to(precision)
        await asyncio.sleep(0)
        before, bytes_before = held(), anonymous_bytes(os.getpid())
        for _ in range(10):
            await swap_to("nf4")
            await swap_to("bf16")
        await asyncio.sleep(0)
        assert held() == before
        assert anonymous_bytes(os.getpid()) - bytes_before < 4 << 20
        assert counted(rig, "precision_swaps_total", "nf4", outcome="swapped") == 11
