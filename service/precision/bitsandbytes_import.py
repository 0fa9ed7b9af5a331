"""bitsandbytes, imported without its advice: it asks on every start for a package that fetches kernels.

With the package `kernels` installed it would fetch code from a hub while it is imported; Halftone does not
install that package, and nothing is missing without it.
"""

import logging

logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = logger.level
logger.setLevel(logging.ERROR)
try:
    import bitsandbytes.functional as bitsandbytes
finally:
    logger.setLevel(_level)

__all__ = ["bitsandbytes"]
