"""Our own CPU kernels: a small C library, prebuilt for x86-64 Linux, and the threads that work in it.

kernels/*/native.py --load--> Library --function(name)--> one C call an op

The sources lie here (halftone.h tells what they share, build.py how they are compiled); users need no
compiler. Where the library cannot serve, `load` says None, `absence` why, and torch's paths serve; which of
the two is in every layer's `kernel`. `choose` is the setting `cpu_kernels`, made before a model is built.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from service.errors import SettingError

__all__ = ["Choice", "Library", "absence", "choose", "load", "loaded", "set_threads"]

Choice = Literal["auto", "native", "torch"]
FILE = Path(__file__).parent / "halftone_x86_64.so"
AVX512 = 512


class Library:
    """The loaded library; its workers start when it is first given more than one thread."""

    isa = "avx512"

    def __init__(self, path: Path) -> None:
        # PyDLL keeps the interpreter's lock: an op takes microseconds, and taking the lock back may take
        # milliseconds where another thread wants it
        self._locked = ctypes.PyDLL(str(path))
        self._unlocked = ctypes.CDLL(str(path))
        self._started = 0
        self.recorded: list[tuple[int, bytes, bool]] | None = None  # calls, while somebody records

    def function(self, name: str, arguments: Sequence[Any], result: Any = None) -> Callable[..., Any]:
        """The exported function with these ctypes argument types; of one struct it can be recorded."""
        found = self._locked[name]
        found.argtypes = list(arguments)
        found.restype = result
        if list(arguments) != [ctypes.c_char_p]:
            return found
        address, checks = ctypes.cast(found, ctypes.c_void_p).value or 0, result is not None

        def call(told: bytes) -> Any:
            if self.recorded is not None:
                self.recorded.append((address, told, checks))
            return found(told)

        return call

    @property
    def replay(self) -> Callable[..., int]:
        """halftone_replay. It takes long enough to give the interpreter's lock away."""
        found = self._unlocked.halftone_replay
        found.argtypes, found.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
        return found

    @property
    def sources(self) -> str:
        """SHA-256 of the sources that it was built from."""
        return bytes((ctypes.c_char * 64).in_dll(self._locked, "halftone_sources")).decode()

    @property
    def cpu(self) -> int:
        """AVX512, or 0 where this CPU or system lacks a part of what the kernels use."""
        return int(self._locked.halftone_cpu())

    def set_threads(self, num_threads: int) -> None:
        """Share jobs among the caller and `num_threads` - 1 workers from the next one on."""
        worker = self._unlocked.halftone_worker
        for number in range(self._started, num_threads - 1):
            threading.Thread(target=worker, args=(number,), name=f"native-{number}", daemon=True).start()
        self._started = max(self._started, num_threads - 1)
        self._locked.halftone_set_workers(num_threads - 1)

    def forget_workers(self) -> None:
        """In a forked child, which has none of them: it works alone until `set_threads`."""
        self._started = 0
        self._locked.halftone_forget_workers()


class _State:
    """What is chosen and loaded in this process."""

    choice: Choice = "auto"
    library: Library | None = None
    reason: str | None = None  # why there is no library; None: not looked yet


def load() -> Library | None:
    """The library if this CPU and system can run it and the choice is not `torch`."""
    if _State.library is None and _State.reason is None:
        _look()
    return None if _State.choice == "torch" else _State.library


def loaded() -> Library:
    """The library for what was built while `load` gave it, whatever was chosen since."""
    assert _State.library is not None
    return _State.library


def absence() -> str:
    """Why `load` says None; empty where it does not."""
    if load() is not None:
        return ""
    return "`cpu_kernels` is `torch`" if _State.choice == "torch" else _State.reason or ""


def choose(choice: Choice) -> None:
    """Layers built from now on use the library (`native`; SettingError where it cannot be), torch (`torch`),
    or the one that is there (`auto`).
    """
    _State.choice = choice
    if choice == "native" and load() is None:
        _State.choice = "auto"
        raise SettingError(
            f"setting `cpu_kernels` = `native`: {absence()}",
            hint="`auto` serves with torch's kernels here",
        )


def set_threads(num_threads: int) -> None:
    """As `torch.set_num_threads`, for the library if it is loaded: it starts with torch's number."""
    if _State.library is not None:
        _State.library.set_threads(num_threads)


def _look() -> None:
    system, machine = sys.platform, platform.machine()
    if system != "linux" or machine != "x86_64":
        _State.reason = f"the native kernels are built for Linux on x86_64, this is {system} on {machine}"
        return
    try:
        library = Library(FILE)
    except OSError as error:
        _State.reason = f"the native kernels cannot be loaded: {error}"
        return
    if library.cpu != AVX512:
        _State.reason = "the native kernels need AVX512 with BF16 and VNNI, which this CPU or system lacks"
        return
    library.set_threads(torch.get_num_threads())
    os.register_at_fork(after_in_child=library.forget_workers)
    _State.library = library
