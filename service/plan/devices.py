"""GPUs by name: memory as torch reports it, bandwidth and dense arithmetic of the vendors' data sheets.

`--gpu NAME`, `--gpu 24GiB`, or a running engine's device --> Device --> estimate, roofline
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.errors import SettingError

GIB = 1 << 30
UNITS = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("", "K", "M", "G", "T")) if prefix},
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)
Arithmetic = Literal["fp32", "16bit", "8bit"]
NAMES = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Device:
    """What an engine would have. Figures that are not known are 0 or absent."""

    name: str
    memory_bytes: int
    bandwidth: float = 0.0  # bytes/s
    flops: Mapping[Arithmetic, float] = field(default_factory=dict)  # operations/s, dense
    has_e4m3: bool = True  # can it multiply 8-bit floats?
    is_gpu: bool = True


def gpu(
    name: str,
    memory_gib: float,
    gigabytes_per_s: float,
    teraflops: tuple[float, float, float],
    has_e4m3: bool = True,
) -> Device:
    """`teraflops`: in float32, with 16-bit and with 8-bit operands."""
    kinds: tuple[Arithmetic, ...] = ("fp32", "16bit", "8bit")
    flops = {kind: figure * 1e12 for kind, figure in zip(kinds, teraflops, strict=True)}
    return Device(name, int(memory_gib * GIB), gigabytes_per_s * 1e9, flops, has_e4m3)


GPUS = {
    device.name: device
    for device in (
        gpu("h200-141gb", 139.8, 4800, (67, 989, 1979)),
        gpu("h100-80gb", 79.1, 3350, (67, 989, 1979)),
        gpu("h100-pcie-80gb", 79.1, 2000, (51, 756, 1513)),
        gpu("b200-180gb", 178.4, 8000, (75, 2250, 4500)),
        gpu("a100-80gb", 79.1, 2039, (19.5, 312, 624), has_e4m3=False),
        gpu("a100-40gb", 39.4, 1555, (19.5, 312, 624), has_e4m3=False),
        gpu("l40s", 44.4, 864, (91.6, 362, 733)),
        gpu("l4", 22.0, 300, (30.3, 121, 242)),
        gpu("a10", 22.1, 600, (31.2, 125, 250), has_e4m3=False),
        gpu("rtx5090", 31.4, 1792, (104.8, 209.5, 419)),
        gpu("rtx4090", 23.5, 1008, (82.6, 165.2, 330.3)),
        gpu("rtx3090", 23.6, 936, (35.6, 71, 142), has_e4m3=False),
    )
}
# what a driver calls them, in small letters and digits alone; a variant of another speed must not match
DRIVER_NAMES = (
    (r"h200$", "h200-141gb"), (r"h10080gbhbm3$", "h100-80gb"), (r"h100pcie$", "h100-pcie-80gb"),
    (r"b200$", "b200-180gb"), (r"a100.*80gb", "a100-80gb"), (r"a100.*40gb", "a100-40gb"), (r"l40s$", "l40s"),
    (r"l4$", "l4"), (r"a10g?$", "a10"), (r"rtx5090$", "rtx5090"), (r"rtx4090$", "rtx4090"),
    (r"rtx3090$", "rtx3090"),
)  # fmt: skip


def find_device(text: str, bandwidth: str = "") -> Device:
    """`h100-80gb` or `24GiB`; `bandwidth` such as `1008GB/s` where a size alone was given.

    Raises SettingError.
    """
    known = GPUS.get(text.lower())
    if known:
        if bandwidth:
            raise SettingError(
                f"`bandwidth` = `{bandwidth[:64]}`: that of `{known.name}` is known, "
                f"{known.bandwidth / 1e9:,.0f} GB/s",
                hint="leave it out, or give the GPU's memory instead of its name",
                param="bandwidth",
            )
        return known
    memory = read_size(text)
    if memory is None or memory < GIB // 4:
        raise SettingError(
            f"`gpu` = `{text[:64]}` is neither a GPU that is known nor a size of memory",
            hint=f"known are {', '.join(GPUS)}; a size reads 24GiB or 80GB",
            param="gpu",
        )
    per_s = 0
    if bandwidth:
        found = read_size(bandwidth.removesuffix("/s"))
        if not found:
            raise SettingError(
                f"`bandwidth` = `{bandwidth[:64]}` is no number of bytes a second",
                hint="it reads 1008GB/s or 3.35TB/s",
                param="bandwidth",
            )
        per_s = found
    return Device(text, memory, float(per_s))


def served_device(device: str, device_name: str, memory_bytes: int) -> Device:
    """What a running engine says of its own: its figures are the data sheet's where the name is known."""
    if not device.startswith("cuda"):
        return Device(device_name, memory_bytes, is_gpu=False)
    plain = NAMES.sub("", device_name.lower())
    for pattern, name in DRIVER_NAMES:
        if re.search(pattern, plain):
            known = GPUS[name]
            return Device(device_name, memory_bytes, known.bandwidth, known.flops, known.has_e4m3)
    return Device(device_name, memory_bytes)


def read_size(text: str) -> int | None:
    """`24GiB`, `80 GB` -> bytes; None for what is no size."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        return None
    unit = next((unit for unit in UNITS if unit.lower() == found[2].lower()), "")
    return int(float(found[1]) * UNITS[unit])
