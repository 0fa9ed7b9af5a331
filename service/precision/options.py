"""What each precision can be asked for, after the colon of its name. No torch: the front checks these too."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from service.precision.spec import Options

LAYER_CLASSES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
INT3_GROUPS = (64, 128)
AWQ_GROUPS = (128, 64, 32)


class FullOptions(Options):
    """None."""


class Int8Options(Options):
    threshold: float = Field(
        6.0, ge=0, allow_inf_nan=False, description="activations from here on stay 16-bit; 0: none does"
    )
    skip: str = Field(
        "", description=f"layer classes kept in 16 bits, joined by +: {' '.join(LAYER_CLASSES)}"
    )
    outliers: Literal["auto", "row", "batch"] = Field(
        "auto",
        description="row: decided in each row alone; batch: in all rows of a step, as bitsandbytes does; "
        "auto: row",
    )
    kernel: Literal["auto", "bitsandbytes"] = Field(
        "auto", description="bitsandbytes: its own product, with outliers=batch"
    )

    @model_validator(mode="before")
    @classmethod
    def follow_bitsandbytes(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Its product has one rule, which need not be said."""
        return {"outliers": "batch"} | given if given.get("kernel") == "bitsandbytes" else given

    @property
    def by_row(self) -> bool:
        return self.outliers != "batch"

    @field_validator("kernel")
    @classmethod
    def check_kernel(cls, kernel: str, info: ValidationInfo) -> str:
        if kernel == "bitsandbytes" and info.data.get("outliers") == "row":
            raise ValueError("bitsandbytes decides by batch; `outliers=batch`, or another kernel, is needed")
        return kernel

    @field_validator("skip")
    @classmethod
    def check_skip(cls, skip: str) -> str:
        named = [name for name in skip.split("+") if name]
        if unknown := [name for name in named if name not in LAYER_CLASSES]:
            raise ValueError(f"`{unknown[0]}` is no layer class")
        return "+".join(name for name in LAYER_CLASSES if name in named)


class NF4Options(Options):
    double_quant: bool = Field(True, description="on, off: absmax as 8-bit codes")


class AWQOptions(Options):
    bits: Literal[4, 3] = Field(4, description="4, 3: of a code")
    group: int = Field(0, description="128, 64, 32: weights under one scale; 0: the largest that divides")

    @field_validator("bits", mode="before")
    @classmethod
    def read_bits(cls, bits: object) -> object:
        return int(bits) if isinstance(bits, str) and bits.isdecimal() else bits

    @field_validator("group")
    @classmethod
    def check_group(cls, group: int) -> int:
        if group not in (0, *AWQ_GROUPS):
            raise ValueError("accepted are 0, 32, 64, 128")
        return group


class FP8Options(Options):
    """None."""


class INT3Options(Options):
    group: int = Field(64, description="64, 128: weights under one scale")

    @field_validator("group")
    @classmethod
    def check_group(cls, group: int) -> int:
        if group not in INT3_GROUPS:
            raise ValueError(f"accepted are {', '.join(map(str, INT3_GROUPS))}")
        return group
