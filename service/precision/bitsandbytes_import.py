"""bitsandbytes, imported without its advice and without torch's compiler.

It asks on every start for the package `kernels`, which would fetch code from a hub while it is imported;
Halftone does not install that package, and nothing is missing without it. And it has torch compile two
functions that no path of ours calls often: asking for that alone imports all of torch's compiler, which takes
longer than everything else on the way to ready. Where compiling fails it keeps the plain functions, so
compiling fails while it is imported.
"""

import logging
from typing import Any, Never

import torch

logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = logger.level
_compile = torch.compile


def _refuse(*_: Any, **__: Any) -> Never:
    raise RuntimeError("not compiled")


logger.setLevel(logging.ERROR)
torch.compile = _refuse
try:
    import bitsandbytes.functional as bitsandbytes
finally:
    torch.compile = _compile
    logger.setLevel(_level)

__all__ = ["bitsandbytes"]
