"""One front from its port to its end, with a stub of an app and the fake engine."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_rig import ENDLESS, FAKE_ENGINE, Stream, write_tokenizer

from service.config import Settings
from service.errors import CheckpointError, EngineUnavailableError, SettingError, SystemProblem
from service.front.host import ASGIApp, Host, bind, run_loop, url_of
from service.front.http_server import HTTPServer
from service.front.residents import Residents
from service.front.text import TextCodec
from service.messages import EngineInfo, Sampling

pytestmark = pytest.mark.anyio


def stub_app(settings: Settings, residents: Residents, codec: TextCodec) -> ASGIApp:
    """Says the client's state, whatever is asked; `/stall` begins a response and never goes on."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/stall":
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.Event().wait()
        await send({"type": "http.response.body", "body": residents.first.client.state.encode()})

    return app


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@contextlib.asynccontextmanager
async def hosted(model_path: Path, **settings: Any) -> AsyncIterator[Host]:
    async with asyncio.timeout(60):
        given = {"model": str(model_path), "port": 0, **settings}
        async with Host(Settings(**given), model_path, stub_app, command=FAKE_ENGINE) as host:
            yield host


async def get(url: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(url, timeout=30) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


async def test_the_engine_is_spawned_before_what_it_does_not_need_is_imported() -> None:
    """Text and HTTP take a quarter of a second, in which the engine's process imports as well."""
    code = (
        "import sys, service.cli.serve\n"
        "print([name for name in ('uvicorn', 'fastapi', 'jinja2', 'tokenizers') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_serves_while_the_engine_loads(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANG_AT_LOAD", "1")
    async with hosted(model_path) as host:
        assert await get(host.url) == "starting"


async def test_ready_and_gone(model_path: Path) -> None:
    async with hosted(model_path) as host:
        assert (await host.ready()).precision == "bf16"
        assert await get(host.url) == "ready"
        process = host.supervisor.process
        stream = Stream()
        host.client.open([1], Sampling(ENDLESS), b"", stream)
    assert stream.outputs[-1].error == "server is shutting down"
    assert process is not None
    assert process.returncode == 0
    with pytest.raises(urllib.error.URLError):
        await get(host.url)


async def test_a_taken_port_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemProblem, match=f"port `{port}` on `127.0.0.1` is taken") as caught:
            async with Host(Settings(port=port), Path("/nowhere"), stub_app, command=FAKE_ENGINE):
                pass
        assert f"`--port {port % 65535 + 1}`" in caught.value.hint
        assert caught.value.exit_code == 4
        with pytest.raises(SystemProblem) as caught:
            async with Host(Settings(port=0, metrics_port=port), Path("/nowhere"), stub_app):
                pass
        assert "--metrics-port" in caught.value.hint


def test_a_port_that_was_just_left_can_be_taken_and_one_in_use_cannot() -> None:
    """Connections of the last server linger for a minute; two servers on one port would share requests."""
    with bind("127.0.0.1", 0, "port") as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
async def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(SettingError, match=f"`host` = `{host}`"):
        async with Host(Settings(host=host, port=0), Path("/nowhere"), stub_app):
            pass


async def test_what_began_is_ended_when_entering_fails(tmp_path: Path) -> None:
    """No tokenizer: the engine, which had been started, is gone, and the port is free."""
    host = Host(Settings(port=0), tmp_path, stub_app, command=FAKE_ENGINE)
    with pytest.raises(CheckpointError):
        async with host:
            pass
    assert host.supervisor.process is None or host.supervisor.process.returncode is not None


async def test_metrics_on_a_port_of_their_own(model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    async with hosted(model_path, metrics_port=metrics_port) as host:
        await host.ready()
        assert host.metrics_url.endswith(f":{metrics_port}")
        assert "halftone_engine_up" in await get(f"{host.metrics_url}/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await get(f"{host.metrics_url}/v1/models")


async def ready_run(host: Host) -> asyncio.Task[None]:
    """`host.run` as a task, once it is ready and hears signals."""
    ready = asyncio.Event()

    def on_ready(info: EngineInfo) -> None:
        ready.set()

    run = asyncio.create_task(host.run(on_ready))
    await ready.wait()
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(model_path: Path, number: signal.Signals) -> None:
    """Not ready at once, what is open goes on to its own end, and with it the wait."""
    async with hosted(model_path, drain_timeout_s=1000) as host:
        run = await ready_run(host)
        stream = Stream()
        host.client.open([1], Sampling(100), b"", stream)
        await stream.started.wait()
        os.kill(os.getpid(), number)
        await host.client.wait_for("draining")
        assert not stream.ended.is_set()
        assert await get(host.url) == "draining"
        with pytest.raises(EngineUnavailableError, match="is shutting down"):
            host.client.open([2], Sampling(1), b"", Stream())
        await run
        assert stream.finish_reason == "length"
        assert len(stream.token_ids) == 100
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


async def test_draining_takes_no_more_and_waits_for_the_rest(model_path: Path) -> None:
    async with hosted(model_path, drain_timeout_s=1000) as host:
        await host.ready()
        stream = Stream()
        host.client.open([1], Sampling(20), b"", stream)
        drained = asyncio.create_task(host.drain())
        await asyncio.sleep(0)
        assert host.client.state == "draining"
        with pytest.raises(EngineUnavailableError, match="is shutting down"):
            host.client.open([2], Sampling(1), b"", Stream())
        await drained
        assert stream.finish_reason == "length"


async def test_draining_has_an_end(model_path: Path) -> None:
    async with hosted(model_path, drain_timeout_s=0.2) as host:
        run = await ready_run(host)
        stream = Stream()
        host.client.open([1], Sampling(ENDLESS), b"", stream)
        os.kill(os.getpid(), signal.SIGTERM)
        await run
        assert stream.outputs[-1].error == "server is shutting down"


async def test_a_second_signal_ends_what_is_open(model_path: Path) -> None:
    async with hosted(model_path, drain_timeout_s=1000) as host:
        run = await ready_run(host)
        stream = Stream()
        host.client.open([1], Sampling(ENDLESS), b"", stream)
        os.kill(os.getpid(), signal.SIGTERM)
        await host.client.wait_for("draining")
        os.kill(os.getpid(), signal.SIGTERM)
        await run
        assert stream.outputs[-1].error == "server is shutting down"


async def test_after_a_second_signal_no_response_is_waited_for(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.front.http_server.CLOSE_GRACE_S", 1000)
    async with hosted(model_path) as host:
        run = await ready_run(host)
        reader, writer = await asyncio.open_connection(*url_of_parts(host.url))
        writer.write(b"GET /stall HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        await run
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_stop_that_is_cancelled_still_closes_the_port() -> None:
    with bind("127.0.0.1", 0, "port") as listener:
        server = HTTPServer(stub_app, backlog=16)
        await server.start(listener)
        stop = asyncio.create_task(server.stop())
        await asyncio.sleep(0)  # it has begun
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
        is_serving = [opened.is_serving() for opened in server.servers]
        for opened in server.servers:
            opened.close()
        assert is_serving == [False]


async def test_a_signal_before_ready_ends_the_load(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANG_AT_LOAD", "1")
    async with hosted(model_path) as host:
        run = asyncio.create_task(host.run(lambda info: pytest.fail("it was never ready")))
        await asyncio.sleep(0)  # it hears signals from its first turn on
        os.kill(os.getpid(), signal.SIGINT)
        await run
        assert host.client.state == "draining"


async def test_run_raises_what_the_engine_died_of(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FATAL", "invalid_checkpoint:no weights")
    async with hosted(model_path) as host:
        with pytest.raises(CheckpointError, match="no weights"):
            await host.run(lambda info: None)


async def test_a_client_that_asks_nothing_is_hung_up_on(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.front.http_protocol.HEADER_TIMEOUT_S", 0.01)
    async with hosted(model_path) as host:
        reader, writer = await asyncio.open_connection(*url_of_parts(host.url))
        assert await reader.read() == b""
        writer.close()


async def test_a_stalled_reader_does_not_keep_the_server(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.front.http_server.CLOSE_GRACE_S", 0)
    async with hosted(model_path) as host:
        name, port = url_of_parts(host.url)
        reader, writer = await asyncio.open_connection(name, port)
        writer.write(b"GET /stall HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        caplog.set_level(logging.CRITICAL)  # uvicorn tells that it cancels
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    writer.close()


def url_of_parts(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


@pytest.mark.parametrize(
    ("address", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_an_address_that_a_client_can_use(address: str, url: str) -> None:
    with socket.create_server((address, 0)) as listener:
        assert url_of(listener) == f"{url}{listener.getsockname()[1]}"


def test_run_loop_is_uvloop() -> None:
    async def module() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run_loop(module()).startswith("uvloop")
