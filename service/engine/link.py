"""The engine's end of the socket: a reader thread, a writer thread, and a loop that waits for neither.

front --frames--> reader --queue--> loop --queue--> writer --frames--> front

When the front is gone, or says Shutdown, the process ends at once, whatever the loop is doing: nobody is
left to answer, and the system frees a device's memory more surely than we could.
"""

import os
import queue
import socket
import threading
import time
import traceback

import msgspec

from service.messages import (
    HEADER,
    MAX_FRAME_BYTES,
    EngineMessage,
    FrontMessage,
    Shutdown,
    frame,
    front_decoder,
)


class Link:
    """Messages in and out over a connected stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setblocking(True)
        self._inbox: queue.SimpleQueue[FrontMessage] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[EngineMessage | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    def send(self, message: EngineMessage) -> None:
        self._outbox.put(message)

    def receive(self, timeout_s: float) -> list[FrontMessage]:
        """All that has come; waits for the first at most `timeout_s` seconds."""
        messages: list[FrontMessage] = []
        try:
            messages.append(self._inbox.get(block=timeout_s > 0, timeout=timeout_s))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def flush(self) -> None:
        """Returns when everything sent so far is in the socket; nothing can be sent afterwards."""
        self._outbox.put(None)
        self._writer.join()

    def _read(self) -> None:
        try:
            while True:
                (size,) = HEADER.unpack(self._read_exactly(HEADER.size))
                if size > MAX_FRAME_BYTES:
                    break
                message = front_decoder.decode(self._read_exactly(size))
                if isinstance(message, Shutdown):
                    break
                self._inbox.put(message)
        except (OSError, EOFError, msgspec.MsgspecError):
            pass  # a front that is gone, or does not speak our language: there is nobody to work for
        os._exit(0)

    def _read_exactly(self, num_bytes: int) -> bytes:
        parts: list[bytes] = []
        while num_bytes:
            part = self._connection.recv(num_bytes)
            if not part:
                raise EOFError
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.sendall(frame(message))
        except OSError:
            os._exit(0)
        except Exception:  # a message that cannot be encoded: silence would look like work
            traceback.print_exc()
            os._exit(1)


class Throttle:
    """Lets one through in each interval."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = 0.0

    def ready(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True
