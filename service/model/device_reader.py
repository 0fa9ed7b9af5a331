"""Safetensors files -> tensors on a CUDA device, brought there ahead of their use.

Checkpoint.reading --name--> DeviceReader --tensor on the device--> a backend quantizes or casts it there

Threads read pieces of the files into pinned memory and copy them on streams of their own, so that disk (or
page cache), PCIe and the quantizing of what came before work at once. Tensors come in the order in which a
decoder is built, and what has arrived and was not taken yet is bounded.
"""

import contextlib
import json
import os
import re
import struct
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from service.errors import CheckpointError

PIECE_BYTES = 16 << 20  # of one read and copy
AHEAD_BYTES = 512 << 20  # on the device and not taken yet, unless one tensor alone is larger
NUM_THREADS = 8  # one copies some 5 GB/s out of the page cache; PCIe 5 takes about 50
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    file: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Arrival:
    """A tensor on its way; complete when no piece is left and its events have passed."""

    tensor: Tensor
    flat: Tensor  # uint8 view
    num_pieces_left: int
    allocated: torch.cuda.Event | None  # what used these bytes before has ended when this has passed
    copied: list[torch.cuda.Event] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    name: str
    start: int
    stop: int


def places(folder: Path, file: str, dtypes: dict[str, torch.dtype]) -> dict[str, Place]:
    """Name -> where its bytes lie, of a file whose header safetensors has checked."""
    with (folder / file).open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in dtypes:
            start, stop = entry["data_offsets"]
            offset = 8 + header_bytes + start
            found[name] = Place(file, offset, stop - start, tuple(entry["shape"]), dtypes[entry["dtype"]])
    return found


def building_order(names: Iterable[str]) -> list[str]:
    """Embedding first, then layer by layer, then the rest: as model/decoder asks."""

    def key(name: str) -> tuple[int, int, str]:
        layer = LAYER.search(name)
        if layer:
            return 1, int(layer[1]), name
        return (0 if "embed" in name else 2), 0, name

    return sorted(names, key=key)


class DeviceReader:
    """Reads each tensor once ahead of its use; one that is asked for again is read again."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, Place],
        device: torch.device,
        *,
        ahead_bytes: int = AHEAD_BYTES,
        num_threads: int = NUM_THREADS,
    ) -> None:
        self.device = device
        self._tensors = tensors
        self._ahead_bytes = ahead_bytes
        self._files = {place.file: os.open(folder / place.file, os.O_RDONLY) for place in tensors.values()}
        self._coming = deque(building_order(tensors))
        self._pieces: deque[Piece] = deque()
        self._arrivals: dict[str, Arrival] = {}
        self._held_bytes = 0  # of arrivals that were not taken
        self._error: CheckpointError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"reader-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, name: str) -> Tensor:
        """The tensor on the device, ordered before whatever the current stream does next."""
        with self._changed:
            if name not in self._arrivals:
                if name in self._coming:
                    self._coming.remove(name)
                self._admit(name, urgent=True)
            arrival = self._arrivals[name]
            self._changed.wait_for(lambda: self._error or not arrival.num_pieces_left)
            if self._error:
                raise self._error
            del self._arrivals[name]
            self._held_bytes -= self._tensors[name].num_bytes
            self._changed.notify_all()
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            for event in arrival.copied:
                current.wait_event(event)
            arrival.tensor.record_stream(current)
        return arrival.tensor

    def close(self) -> None:
        """Ends the threads and frees the pinned memory; what was not taken is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._arrivals.clear()

    def _admit(self, name: str, *, urgent: bool = False) -> None:
        """Under the lock: give a tensor its place on the device and queue its pieces."""
        place = self._tensors[name]
        flat = torch.empty(place.num_bytes, dtype=torch.uint8, device=self.device)
        starts = range(0, place.num_bytes, PIECE_BYTES)
        pieces = [Piece(name, start, min(start + PIECE_BYTES, place.num_bytes)) for start in starts]
        tensor = flat.view(place.dtype).view(place.shape)
        on_cuda = self.device.type == "cuda"
        allocated = torch.cuda.default_stream(self.device).record_event() if on_cuda else None
        self._arrivals[name] = Arrival(tensor, flat, len(pieces), allocated)
        self._held_bytes += place.num_bytes
        if urgent:
            self._pieces.extendleft(reversed(pieces))
        else:
            self._pieces.extend(pieces)
        self._changed.notify_all()

    def _bring_ahead(self, name: str) -> None:
        """Under the lock: admit it if the device has room; whoever asks for it will else be told."""
        try:
            self._admit(name)
        except torch.OutOfMemoryError:
            self._coming.appendleft(name)

    def _next_piece(self) -> Piece | None:
        """Waits for work; None when there will be none."""
        with self._changed:
            while not self._closed:
                if not self._pieces and self._coming:
                    size = self._tensors[self._coming[0]].num_bytes
                    if not self._held_bytes or self._held_bytes + size <= self._ahead_bytes:
                        self._bring_ahead(self._coming.popleft())
                if self._pieces:
                    return self._pieces.popleft()
                self._changed.wait()
            return None

    def _work(self) -> None:
        """One thread: two pinned buffers in turn, so that a read fills one while the other is copied."""
        on_cuda = self.device.type == "cuda"
        buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
        copied: list[torch.cuda.Event | None] = [None, None]
        stream = torch.cuda.Stream(self.device) if on_cuda else None
        turn = 0
        while piece := self._next_piece():
            if event := copied[turn]:
                event.synchronize()
            try:
                buffer = self._fill(piece, buffers[turn])
                arrival = self._arrivals[piece.name]
                with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                    if stream and arrival.allocated:
                        stream.wait_event(arrival.allocated)
                    arrival.flat[piece.start : piece.stop].copy_(buffer, non_blocking=on_cuda)
                    copied[turn] = stream.record_event() if stream else None
            except (OSError, RuntimeError) as error:
                self._fail(piece, error)
                return
            with self._changed:
                if event := copied[turn]:
                    arrival.copied.append(event)
                arrival.num_pieces_left -= 1
                self._changed.notify_all()
            turn = 1 - turn

    def _fill(self, piece: Piece, buffer: Tensor) -> Tensor:
        place = self._tensors[piece.name]
        view = memoryview(buffer.numpy().data)[: piece.stop - piece.start]
        done = 0
        while done < len(view):
            got = os.preadv(self._files[place.file], [view[done:]], place.offset + piece.start + done)
            if not got:
                raise OSError(f"ends before byte {place.offset + piece.stop}")
            done += got
        return buffer[: len(view)]

    def _fail(self, piece: Piece, error: Exception) -> None:
        file = self._tensors[piece.name].file
        with self._changed:
            self._error = self._error or CheckpointError(
                f"tensor `{piece.name}` in `{file}` cannot be read: {error}", hint="fetch the file again"
            )
            self._changed.notify_all()
