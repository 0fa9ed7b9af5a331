"""The engine's process by itself, spoken to as the front does."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service.messages import (
    HEADER,
    EngineConfig,
    EngineMessage,
    FrontMessage,
    Output,
    Step,
    engine_decoder,
    frame,
)

ROOT = Path(__file__).parents[1]


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    connection: socket.socket

    def send(self, *messages: FrontMessage) -> None:
        self.connection.sendall(b"".join(map(frame, messages)))

    def receive(self) -> EngineMessage:
        (size,) = HEADER.unpack(self._read(HEADER.size))
        return engine_decoder.decode(self._read(size))

    def outputs(self, until: int) -> list[Output]:
        """All outputs up to the one that ends request `until`."""
        outputs: list[Output] = []
        while not any(output.id == until and output.finish_reason for output in outputs):
            message = self.receive()
            assert isinstance(message, Step)
            outputs += message.outputs
        return outputs

    def _read(self, num_bytes: int) -> bytes:
        data = self.connection.recv(num_bytes, socket.MSG_WAITALL)
        assert len(data) == num_bytes, "the child hung up"
        return data


@contextmanager
def spawned(config: EngineConfig) -> Iterator[Child]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    command = [sys.executable, "-m", "service.engine.child", "--fd", str(theirs.fileno())]
    command += ["--config", msgspec.json.encode(config).decode()]
    with theirs:
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    try:
        with ours:
            yield Child(process, ours)
    finally:
        process.kill()
        process.communicate()
