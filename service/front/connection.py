"""Bytes of the engine's socket into messages. Stands between the event loop and engine_client."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

from service.messages import HEADER, MAX_FRAME_BYTES, EngineMessage, engine_decoder

logger = logging.getLogger(__name__)


class EngineConnection(asyncio.Protocol):
    """Bytes of one engine's socket -> messages, each given to `receive` in turn."""

    def __init__(self, receive: Callable[[EngineMessage], None]) -> None:
        self.receive = receive
        self.transport: asyncio.Transport
        self.closed: asyncio.Future[None]  # done when the engine has hung up
        self._rest = bytearray()  # the beginning of a frame
        self._wanted_bytes = 0  # length of `_rest` from which on there is something to decode

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.closed = asyncio.get_running_loop().create_future()
        self.transport = cast(asyncio.Transport, transport)  # uvloop's only quack like it

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted_bytes:
                return
            data = bytes(self._rest)
            self._rest.clear()
        view = memoryview(data)
        start, end = 0, len(data)
        self._wanted_bytes = HEADER.size
        while end - start >= HEADER.size:
            (length,) = HEADER.unpack_from(data, start)
            following = start + HEADER.size + length
            if length > MAX_FRAME_BYTES:
                self.hang_up(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} are accepted")
                return
            if following > end:
                self._wanted_bytes = following - start
                break
            try:
                message = engine_decoder.decode(view[start + HEADER.size : following])
            except msgspec.MsgspecError as error:
                self.hang_up(str(error))
                return
            self.receive(message)
            start = following
        self._rest += view[start:]

    def hang_up(self, reason: str) -> None:
        """What cannot be read makes everything after it doubtful: the supervisor starts another engine."""
        logger.error("the engine sent what is not a message: %s", reason)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
