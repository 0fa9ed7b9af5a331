"""One HTTP connection with an end to every wait. Stands between the socket and uvicorn's protocol.

socket --bytes--> HTTPProtocol --ASGI--> api/guard, which has the deadline of bodies

Uvicorn waits as long as a client likes for the end of the headers, and for a reader that has stopped. Both
cost a client nothing and the server a connection, and the second one a buffer as well.
"""

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S = 10.0  # from the connection, or a request's first byte, to the end of its headers
STALL_TIMEOUT_S = 60.0  # for a client whose buffers are full to read some of it


class HTTPProtocol(HttpToolsProtocol):
    """Uvicorn's, and it hangs up on clients that keep it waiting."""

    _header_deadline: asyncio.TimerHandle | None = None
    _stall_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # bytes end the keep-alive deadline; from there on it is this one's, whatever they are
        if self._header_deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._end_header_deadline()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_deadline = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_stall_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_header_deadline()
        self._end_stall_deadline()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._header_deadline = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _end_header_deadline(self) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _end_stall_deadline(self) -> None:
        if self._stall_deadline is not None:
            self._stall_deadline.cancel()
            self._stall_deadline = None
