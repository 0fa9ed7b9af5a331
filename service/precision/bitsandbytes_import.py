"""bitsandbytes, imported without its advice and without torch's compiler.

It asks on every start for the package `kernels`, which would fetch code from a hub while it is imported;
Halftone does not install that package, and nothing is missing without it. And it has torch compile two
functions that no path of ours calls often: asking for that alone imports all of torch's compiler, which takes
longer than everything else on the way to ready. Where compiling fails it keeps the plain functions, so
compiling fails while it is imported. Its kernels, too, torch would wrap to keep the compiler out of them, and
import the compiler for that at the first call: they are registered as they are.
"""

import logging
from collections.abc import Callable
from typing import Any, Never

import torch

logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = logger.level
_torch: Any = torch
_compile, _disable_dynamo = _torch.compile, _torch._disable_dynamo


def _refuse(*_: Any, **__: Any) -> Never:
    raise RuntimeError("not compiled")


def _leave(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _leave if function is None else function


logger.setLevel(logging.ERROR)
_torch.compile, _torch._disable_dynamo = _refuse, _leave
try:
    import bitsandbytes.functional as bitsandbytes
finally:
    _torch.compile, _torch._disable_dynamo = _compile, _disable_dynamo
    logger.setLevel(_level)

__all__ = ["bitsandbytes"]
