"""Energy and power of the GPU that an engine serves from, read from NVML: for /metrics and for reports.

EngineInfo.device_uuid --open--> EnergyMeter --joules, watts--> front, compare

NVML counts the whole board, whoever uses it: two servers on one GPU read the same joules. Nothing here
imports torch or makes a CUDA context; a CPU has no meter, and that is said, not guessed around.
"""

import logging
from typing import Any, Self

from service.errors import DeviceError

logger = logging.getLogger(__name__)


class EnergyMeter:
    """The counters of one GPU. `open` or `connect` makes one, `close` ends it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, device_uuid: str) -> Self | None:
        """The meter of the device with NVML's UUID `device_uuid`, or None; why there is none is logged."""
        try:
            return cls.connect(device_uuid)
        except DeviceError as error:
            logger.info("no energy figures: %s", error.message)
            return None

    @classmethod
    def connect(cls, device_uuid: str) -> Self:
        """As `open`, but a DeviceError says why there is no meter. An empty `device_uuid` is a CPU's."""
        if not device_uuid:
            raise DeviceError("the engine runs on a CPU; energy is read from NVIDIA GPUs alone")
        import pynvml  # 20 ms that a server on a CPU does without

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML, the driver's own library, cannot be used: {error}") from None
        try:
            meter = cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(device_uuid))
            meter.joules()  # whether a device counts is known only by asking it
            meter.watts()
        except (pynvml.NVMLError, DeviceError) as error:
            pynvml.nvmlShutdown()
            raise DeviceError(
                f"device `{device_uuid}` has no energy counter that NVML can read: {error}",
                hint="a MIG slice has none of its own, and GPUs older than Volta have none at all",
            ) from None
        return meter

    def joules(self) -> float:
        """Energy since the driver was loaded; only differences mean anything. The driver renews it some ten
        times a second. DeviceError where the device does not count, or is lost."""
        return float(self._read("nvmlDeviceGetTotalEnergyConsumption")) * 1e-3

    def watts(self) -> float:
        """Power now; from Ampere on the driver's mean over the last second. DeviceError as `joules`."""
        return float(self._read("nvmlDeviceGetPowerUsage")) * 1e-3

    def close(self) -> None:
        """Gives NVML back; the meter must not be read any more."""
        self._nvml.nvmlShutdown()

    def _read(self, function: str) -> int:
        """A figure in thousandths of its unit."""
        try:
            return int(getattr(self._nvml, function)(self._handle))
        except self._nvml.NVMLError as error:
            raise DeviceError(f"the GPU's `{function}` cannot be read: {error}") from None
