"""What speaks against a configuration, as far as that can be seen without loading anything.

front/swap --`child --check`--> check_opens --> nothing, or the error that an engine would have ended with

Asked before a running engine makes room for another: a wrong option, or a precision that this checkpoint does
not come in, shall cost nobody a second. What only loading can tell (memory, kernels) it does not know.
"""

import torch

from service.engine.sources import choose_backend, open_source
from service.messages import EngineConfig
from service.model.instance import accepted


def check_opens(config: EngineConfig) -> None:
    """Raises HalftoneError. No GPU is touched: the one there is belongs to the engine that serves."""
    device = torch.device("cpu")
    source = open_source(config, device)
    accepted(choose_backend(config.precision, source, device), source)
