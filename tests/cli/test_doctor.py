"""`doctor` says what it found, and asks for a fix exactly where `serve` would fail."""

import socket
from pathlib import Path

import pytest

from service.cli import doctor as checks
from service.cli.doctor import Finding, doctor
from service.config import load_settings


def test_a_machine_that_lacks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor(load_settings(device="cpu", port=0, cache_dir=str(tmp_path)))
    printed = capsys.readouterr().out
    assert code == 0, printed
    for name in (
        "python",
        "driver",
        "torch",
        "device",
        "memory",
        "bitsandbytes",
        "triton",
        "CPU kernels",
        "cache",
        "disk",
        "port",
    ):
        assert name in printed


def test_a_taken_port_is_a_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "CHECKS", (checks.check_port,))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert doctor(load_settings(port=other.getsockname()[1])) == 1
    assert "--port" in capsys.readouterr().out


def test_a_device_that_torch_cannot_use_is_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("service.device.nvidia_driver", lambda: "535.10")
    driver, _, device = checks.check_device(load_settings(device="cuda"))
    assert driver == Finding("driver", "535.10")
    assert "535.10" in device.found
    assert "make install" in device.fix


def test_cpu_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.kernels.native._State.choice", "auto")
    monkeypatch.setattr("service.kernels.native._State.library", None)
    monkeypatch.setattr("service.kernels.native._State.reason", "this CPU is another")
    assert checks.check_cpu_kernels(load_settings()) == [
        Finding("CPU kernels", "torch's: this CPU is another")
    ]
    [asked] = checks.check_cpu_kernels(load_settings(cpu_kernels="native"))
    assert "this CPU is another" in asked.found
    assert asked.fix


def test_little_memory_and_little_disk_are_fixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.device.memory_free_bytes", lambda device: 1_000_000)
    assert checks.check_device(load_settings(device="cpu"))[-1].fix
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    assert "--cache-dir" in checks.check_disk(load_settings(cache_dir=str(tmp_path)))[-1].fix
