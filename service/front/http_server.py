"""Uvicorn as one of the servers of a front: for the API, and for /metrics where it has a port of its own.

front/host --app, listening socket--> HTTPServer --> front/http_protocol --> app
"""

import asyncio
import socket
from typing import Any

import uvicorn

from service.front.http_protocol import HTTPProtocol

CLOSE_GRACE_S = 5  # for the last bytes of ended responses; a reader that has stalled is cut off then
KEEP_ALIVE_S = 75  # longer than common proxies keep theirs, so that they close first


class HTTPServer(uvicorn.Server):
    """Uvicorn inside an event loop and a process that are not its own: signals are the host's."""

    def __init__(self, app: Any, backlog: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HTTPProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=backlog,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_GRACE_S,
            )
        )

    async def start(self, listener: socket.socket) -> None:
        """Returns when connections are answered."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup([listener])
        self._ticks = asyncio.create_task(self.main_loop(), name="http server")

    async def stop(self) -> None:
        """Takes no more connections; open responses have CLOSE_GRACE_S, then their sockets are cut.

        So too where a signal cancels the wait.
        """
        self._ticks.cancel()
        try:
            await asyncio.gather(self._ticks, return_exceptions=True)
        finally:
            await self.shutdown()
            for connection in list(self.server_state.connections):
                connection.transport.abort()
