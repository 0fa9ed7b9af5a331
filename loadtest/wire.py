"""Bytes of one HTTP/1.1 answer -> status and server-sent events; no I/O and no clock.

client.Exchange --read bytes--> Answer.feed() --data events--> client.Recorder

The generator's own CPU must not show in the latencies it measures, so this reads what a streaming completion
needs and nothing more: a status line, `Content-Length` or chunked bodies, and `data:` lines of SSE. The usual
read, one whole chunk that holds one whole event, is sliced once and never copied into a buffer.
"""

MAX_HEAD_BYTES = 65536
MAX_CHUNK_LINE_BYTES = 1024  # the size in hexadecimal, and extensions that nobody sends


class WireError(Exception):
    """The server's bytes are not an HTTP/1.1 answer, or it stopped in the middle of one."""


class Answer:
    """Feed it what the socket gave; it returns the complete `data:` events so far."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()  # kept whole where the answer is not an event stream
        self.complete = False
        self.chunked = False
        self.event_stream = False
        self._raw = b""  # of the headers, then of a chunk that is not whole yet
        self._event = b""  # the beginning of an event
        self._length_left: int | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """bytes from the socket -> payloads of the events that they complete."""
        if self._raw:
            data = self._raw + data
            self._raw = b""
        if not self.status:
            data = self._read_head(data)
            if not self.status:
                return []
        plain = self._unchunk(data) if self.chunked else self._take_plain(data)
        if self.event_stream:
            return self._split_events(plain)
        self.body += plain
        return []

    def end(self) -> None:
        """The socket is at its end: fine only where the body's length was left open."""
        if self.status and not self.chunked and self._length_left is None:
            self.complete = True
        if not self.complete:
            raise WireError("the connection was closed in the middle of the answer")

    def _read_head(self, data: bytes) -> bytes:
        """-> what stands behind the headers; `status` stays 0 where they are not whole yet."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise WireError(f"no end of headers within {MAX_HEAD_BYTES} bytes")
            self._raw = data
            return b""
        lines = data[:end].decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not code.isdecimal():
            raise WireError(f"`{lines[0][:80]}` is not an HTTP/1.1 status line")
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        self.event_stream = self.headers.get("content-type", "").startswith("text/event-stream")
        length = self.headers.get("content-length")
        if length is not None:
            if not length.isdecimal():
                raise WireError(f"content-length `{length[:20]}` is not a number")
            self._length_left = int(length)
            self.complete = self._length_left == 0
        self.status = int(code)
        return data[end + 4 :]

    def _take_plain(self, data: bytes) -> bytes:
        if self._length_left is None:
            return data
        plain = data[: self._length_left]
        self._length_left -= len(plain)
        self.complete = self._length_left == 0
        return plain

    def _unchunk(self, data: bytes) -> bytes:
        """-> the data of all whole chunks, joined; the rest waits for the next read."""
        at, parts = 0, []
        while not self.complete:
            line_end = data.find(b"\r\n", at, at + MAX_CHUNK_LINE_BYTES)
            if line_end < 0:
                if len(data) - at >= MAX_CHUNK_LINE_BYTES:
                    raise WireError(f"no end of a chunk's size within {MAX_CHUNK_LINE_BYTES} bytes")
                break
            size = chunk_size(data[at:line_end])
            if size == 0:
                self.complete = True
                break
            end = line_end + 2 + size
            if len(data) < end + 2:
                break
            parts.append(data[line_end + 2 : end])
            at = end + 2
        if not self.complete:
            self._raw = data[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _split_events(self, plain: bytes) -> list[bytes]:
        if (
            plain.endswith(b"\n\n")
            and plain.startswith(b"data: ")
            and not self._event
            and plain.find(b"\n") == len(plain) - 2
        ):
            return [plain[6:-2]]
        text = self._event + plain if self._event else plain
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *blocks, self._event = text.split(b"\n\n")
        return [event for block in blocks if (event := payload(block)) is not None]


def chunk_size(line: bytes) -> int:
    """A chunk's first line -> the bytes in it."""
    try:
        size = int(line.partition(b";")[0], 16)
    except ValueError:
        size = -1
    if size < 0:
        raise WireError(f"chunk size `{line[:20].decode('latin-1')}` is not hexadecimal")
    return size


def payload(block: bytes) -> bytes | None:
    """The lines of one event -> its data; None for a comment, which keeps a connection awake."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
