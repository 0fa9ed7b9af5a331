"""Several engines in one server: names, shares of the memory, and failures of one or the other."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_rig import FAKE_ENGINE
from metric_samples import sample

from service.config import Settings
from service.errors import (
    DeviceError,
    EngineUnavailableError,
    HalftoneError,
    ModelNotFoundError,
    PrecisionError,
    SettingError,
)
from service.front.engine_client import EngineClient
from service.front.residents import Residents, precisions_of
from service.front.supervisor import Supervisor
from service.messages import EngineConfig
from service.metrics import Metrics

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def residing(resident: str = "bf16,nf4", **settings: Any) -> AsyncIterator[Residents]:
    def supervise(config: EngineConfig, client: EngineClient, metrics: Metrics) -> Supervisor:
        return Supervisor(config, client, metrics, load_timeout_s=30, step_timeout_s=30, command=FAKE_ENGINE)

    residents = Residents(
        Settings(model="org/demo", resident=resident, **settings), Path("/nowhere"), supervise
    )
    async with asyncio.timeout(60):
        try:
            yield residents
        finally:
            await residents.stop()


async def all_ready(residents: Residents) -> None:
    for resident in residents.all:
        await resident.client.wait_ready()


async def test_each_has_a_name_and_the_first_the_plain_one() -> None:
    async with residing("bf16,nf4,nf4:double_quant=off") as residents:
        residents.start()
        await all_ready(residents)
        assert residents.names == ["demo@bf16", "demo@nf4", "demo@nf4:double_quant=off"]
        first, second, third = residents.all
        assert residents.find("demo") is residents.find(None) is residents.find("demo@bf16") is first
        assert residents.find("demo@nf4") is residents.find("demo@nf4:double_quant=on") is second
        assert residents.find("demo@nf4:double_quant=off") is third
        for name in ("demo@int8", "demo@", "@nf4", "other@nf4", "demo@nf5", "demo@nf4@nf4"):
            with pytest.raises(ModelNotFoundError, match="served is `demo@bf16`, `demo@nf4`, `demo@nf4:d"):
                residents.find(name)


async def test_one_engine_has_the_plain_name_and_answers_to_its_precision() -> None:
    async with residing("", precision="nf4") as residents:
        residents.start()
        await all_ready(residents)
        assert residents.names == ["demo"]
        assert residents.find("demo") is residents.find("demo@nf4:double_quant=on") is residents.first


async def test_the_second_starts_when_the_first_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    async with residing("bf16,nf4") as residents:
        first, second = residents.all
        assert (first.supervisor.config.beside, second.supervisor.config.beside) == (("nf4",), ())
        residents.start()
        await asyncio.sleep(0)
        assert second.supervisor.process is None
        await first.client.wait_ready()
        await second.client.wait_ready()
        for resident in residents.all:  # what each asks for when it is started again
            assert resident.client.info is not None
        await asyncio.sleep(0)
        assert first.supervisor.config.kv_tokens == 65536
        assert first.supervisor.config.beside == ()


async def test_one_that_dies_does_not_touch_the_other() -> None:
    async with residing() as residents:
        residents.start()
        await all_ready(residents)
        first, second = residents.all
        assert second.supervisor.process is not None
        os.kill(second.supervisor.process.pid, signal.SIGKILL)
        await second.client.wait_for("down")
        assert first.client.state == "ready"
        await second.client.wait_ready()
        page = (await residents.render_metrics()).decode()
        assert 'engine_restarts_total{model="demo",precision="nf4"} 1.0' in page
        assert 'engine_restarts_total{model="demo",precision="bf16"} 0.0' in page
        assert page.count("# TYPE halftone_engine_up gauge") == 1
        assert sample(first.metrics, "halftone_engine_up", precision="bf16") == 1


@pytest.mark.parametrize("fails", ["bf16", "nf4"])
async def test_one_that_cannot_load_stops_the_start(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setenv("FAKE_ONLY", fails)
    monkeypatch.setenv("FAKE_FATAL", "device_unusable:no room for the weights")
    async with residing() as residents:
        residents.start()
        with pytest.raises(DeviceError, match="no room"):
            await all_ready(residents)


async def test_the_same_precision_twice_is_found_at_the_latest_when_it_is_known() -> None:
    """`auto` is bf16 here, which the settings could not know."""
    async with residing("auto,bf16") as residents:
        residents.start()
        with pytest.raises(PrecisionError, match="`auto` and `bf16` are the same precision"):
            await all_ready(residents)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"resident": "nf4"}, SettingError, "two or more precisions are needed"),
        ({"resident": "bf16,nf4,bf16"}, SettingError, "each once"),
        ({"resident": "nf4,nf4:double_quant=on"}, SettingError, "each once"),
        ({"resident": "bf16,nf4", "precision": "nf4"}, SettingError, "each names what is served"),
        ({"resident": "bf16,nf5"}, PrecisionError, "`nf5` does not exist"),
        ({"resident": "bf16,nf4:x=1"}, PrecisionError, "option `x=1`"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    settings: dict[str, str], error: type[HalftoneError], words: str
) -> None:
    with pytest.raises(error, match=words):
        precisions_of(Settings(**settings))  # type: ignore[arg-type]


async def test_shutdown_before_the_second_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANG_AT_LOAD", "1")
    async with residing() as residents:
        residents.start()
        await asyncio.sleep(0)
        residents.drain()
        await residents.stop()
        with pytest.raises(EngineUnavailableError):
            await residents.all[1].client.wait_ready()
