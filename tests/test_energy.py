"""The meter over a driver's library that is made up: units, what has no meter and why, what is given back."""

import logging
import sys
from types import ModuleType

import pytest

from service.energy import EnergyMeter
from service.errors import DeviceError

UUID = "GPU-5f0e3a1c-0000-4444-8888-123456789abc"


class FakeNVML(ModuleType):
    """pynvml as far as the meter calls it; `broken` functions answer with the error of their name."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.broken: dict[str, str] = {}
        self.num_open = 0
        self.millijoules = 5_000_000_000_000  # a month at 2 kW: more than 32 bits
        self.milliwatts = 312_500

    def answer(self, function: str) -> None:
        if function in self.broken:
            raise self.NVMLError(self.broken[function])

    def nvmlInit(self) -> None:  # noqa: N802
        self.answer("nvmlInit")
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.answer("nvmlDeviceGetHandleByUUID")
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        self.answer("nvmlDeviceGetTotalEnergyConsumption")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        self.answer("nvmlDeviceGetPowerUsage")
        return self.milliwatts


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_units_are_joules_and_watts(nvml: FakeNVML) -> None:
    meter = EnergyMeter.open(UUID)
    assert meter is not None
    before = meter.joules()
    nvml.millijoules += 1500
    assert meter.joules() - before == pytest.approx(1.5)
    assert meter.watts() == 312.5
    assert nvml.num_open == 1
    meter.close()
    assert nvml.num_open == 0


def test_a_cpu_has_none_and_the_library_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import would be an error
    with caplog.at_level(logging.INFO, "service.energy"):
        assert EnergyMeter.open("") is None
    assert "CPU" in caplog.text


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nvmlInit", "Driver Not Loaded"),
        ("nvmlDeviceGetTotalEnergyConsumption", "Not Supported"),
        ("nvmlDeviceGetPowerUsage", "Not Supported"),
        ("nvmlDeviceGetHandleByUUID", "Not Found"),
    ],
)
def test_why_there_is_none_is_said_and_the_library_given_back(
    nvml: FakeNVML, function: str, said: str
) -> None:
    nvml.broken[function] = said
    with pytest.raises(DeviceError, match=said):
        EnergyMeter.connect(UUID)
    assert EnergyMeter.open(UUID) is None
    assert nvml.num_open == 0


def test_a_device_that_is_lost_is_an_error_not_a_zero(nvml: FakeNVML) -> None:
    meter = EnergyMeter.connect(UUID)
    nvml.broken["nvmlDeviceGetTotalEnergyConsumption"] = "GPU is lost"
    with pytest.raises(DeviceError, match="GPU is lost"):
        meter.joules()


def test_the_real_library_says_that_this_machine_has_no_driver() -> None:
    """Where there is one, that it does not know this device."""
    with pytest.raises(DeviceError, match="NVML"):
        EnergyMeter.connect("GPU-00000000-0000-0000-0000-000000000000")
