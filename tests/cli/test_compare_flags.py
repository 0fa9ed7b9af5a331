"""Flags of `halftone compare` -> modes and amounts, before anything starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.__main__ import run as run_command
from service.cli import compare as command
from service.cli.compare import device_of, read_options
from service.compare.options import defaults
from service.config import load_settings
from service.errors import SettingError
from tests.tiny_tokenizers import write_bare_model


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command on a model folder -> what run_compare was called with."""
    seen: dict[str, Any] = {}

    def noted(settings: Any, path: Path, modes: Any, out: Path, options: Any, **more: Any) -> Any:
        seen.update(modes=modes, options=options, **more)
        return SimpleNamespace(rows=[])

    model = write_bare_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(command, "run_compare", noted)
    monkeypatch.delenv("HALFTONE_KV_DTYPE", raising=False)

    def run(*flags: str) -> dict[str, Any]:
        assert run_command(["compare", str(model), "--device", "cpu", "--out", str(tmp_path), *flags]) == 0
        return seen

    return run


def test_flags_become_modes_and_amounts(asked: Any) -> None:
    seen = asked(
        *("--precisions", "fp16,nf4", "--kv-dtypes", "auto,int8", "--reference", "fp16 + kv int8"),
        *("--server", "vllm=http://127.0.0.1:8001", "--levels", "2,3/s", "--slo", "ttft=500ms,itl=30ms"),
        *("--repeats", "4", "--max-repeats", "5", "--minutes", "3", "--output-tokens", "8", "--seed", "9"),
    )
    names = ["fp16", "fp16 + kv int8", "nf4", "nf4 + kv int8", "vllm"]
    assert [mode.name for mode in seen["modes"]] == names
    assert seen["reference"] == "fp16 + kv int8"
    options = seen["options"]
    assert (options.repeats, options.max_repeats, options.minutes) == (4, 5, 3.0)
    assert (options.output_tokens, options.seed) == (8, 9)
    assert [str(level) for level in options.levels] == ["2", "3/s"]
    assert str(options.slo) == "ttft=500ms,itl=30ms"


def test_without_flags_the_device_decides(asked: Any) -> None:
    seen = asked()
    assert [mode.name for mode in seen["modes"]] == ["bf16", "int8", "nf4", "awq"]
    assert seen["options"] == defaults("cpu")
    assert asked("--kv-dtype", "int8")["modes"][0].name == "bf16 + kv int8"


def test_an_own_checkpoint_is_found_and_held_against_the_model(asked: Any, tmp_path: Path) -> None:
    own = write_bare_model(tmp_path / "own")
    (own / "model.safetensors").write_bytes(b"")
    assert asked("--precisions", f"bf16,awq={own}")["checkpoints"] == {"awq": own}


@pytest.mark.parametrize(
    ("levels", "slo", "words"), [("1", "", "--levels"), ("", "ttft=500", "--slo"), ("x", "", "--levels")]
)
def test_what_is_no_load_and_no_service_level(levels: str, slo: str, words: str) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        read_options("cpu", levels, slo, {})
    assert caught.value.hint


@pytest.mark.parametrize(("code", "device"), [(0, "cuda"), (1, "cpu")])
def test_the_device_is_the_engines(code: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def answered(program: object, **_: object) -> SimpleNamespace:
        asked.append(program)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr("subprocess.run", answered)
    assert device_of(load_settings(model="demo", device="cuda")) == "cuda"
    assert asked == []
    assert device_of(load_settings(model="demo")) == device
