"""The table of precisions: a backend is one file here and one row below. No torch until one is loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from service.errors import PrecisionError
from service.precision import options, sizes
from service.precision.linear import LinearSpec
from service.precision.spec import Options, PrecisionSpec, canonical, check_options

if TYPE_CHECKING:
    from service.precision.base import Backend


@dataclass(frozen=True)
class Row:
    """What is known of a precision without torch, and where the rest of it is."""

    backend: str  # module:class
    options: type[Options]
    sizes: sizes.Sizes  # what its layers will take
    codebooks: Callable[[Any], int] = lambda options: 0  # bytes of the tables that all layers share


TABLE = {
    "fp32": Row("service.precision.full:Full", options.FullOptions, sizes.full),
    "bf16": Row("service.precision.full:Full", options.FullOptions, sizes.full),
    "fp16": Row("service.precision.full:Full", options.FullOptions, sizes.full),
    "int8": Row("service.precision.int8:Int8", options.Int8Options, sizes.int8),
    "nf4": Row("service.precision.nf4:NF4", options.NF4Options, sizes.nf4, sizes.nf4_codebooks),
    "awq": Row("service.precision.awq:AWQ", options.AWQOptions, sizes.awq),
    "fp8": Row("service.precision.fp8:FP8", options.FP8Options, sizes.fp8),
    "int3": Row("service.precision.int3:INT3", options.INT3Options, sizes.int3),
}
AUTO = "auto"  # what the checkpoint is
CALIBRATED = ("awq",)  # those whose backend has a `quantizer`; the front asks before anything is loaded


@dataclass(frozen=True)
class Precision:
    """A mode of the table with its options checked."""

    name: str
    options: Options

    @property
    def canonical(self) -> str:
        """Flag, metric label, report column."""
        return canonical(self.name, self.options)

    @property
    def codebook_bytes(self) -> int:
        """Of the tables that all layers share."""
        return TABLE[self.name].codebooks(self.options)

    def sizes(self, name: str, parts: Sequence[LinearSpec], width: int) -> dict[str, int]:
        """Part -> bytes of the linears built into one layer class, under activations of `width` bytes."""
        return TABLE[self.name].sizes(self.options, name, parts, width)


def parse_precision(text: str) -> Precision:
    """`name[:option=value,...]` -> the mode; PrecisionError for one that does not exist."""
    spec = parse_known(text)
    return Precision(spec.name, check_options(spec, TABLE[spec.name].options))


def parse_known(text: str, *also: str) -> PrecisionSpec:
    """A name of the table, or one of `also`, and its options, these not yet checked."""
    spec = PrecisionSpec.parse(text)
    if spec.name not in TABLE and spec.name not in also:
        raise PrecisionError(
            f"precision `{spec.name}` does not exist; accepted are {', '.join((*also, *TABLE))}",
            hint="write `name[:option=value,...]`, for example `nf4:double_quant=off`",
        )
    return spec


def canonical_of(text: str) -> str:
    """A precision as it is written everywhere, options checked; `auto` as it is: the checkpoint says what."""
    return AUTO if parse_known(text, AUTO).name == AUTO else parse_precision(text).canonical


def load_backend(text: str) -> "Backend":
    """`name[:option=value,...]` -> the backend with its options checked."""
    spec = parse_known(text)
    return backend_class(spec.name)(spec)


def backend_of(quantization: Mapping[str, Any]) -> "Backend | None":
    """What a checkpoint with this `quantization_config` is in; None where no row reads it."""
    for name in TABLE:
        if text := backend_class(name).written_as(quantization):
            return load_backend(text)
    return None


def backend_class(name: str) -> "type[Backend]":
    module, _, class_name = TABLE[name].backend.partition(":")
    found: type[Backend] = getattr(import_module(module), class_name)
    return found
