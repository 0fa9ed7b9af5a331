"""What is found out about a configuration before an engine makes room for it."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_models import make_checkpoint

from service.engine import child
from service.messages import EngineConfig, Fatal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(path, "llama", torch.bfloat16)
    return path


def checked(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, Fatal | None]:
    """As the process does -> exit code, and what it said."""
    monkeypatch.setattr(child, "set_threads", lambda threads: None)  # they are this process's here
    with pytest.raises(SystemExit) as ended:
        child.check(msgspec.json.encode(config).decode())
    said = capsys.readouterr().out
    return ended.value.code, msgspec.json.decode(said, type=Fatal) if said else None


@pytest.mark.parametrize("precision", ["auto", "bf16", "nf4", "awq:bits=3", "int8:threshold=0"])
@pytest.mark.parametrize("load_format", ["safetensors", "random"])
def test_what_can_begin_says_nothing(
    folder: Path,
    precision: str,
    load_format: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even of a device that is not here: the one there is belongs to the engine that serves."""
    config = EngineConfig(model_path=str(folder), precision=precision, device="cuda", load_format=load_format)
    assert checked(config, monkeypatch, capsys) == (0, None)


@pytest.mark.parametrize(
    ("precision", "code", "words"),
    [
        ("nf4:x=1", "invalid_precision", "option `x=1` of precision `nf4`"),
        ("nf4", "invalid_precision", "precision `nf4` does not read"),
    ],
)
def test_what_cannot_says_why(
    folder: Path,
    tmp_path: Path,
    precision: str,
    code: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint in AWQ is nothing that NF4 could be made from."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    exit_code, fatal = checked(
        EngineConfig(model_path=str(tmp_path), precision=precision), monkeypatch, capsys
    )
    assert exit_code == child.EXIT_UNUSABLE
    assert fatal is not None
    assert fatal.code == code
    assert words in fatal.message
    assert fatal.hint
