"""Calls into the native library, recorded while they run and made again in one call: a CPU's CUDA graph.

record(library, run) --run's calls, and memory for its results--> Recording --replay--> the same calls

At few rows a step of a small model is half Python between its calls. What a recorded call is told are
addresses, so what `run` reads must stay where it is, and so must its results: they lie in an Arena.
"""

import ctypes
from collections.abc import Callable
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from service.kernels.native import Library

ALIGNMENT = 64  # bytes, of tensors in an arena
CHUNK_BYTES = 1 << 20  # of memory that an arena takes at least at a time
_pack = Struct("2Pq").pack  # struct call in replay.c
aten = torch.ops.aten
VIEWS = {
    aten.view, aten._unsafe_view, aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.alias,
    aten.as_strided, aten.detach, aten.split, aten.split_with_sizes, aten.transpose, aten.permute, aten.t,
}  # fmt: skip

VIEWS_OF_CONTIGUOUS = {aten.reshape, aten.contiguous, aten.flatten}


class UnrecordableError(Exception):
    """An operation of torch's own that computes: a replay would leave it out."""


class Arena:
    """Memory that is handed out from its beginning again and again: what was there is overwritten."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._chunk, self._offset = 0, 0

    @property
    def num_bytes(self) -> int:
        return sum(chunk.numel() for chunk in self._chunks)

    def restart(self) -> None:
        self._chunk, self._offset = 0, 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Contiguous, undefined contents."""
        num_bytes = shape.numel() * dtype.itemsize
        padded = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        while self._chunk < len(self._chunks) and self._offset + padded > self._chunks[self._chunk].numel():
            self._chunk, self._offset = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(padded, CHUNK_BYTES), dtype=torch.uint8))
        start, self._offset = self._offset, self._offset + padded
        return self._chunks[self._chunk][start : start + num_bytes].view(dtype).view(shape)


class Recording:
    """What ran, to run again."""

    def __init__(self, library: Library, calls: list[tuple[int, bytes, bool]]) -> None:
        self.num_calls = len(calls)
        told = b"".join(arguments for _, arguments, _ in calls)
        self._arguments = ctypes.create_string_buffer(told, max(len(told), 1))
        address = ctypes.addressof(self._arguments)
        packed = b""
        for function, arguments, checks in calls:
            packed += _pack(function, address, checks)
            address += len(arguments)
        self._calls = ctypes.create_string_buffer(packed, max(len(packed), 1))
        self._replay = library.replay

    def replay(self) -> None:
        """IndexError where a call refuses what it reads now: none behind it was made."""
        if refused := self._replay(self._calls, self.num_calls):
            raise IndexError(f"call {refused - 1} of {self.num_calls} reads a place out of range")


class Recorder(TorchDispatchMode):
    """While it is entered, the library's calls are noted and new tensors come from `arena`."""

    def __init__(self, library: Library, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self._library = library

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks its modes: to keep its compiler out of one it would import it, which takes seconds."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = function.overloadpacket
        if operation in VIEWS or (operation in VIEWS_OF_CONTIGUOUS and args[0].is_contiguous()):
            return function(*args, **kwargs)
        if operation is aten.empty:
            return self.arena.take(torch.Size(args[0]), kwargs.get("dtype") or torch.get_default_dtype())
        if operation is aten.new_empty:
            return self.arena.take(torch.Size(args[1]), kwargs.get("dtype") or args[0].dtype)
        if operation is aten.empty_like and args[0].is_contiguous():
            return self.arena.take(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        raise UnrecordableError(str(function))

    def __enter__(self) -> "Recorder":
        self._library.recorded = []
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls, self._library.recorded = self._library.recorded or [], None


def record(library: Library, arena: Arena, run: Callable[[Recorder], Tensor]) -> tuple[Tensor, Recording]:
    """Runs it -> its result, which every replay overwrites, and the recording. Raises UnrecordableError."""
    recorder = Recorder(library, arena)
    with recorder:
        result = run(recorder)
    return result, Recording(library, recorder.calls)
