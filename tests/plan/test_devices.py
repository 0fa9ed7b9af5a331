"""GPUs by name, sizes as people write them, and a running engine's own device."""

import pytest

from service.errors import SettingError
from service.plan.devices import DRIVER_NAMES, GPUS, find_device, read_size, served_device


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 << 30), ("24gib", 24 << 30), ("80 GB", 80 * 10**9), ("1.5TiB", 3 << 39),
        ("512MiB", 1 << 29), ("24", None), ("GiB", None), ("-1GB", None), ("24GiBs", None), ("", None),
    ],
)  # fmt: skip
def test_sizes(text: str, expected: int | None) -> None:
    assert read_size(text) == expected


@pytest.mark.parametrize("name", GPUS)
def test_known_gpus_are_whole(name: str) -> None:
    device = find_device(name.upper())
    assert device.name == name
    assert device.memory_bytes > 10 << 30
    assert device.bandwidth >= 3e11
    assert device.flops["fp32"] < device.flops["16bit"] < device.flops["8bit"]


def test_every_driver_s_name_is_of_a_known_gpu() -> None:
    assert {name for _, name in DRIVER_NAMES} == set(GPUS)


@pytest.mark.parametrize(
    ("gpu", "bandwidth", "param"),
    [
        ("h100", "", "gpu"), ("24", "", "gpu"), ("1MB", "", "gpu"), ("24GiB", "fast", "bandwidth"),
        ("24GiB", "0GB/s", "bandwidth"), ("h100-80gb", "3TB/s", "bandwidth"),
    ],
)  # fmt: skip
def test_wrong_ones_are_named(gpu: str, bandwidth: str, param: str) -> None:
    with pytest.raises(SettingError) as caught:
        find_device(gpu, bandwidth)
    assert caught.value.param == param
    assert caught.value.hint


def test_a_size_with_its_bandwidth() -> None:
    device = find_device("24GiB", "1008GB/s")
    assert (device.memory_bytes, device.bandwidth, device.flops) == (24 << 30, 1.008e12, {})
    assert find_device("24GiB").bandwidth == 0


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-141gb"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"), ("NVIDIA A10G", "a10"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA B200", "b200-180gb"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"), ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA A100-SXM-80GB", "a100-80gb"),
    ],
)  # fmt: skip
def test_a_served_gpu_has_its_own_memory_and_the_data_sheet_s_speed(told: str, name: str) -> None:
    device = served_device("cuda:0", told, 77 << 30)
    assert (device.name, device.memory_bytes, device.is_gpu) == (told, 77 << 30, True)
    assert (device.bandwidth, device.has_e4m3) == (GPUS[name].bandwidth, GPUS[name].has_e4m3)


@pytest.mark.parametrize(
    "told", ["NVIDIA T1000", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100X"]
)
def test_a_device_without_a_data_sheet_has_no_speed(told: str) -> None:
    assert served_device("cuda:0", told, 8 << 30).bandwidth == 0
    cpu = served_device("cpu", "AMD EPYC", 8 << 30)
    assert (cpu.bandwidth, cpu.is_gpu) == (0, False)
