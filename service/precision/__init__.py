"""The table of precisions: a backend is one file here and one row below. No torch until one is loaded."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "fp8": "service.precision.fp8:FP8",
    "int3": "service.precision.int3:INT3",
}
CALIBRATED = ("awq",)  # those whose backend has a `quantizer`; the front asks before anything is loaded


def load_backend(text: str) -> "Backend":
    """`name[:option=value,...]` -> the backend with its options checked."""
    spec = PrecisionSpec.parse(text)
    if spec.name not in TABLE:
        raise PrecisionError(
            f"precision `{spec.name}` does not exist; accepted are {', '.join(TABLE)}",
            hint="write `name[:option=value,...]`, for example `nf4:double_quant=off`",
        )
    return backend_class(spec.name)(spec)


def backend_of(quantization: Mapping[str, Any]) -> "Backend | None":
    """What a checkpoint with this `quantization_config` is in; None where no row reads it."""
    for name in TABLE:
        if text := backend_class(name).written_as(quantization):
            return load_backend(text)
    return None


def backend_class(name: str) -> "type[Backend]":
    module, _, class_name = TABLE[name].partition(":")
    found: type[Backend] = getattr(import_module(module), class_name)
    return found
