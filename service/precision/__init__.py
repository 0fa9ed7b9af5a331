"""The table of precisions: a backend is one file here and one row below. No torch until one is loaded."""

from importlib import import_module
from typing import TYPE_CHECKING

from service.errors import PrecisionError
from service.precision.spec import PrecisionSpec

if TYPE_CHECKING:
    from service.precision.base import Backend

TABLE = {
    "fp32": "service.precision.full:Full",
    "bf16": "service.precision.full:Full",
    "fp16": "service.precision.full:Full",
    "int8": "service.precision.int8:Int8",
    "nf4": "service.precision.nf4:NF4",
    "awq": "service.precision.awq:AWQ",
}


def load_backend(text: str) -> "Backend":
    """`name[:option=value,...]` -> the backend with its options checked."""
    spec = PrecisionSpec.parse(text)
    if spec.name not in TABLE:
        raise PrecisionError(
            f"precision `{spec.name}` does not exist; accepted are {', '.join(TABLE)}",
            hint="write `name[:option=value,...]`, for example `nf4:double_quant=off`",
        )
    module, _, name = TABLE[spec.name].partition(":")
    backend: Backend = getattr(import_module(module), name)(spec)
    return backend
