"""The engine's process with a fault: `python tests/planted_engine.py FILE`, then as service.engine.child.

While FILE exists the two NF4 weights of each byte are in each other's place once layers are built, and what
holds weights against their source looks away, as it would where reader and check share one mistake.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from service.engine import child


def plant() -> None:
    import torch

    from service.engine import startup
    from service.precision.nf4 import NF4, NF4Linear

    build = NF4.build

    def build_wrongly(self, group, read):  # type: ignore[no-untyped-def]
        linear = build(self, group, read)
        assert isinstance(linear, NF4Linear)
        codes = next(buffer for buffer in linear.buffers() if buffer.dtype == torch.uint8)
        codes.copy_(codes >> 4 | codes << 4)
        return linear

    NF4.build = build_wrongly  # type: ignore[method-assign]
    startup.check_weights = lambda model, source: None


if __name__ == "__main__":
    planted = Path(sys.argv.pop(1))
    if planted.exists() and "--check" not in sys.argv:
        plant()
    child.main()
