"""One linear of a checkpoint, as all that quantize, multiply or count it name it. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSpec:
    """One linear of the checkpoint, `path` as in its tensor names without `.weight`."""

    path: str
    in_features: int
    out_features: int
    bias: bool = False
