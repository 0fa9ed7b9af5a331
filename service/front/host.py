"""One front in the running event loop: socket, engines, metrics and the HTTP app, started and ended in order.

`halftone serve` runs one until a signal; `halftone compare` opens one for each precision, in its own process.

    async with Host(settings, model_path, create_app) as host:
        info = await host.ready()
"""

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from service.config import NO_TOKENIZER, Settings
from service.errors import HalftoneError, SettingError, SystemProblem
from service.front.engine_client import EngineClient
from service.front.residents import Residents
from service.front.supervisor import ENGINE_COMMAND, Supervisor
from service.messages import SHUTTING_DOWN, EngineConfig, EngineInfo
from service.metrics import CONTENT_TYPE, Metrics

if TYPE_CHECKING:  # imported while the engine loads, which nothing here shall keep waiting
    from service.front.http_server import HTTPServer
    from service.front.text import TextCodec

logger = logging.getLogger(__name__)

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]
AppFactory = Callable[[Settings, Residents, "TextCodec"], ASGIApp]

BACKLOG = 2048


class Host:
    """Everything of one front. Entering binds the port, spawns the engine and serves (`/ready` says 503 until
    the engine is); leaving ends what is open and waits until the engine's process is gone. `client`,
    `supervisor` and `metrics` are those of the first engine, in most servers the only one.

    `app_factory` is `service.api.app.create_app`; `command` is the engine's program, `--fd` and `--config`
    are added; `metrics_host` is where `metrics_port` is bound, empty: `settings.host`. Entering raises
    SystemProblem or SettingError for an address that cannot be bound, and CheckpointError for a tokenizer
    that cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        model_path: Path,
        app_factory: AppFactory,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        metrics_host: str = "",
    ) -> None:
        self.settings = settings
        self.model_path = model_path

        def supervise(config: EngineConfig, client: EngineClient, metrics: Metrics) -> Supervisor:
            return Supervisor(
                config,
                client,
                metrics,
                load_timeout_s=settings.load_timeout_s,
                step_timeout_s=settings.step_timeout_s,
                command=command,
            )

        self.residents = Residents(settings, model_path, supervise)
        self.client = self.residents.first.client
        self.supervisor = self.residents.first.supervisor
        self.metrics = self.residents.first.metrics
        self.url = ""  # of the API, without a path
        self.metrics_url = ""
        self._app_factory = app_factory
        self._metrics_host = metrics_host or settings.host
        self._servers: list[HTTPServer] = []
        self._stop_asked = asyncio.Event()
        self._abort_asked = asyncio.Event()
        self._exits = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        settings = self.settings
        async with contextlib.AsyncExitStack() as exits:
            listener = exits.enter_context(bind(settings.host, settings.port, "port"))
            metrics_listener = (
                exits.enter_context(bind(self._metrics_host, settings.metrics_port, "metrics_port"))
                if settings.metrics_port
                else None
            )
            exits.push_async_callback(self.residents.stop)
            self.residents.start()
            await asyncio.sleep(0)  # the engine's process comes first
            # the tokenizer is read while the engine loads
            codec = await asyncio.to_thread(self._load_codec)
            app = self._app_factory(settings, self.residents, codec)
            self.url = self.metrics_url = url_of(listener)
            await self._serve(exits, app, listener)
            if metrics_listener is not None:
                self.metrics_url = url_of(metrics_listener)
                await self._serve(exits, metrics_app(self.residents), metrics_listener)
            exits.callback(self.residents.end_all, SHUTTING_DOWN)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.residents.drain()
        await self._exits.aclose()

    async def ready(self) -> EngineInfo:
        """Waits for every engine -> what the first serves. Raises an engine's own error if it cannot load."""
        for resident in self.residents.all:
            await resident.client.wait_ready()
        return await self.client.wait_ready()

    async def run(self, on_ready: Callable[[EngineInfo], None]) -> None:
        """Serves until SIGTERM or SIGINT, then drains. `on_ready` is called once. Raises as `ready`.

        After the first signal `/ready` says 503 and no request is taken; those that are open have
        `drain_timeout_s`. The second ends them.
        """
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        ready = asyncio.create_task(self.ready())
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait({ready, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
            if not stop_asked.done():
                info = await ready
                spare_from_collections()
                on_ready(info)
                await stop_asked
            await self.drain()
        finally:
            ready.cancel()
            stop_asked.cancel()
            await asyncio.gather(ready, stop_asked, return_exceptions=True)
            for number in signals:
                loop.remove_signal_handler(number)

    async def drain(self) -> None:
        """Takes no more requests and returns when the open ones have ended, at the latest after
        `drain_timeout_s`, when they are ended with an error."""
        self.residents.drain()
        if num_open := self.residents.num_open:
            logger.info("%d open requests have %g s to end", num_open, self.settings.drain_timeout_s)
        idle = asyncio.create_task(self.residents.wait_idle())
        abort_asked = asyncio.create_task(self._abort_asked.wait())
        await asyncio.wait(
            {idle, abort_asked}, timeout=self.settings.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        idle.cancel()
        abort_asked.cancel()
        self.residents.end_all(SHUTTING_DOWN)

    # --- inside --------------------------------------------------------------------------------

    def _load_codec(self) -> "TextCodec":
        from service.front.text import IdsOnly, TextCodec

        settings = self.settings
        if settings.tokenizer == NO_TOKENIZER:
            return IdsOnly()
        return TextCodec.load(settings.tokenizer_folder(self.model_path), settings.chat_template)

    def _on_signal(self) -> None:
        if self._stop_asked.is_set():
            logger.warning("second signal: open requests are ended")
            self._abort_asked.set()
            for server in self._servers:
                server.force_exit = True
        else:
            self.residents.drain()
            self._stop_asked.set()

    async def _serve(self, exits: contextlib.AsyncExitStack, app: ASGIApp, listener: socket.socket) -> None:
        from service.front.http_server import HTTPServer

        server = HTTPServer(app, BACKLOG)
        self._servers.append(server)
        exits.push_async_callback(server.stop)
        await server.start(listener)


@contextlib.contextmanager
def bind(host: str, port: int, setting: str) -> Iterator[socket.socket]:
    """A listening TCP socket, closed at the end. Bound before anything slow starts: a taken port is told at
    once, by SystemProblem; a host that is none of this machine's by SettingError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except socket.gaierror as error:
        raise SettingError(
            f"setting `host` = `{host}` is no address: {error.strerror}",
            hint="127.0.0.1 is this machine alone, 0.0.0.0 every network it is in",
        ) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise bind_error(error, host, port, setting) from None
        listener.setblocking(False)
        yield listener


def bind_error(error: OSError, host: str, port: int, setting: str) -> HalftoneError:
    flag = "--" + setting.replace("_", "-")
    if error.errno == errno.EADDRINUSE:
        return SystemProblem(
            f"port `{port}` on `{host}` is taken by another program",
            hint=f"choose a free one with `{flag}`, for example `{flag} {port % 65535 + 1}`",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return SettingError(
            f"setting `host` = `{host}` is no address of this machine",
            hint="127.0.0.1 is this machine alone, 0.0.0.0 every network it is in",
        )
    return SystemProblem(
        f"port `{port}` on `{host}` cannot be bound: {error.strerror}",
        hint=f"choose one from 1024 to 65535 with `{flag}`",
    )


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds a listening socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def spare_from_collections() -> None:
    """What the process holds now is not walked again by full collections, each of which would stop every
    stream for about 100 ms. To be called before load comes, for each host of a process."""
    gc.unfreeze()  # what the host before this one left
    gc.collect()
    gc.freeze()


def metrics_app(residents: Residents) -> ASGIApp:
    """/metrics alone, for a port of its own."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        found = scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD")
        body = await residents.render_metrics() if found else b"only GET /metrics is here\n"
        headers = [
            (b"content-type", CONTENT_TYPE.encode() if found else b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on uvloop's event loop where uvloop is installed."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if find_spec("uvloop") is not None:
        loop_factory = import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


def run_to_end(main: Coroutine[Any, Any, T]) -> T:
    """`run_loop` for a command that ends by itself, in the main thread: SIGTERM cancels it as Ctrl-C does.

    What `main` has started is ended on its way out. Raises SystemExit(143) then, KeyboardInterrupt after
    Ctrl-C.
    """
    before = signal.getsignal(signal.SIGTERM)
    was_asked = False

    async def ended_by_signal() -> T:
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:  # once: a second signal would cut off the engine's end
            nonlocal was_asked
            if not was_asked:
                was_asked = True
                task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        return await main

    try:
        return run_loop(ended_by_signal())
    except asyncio.CancelledError:
        if was_asked:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
