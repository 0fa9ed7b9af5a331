"""`--precisions`, `--kv-dtypes` and `--levels` as they are written, and checkpoints of modes' own."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from service.compare.modes import (
    check_checkpoint,
    parse_modes,
    parse_server,
    reference_of,
    require_unique,
    split_modes,
)
from service.compare.options import LevelSpec, defaults, parse_levels
from service.compare.report import Mode
from service.errors import CheckpointError, PrecisionError, SettingError


@pytest.mark.parametrize(
    ("text", "modes"),
    [
        ("bf16, int8,nf4", ["bf16", "int8", "nf4"]),
        ("int8:threshold=0,skip=o_proj,nf4", ["int8:threshold=0,skip=o_proj", "nf4"]),
        ("nf4,awq=ORG/MODEL-AWQ,bf16", ["nf4", "awq=ORG/MODEL-AWQ", "bf16"]),
        ("nf4:double_quant=off,awq=./a,b", ["nf4:double_quant=off", "awq=./a", "b"]),
    ],
)
def test_modes_are_split_at_commas_that_do_not_belong_to_options(text: str, modes: list[str]) -> None:
    assert split_modes(text) == modes


def test_every_precision_goes_with_every_cache() -> None:
    modes = parse_modes("bf16,nf4", "auto,int8")
    assert [mode.name for mode in modes] == ["bf16", "bf16 + kv int8", "nf4", "nf4 + kv int8"]
    assert [(mode.precision, mode.kv_dtype) for mode in modes][-1] == ("nf4", "int8")
    assert reference_of(modes).name == "bf16"


def test_an_own_checkpoint_is_named_where_the_precision_is_there_twice() -> None:
    one = parse_modes("fp16,awq=ORG/MODEL-AWQ")
    assert one[1] == Mode(name="awq", precision="awq", checkpoint="ORG/MODEL-AWQ")
    assert [mode.name for mode in parse_modes("fp16,awq,awq=ORG/MODEL-AWQ/")] == [
        *("fp16", "awq", "awq of MODEL-AWQ"),
    ]


@pytest.mark.parametrize(
    ("modes", "asked", "found"),
    [
        ("int8,fp32,fp16,bf16", "", "fp16"),
        ("int8,fp32", "", "fp32"),
        ("bf16,fp16", "fp16", "fp16"),
        ("bf16=OTHER,fp16", "", ""),
    ],
)
def test_the_reference_is_the_first_of_16_bits(modes: str, asked: str, found: str) -> None:
    if found:
        assert reference_of(parse_modes(modes), asked).name == found
    else:  # weights of its own are not the model's
        with pytest.raises(PrecisionError, match="no mode to compare against"):
            reference_of(parse_modes(modes), asked)


@pytest.mark.parametrize(
    ("precisions", "caches", "match"),
    [("", "", "names no mode"), ("awq=", "", "names no checkpoint"), ("bf16,bf16", "", "twice")],
)
def test_what_is_no_list_of_modes(precisions: str, caches: str, match: str) -> None:
    with pytest.raises(PrecisionError, match=match):
        parse_modes(precisions, caches)
    with pytest.raises(SettingError, match="`int4` does not exist"):
        parse_modes("bf16", "int4")


def test_another_server_is_a_name_and_an_address() -> None:
    mode = parse_server("vllm=http://127.0.0.1:8001/")
    assert mode == Mode(name="vllm", precision="", server="http://127.0.0.1:8001")
    assert reference_of([mode, *parse_modes("bf16")]).name == "bf16"
    for wrong in ("http://127.0.0.1:8001", "vllm=127.0.0.1:8001", "=http://x"):
        with pytest.raises(SettingError, match="is not a name and an address"):
            parse_server(wrong)
    with pytest.raises(PrecisionError, match="named twice"):
        require_unique([*parse_modes("bf16"), Mode(name="bf16", precision="", server="http://x")])


def test_levels_are_streams_rates_and_shares() -> None:
    assert parse_levels("60%,4, 2.5/s,1") == (
        *(LevelSpec(concurrency=1), LevelSpec(concurrency=4)),
        *(LevelSpec(rate_per_s=2.5), LevelSpec(share=0.6)),
    )
    for device in ("cpu", "cuda"):
        assert ",".join(map(str, defaults(device).levels)).count("%") == 3  # type: ignore[arg-type]
    for wrong in ("1,4", "50%", "1,x", "0,2/s", "1,-3/s", ""):
        with pytest.raises(SettingError, match="`--levels"):
            parse_levels(wrong)


def checkpoint(folder: Path, model_path: Path, **changes: object) -> Path:
    """A copy of the model's tokenizer and shape, with fields that differ."""
    folder.mkdir()
    fields = json.loads((model_path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": {}, **changes}))
    (folder / "tokenizer.json").write_bytes((model_path / "tokenizer.json").read_bytes())
    return folder


def test_an_own_checkpoint_has_the_models_shapes_and_tokens(model_path: Path, tmp_path: Path) -> None:
    mode = Mode(name="awq", precision="awq", checkpoint="ORG/AWQ")

    def check(own: Path) -> None:
        check_checkpoint(mode, own, model_path, model_path, ["a text", "another"])

    same = checkpoint(tmp_path / "same", model_path)
    check(same)
    written_anew = checkpoint(tmp_path / "anew", model_path)
    tokenizer = json.loads((written_anew / "tokenizer.json").read_text())
    (written_anew / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    check(written_anew)
    (same / "tokenizer.json").unlink()
    check(same)

    other = checkpoint(tmp_path / "other", model_path, vocab_size=300, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="vocab_size 300 instead of 256, num_hidden_layers 3"):
        check(other)
    strange = checkpoint(tmp_path / "strange", model_path)
    changed = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    changed.add_tokens(["text"])
    changed.save(str(strange / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check(strange)
