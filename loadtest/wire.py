"""Bytes of one HTTP/1.1 answer -> status and server-sent events; no I/O and no clock.

socket --read()--> Answer.feed() --data events--> client.Recorder

The generator's own CPU must not show in the latencies it measures, so this reads what a streaming completion
needs and nothing more: a status line, `Content-Length` or chunked bodies, and `data:` lines of SSE.
"""

MAX_HEAD_BYTES = 65536


class WireError(Exception):
    """The server's bytes are not an HTTP/1.1 answer, or it stopped in the middle of one."""


class Answer:
    """Feed it what the socket gave; it returns the complete `data:` events so far."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()  # kept whole where the answer is not an event stream
        self.complete = False
        self._raw = bytearray()
        self._events = bytearray()
        self._chunk_left = 0
        self._length_left: int | None = None

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def event_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def feed(self, data: bytes) -> list[bytes]:
        """bytes from the socket -> payloads of the events that they complete."""
        self._raw += data
        if not self.status and not self._read_head():
            return []
        plain = self._unchunk() if self.chunked else self._take_plain()
        if not self.event_stream:
            self.body += plain
            return []
        self._events += plain
        return self._split_events()

    def end(self) -> None:
        """The socket is at its end: fine only where the body's length was left open."""
        if self.status and not self.chunked and self._length_left is None:
            self.complete = True
        if not self.complete:
            raise WireError("the connection was closed in the middle of the answer")

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > MAX_HEAD_BYTES:
                raise WireError(f"no end of headers within {MAX_HEAD_BYTES} bytes")
            return False
        lines = bytes(self._raw[:end]).decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        version, _, rest = lines[0].partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not code.isdigit():
            raise WireError(f"`{lines[0][:80]}` is not an HTTP/1.1 status line")
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if "content-length" in self.headers:
            self._length_left = int(self.headers["content-length"])
        self.status = int(code)
        return True

    def _take_plain(self) -> bytes:
        if self._length_left is None:
            plain = bytes(self._raw)
        else:
            plain = bytes(self._raw[: self._length_left])
            self._length_left -= len(plain)
            self.complete = self._length_left == 0
        self._raw.clear()
        return plain

    def _unchunk(self) -> bytes:
        plain = bytearray()
        while not self.complete:
            if self._chunk_left > 2:  # the two bytes after a chunk's data are its line end
                data = self._raw[: self._chunk_left - 2]
                plain += data
                del self._raw[: len(data)]
                self._chunk_left -= len(data)
            if self._chunk_left > 2 or len(self._raw) < self._chunk_left:
                break
            del self._raw[: self._chunk_left]
            self._chunk_left = 0
            line_end = self._raw.find(b"\r\n")
            if line_end < 0:
                break
            size_text = bytes(self._raw[:line_end]).partition(b";")[0]
            try:
                size = int(size_text, 16)
            except ValueError:
                raise WireError(
                    f"chunk size `{size_text[:20].decode('latin-1')}` is not hexadecimal"
                ) from None
            del self._raw[: line_end + 2]
            if size == 0:
                self.complete = True
            self._chunk_left = size + 2
        return bytes(plain)

    def _split_events(self) -> list[bytes]:
        if b"\r" in self._events:
            self._events = self._events.replace(b"\r\n", b"\n")
        *blocks, rest = bytes(self._events).split(b"\n\n")
        self._events = bytearray(rest)
        events = []
        for block in blocks:
            lines = [line[5:].lstrip(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                events.append(b"\n".join(lines))
        return events
