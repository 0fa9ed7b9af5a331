"""A whole front on a loopback port: real uvicorn, real sockets, the fake engine as its child."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from front_thread import running
from tiny_tokenizers import Kind, write_checkpoint

from service.api.app import create_app
from service.config import Settings
from service.front.host import Host
from service.front.text import TextCodec
from tests.metric_samples import sample

T = TypeVar("T")
FAKE_ENGINE = (sys.executable, str(Path(__file__).resolve().parent.parent / "fake_engine.py"))
TIMEOUT_S = 30


class Server:
    """A running front in a thread of its own."""

    host: Host
    loop: asyncio.AbstractEventLoop

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.codec = TextCodec.load(folder)

    @property
    def url(self) -> str:
        return self.host.url

    def http(self, **options: Any) -> httpx2.Client:
        # the server speaks plain HTTP, and reading the certificates takes longer than most tests
        return httpx2.Client(base_url=self.url, timeout=TIMEOUT_S, verify=False, **options)

    def call(self, function: Callable[[], T]) -> T:
        """`function()` on the server's event loop."""

        async def inside() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(TIMEOUT_S)

    def wait(self, make: Callable[[], Any]) -> None:
        """Awaits `make()` on the server's event loop."""

        async def inside() -> None:
            await make()

        asyncio.run_coroutine_threadsafe(inside(), self.loop).result(TIMEOUT_S)

    def settle(self) -> None:
        """Lets requests whose answers were read end: a client can be faster than their last lines."""

        async def turns() -> None:
            for _ in range(100):
                await asyncio.sleep(0)

        self.wait(turns)

    def metric(self, name: str, **labels: str) -> float:
        self.settle()
        return sample(self.host.metrics, name, precision="bf16", **labels) or 0.0


@contextlib.contextmanager
def serving(
    folder: Path, env: dict[str, str], kind: Kind = "byte_level", wait_ready: bool = True, **settings: Any
) -> Iterator[Server]:
    """A front over a tiny checkpoint in `folder`; `env` is the fake engine's."""
    write_checkpoint(folder, kind)
    defaults = {"model": str(folder), "served_model_name": "tiny", "port": 0}
    server = Server(Settings(**defaults | settings), folder)
    # not in this process's environment: several fronts run at once
    command = ("env", *(f"{name}={value}" for name, value in env.items()), *FAKE_ENGINE)
    with running(
        lambda: Host(server.settings, folder, create_app, command=command), TIMEOUT_S, wait_ready=wait_ready
    ) as (server.host, server.loop):
        yield server
