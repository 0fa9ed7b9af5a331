"""MODEL, tokenizer and random weights: what goes together, and what is told instead of ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import write_checkpoint

from service.cli.display import Display
from service.cli.model import find_model
from service.cli.quantize import quantize
from service.cli.serve import curl_line
from service.compare.words import NO_VERDICT
from service.config import Settings, load_settings
from service.errors import CheckpointError, SettingError
from service.model.hub import PRESETS, resolve


def found(flags: dict[str, Any], **options: bool) -> tuple[Settings, Path]:
    with Display() as display:
        return find_model(load_settings(**flags), display, **options)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_checkpoint(folder, "byte_level")
    return folder


def test_a_preset_is_a_shape_with_random_weights() -> None:
    settings, path = found({"model": "preset:llama-3.1-8b"})
    assert path == PRESETS / "llama-3.1-8b"
    assert settings.name == "preset:llama-3.1-8b"
    assert (settings.is_random, settings.tokenizer) == (True, "none")
    config = settings.engine_config(path)
    assert (config.load_format, config.tokenizer) == ("random", "")
    with pytest.raises(CheckpointError, match=r"`bloom` does not exist; there are .*llama-3\.1-8b.*qwen3-8b"):
        found({"model": "preset:bloom"})
    with pytest.raises(CheckpointError, match="shape without weights"):
        found({"model": "preset:llama-3.1-8b", "load_format": "safetensors"})
    with pytest.raises(SettingError, match="revision"):
        found({"model": "preset:llama-3.1-8b", "revision": "v2"})


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("qwen3-8b", 8_190_735_360)],
)
def test_presets_are_the_shapes_they_are_called_after(name: str, num_parameters: int) -> None:
    """Parameters as the models' own pages count them."""
    import torch

    from service.model.random_weights import Draw, RandomWeights

    source = RandomWeights(PRESETS / name, torch.device("cpu"), Draw())
    assert source.num_parameters == num_parameters
    assert source.dtype == torch.bfloat16
    assert source.config.max_context_tokens in (40_960, 131_072)


def test_random_weights_need_config_json_alone(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = {"model": str(tmp_path), "load_format": "random"}
    assert found(model)[0].tokenizer == "none"
    for given in (str(tokenizer), str(tokenizer / "tokenizer.json")):
        settings, path = found({**model, "tokenizer": given}, needs_text=True)
        assert settings.tokenizer == str(tokenizer)
        assert settings.tokenizer_folder(path) == tokenizer
        assert settings.engine_config(path).tokenizer == str(tokenizer)
    with pytest.raises(SettingError, match="has no tokenizer, and this command works on text"):
        found(model, needs_text=True)
    with pytest.raises(SettingError, match=r"there is no tokenizer\.json"):
        found({**model, "tokenizer": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors weights"):
        found({"model": str(tmp_path)})


def test_a_checkpoint_keeps_its_own_tokenizer(tokenizer: Path) -> None:
    (tokenizer / "config.json").write_text("{}")
    settings, path = found({"model": str(tokenizer), "load_format": "random"})
    assert settings.tokenizer == ""
    assert settings.tokenizer_folder(path) == path == tokenizer


@pytest.mark.parametrize(
    "given", [{"load_seed": "3"}, {"random_outliers": "4"}, {"random_std": "0.1"}, {"save": "x"}]
)
def test_settings_of_random_weights_are_not_ignored(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"`{next(iter(given))}` = .* of no use to weights that are read"):
        found({"model": str(tmp_path), **given})


def test_only_serve_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"model": "preset:qwen3-8b", "save": str(tmp_path / "out")}
    assert found(flags, may_save=True)[0].save == str(tmp_path / "out")
    with pytest.raises(SettingError, match=r"`save` = .* of no use here"):
        found(flags)
    monkeypatch.chdir(tmp_path)
    assert found({**flags, "save": "out"}, may_save=True)[0].save == str(tmp_path / "out")


def test_trained_weights_are_calibrated_with_their_own_tokenizer_and_drawn_ones_with_a_given_one(
    tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(SettingError, match=r"has no tokenizer.*\n.*`--tokenizer FOLDER`"):
        quantize(load_settings(model="preset:qwen3-8b"), "awq", tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        (tokenizer / name).write_text("{}")
    with pytest.raises(SettingError, match="calibration reads the checkpoint's own tokenizer"):
        quantize(load_settings(model=str(tokenizer), tokenizer=str(tokenizer)), "awq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_seed_crosses_to_the_engine(tmp_path: Path) -> None:
    settings = load_settings(model="preset:qwen3-8b", load_seed="7", random_outliers="4", random_std="0.5")
    config = settings.engine_config(resolve("preset:qwen3-8b", "main", tmp_path, print, needs_weights=False))
    assert (config.load_seed, config.random_outliers, config.random_std) == (7, 4, 0.5)


def test_without_a_tokenizer_the_printed_line_sends_ids() -> None:
    line = curl_line("http://h:1", "m", False, has_chat=False, has_text=False)
    body = json.loads(line.rpartition("-d '")[2][:-1])
    assert body["prompt"] == [1, 2, 3]
    assert body["return_token_ids"] is True
    assert "no verdict on quality" in NO_VERDICT
