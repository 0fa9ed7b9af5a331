"""`halftone quantize`: trained weights and drawn ones, and what it says of time and memory."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from service.__main__ import run
from service.cli.quantize import quantize
from service.config import load_settings
from service.errors import PrecisionError, SettingError, ShortageError, SystemProblem
from service.model.checkpoint import Checkpoint
from service.model.random_weights import Draw, RandomWeights
from service.model.shards import ShardWriter
from service.quantize import calibration_info, quantize_to, spent
from service.quantize.spent import Spent
from tests.tiny_models import load_instance, logits_of, make_checkpoint
from tests.tiny_tokenizers import byte_level

SHAPE = {"vocab_size": 424, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT = "the quick brown fox jumps over the lazy dog and says hello world to everyone in the street; " * 60
CPU = torch.device("cpu")
TIMES = re.compile(
    r"\d+ s: hash \d+\.\d, text \d+\.\d, read [^;]*, write \d+\.\d; at most [\d.]+ [MG]B of memory on "
)


def unwanted(*_: object) -> NoReturn:
    pytest.fail("it was refused too late")


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "foxes.txt").write_text(TEXT)
    return str(tmp_path / "foxes.txt")


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """config.json alone."""
    make_checkpoint(tmp_path / "whole", "llama", torch.bfloat16, **SHAPE)
    (tmp_path / "shape").mkdir()
    (tmp_path / "whole" / "config.json").rename(tmp_path / "shape" / "config.json")
    return tmp_path / "shape"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    byte_level().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer"


def test_drawn_weights_are_calibrated_like_the_checkpoint_they_would_be(
    shape: Path, tokenizer: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a shape can be timed, and shown to fit, before its weights are fetched."""
    settings = load_settings(
        model=str(shape), load_format="random", random_std="0.1", load_seed="3", random_outliers="2",
        tokenizer=str(tokenizer), calibration=text, device="cpu",
    )  # fmt: skip
    quantize(settings, "awq", tmp_path / "out")
    said = capsys.readouterr().out
    assert "MB of random weights\n" in said
    assert f"serve it with: halftone serve {tmp_path / 'out'}" in said
    made = Checkpoint(tmp_path / "out")
    assert made.random_weights["seed"] == "3"
    assert calibration_info(tmp_path / "out")["text"] == "foxes.txt"
    assert "source_sha256" not in json.loads((tmp_path / "out" / "halftone.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    tokens = byte_level().encode(TEXT).ids[:100]
    drawn = RandomWeights(shape, CPU, Draw(3, 2, 0.1))
    wanted = logits_of(load_instance(drawn), tokens)
    got = logits_of(load_instance(tmp_path / "out", "awq", dtype=torch.float32), tokens)
    assert (got - wanted).norm() < 0.3 * wanted.norm()


def test_it_says_where_the_time_went(
    shape: Path, tokenizer: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    (shape / "config.json").rename(whole / "config.json")
    (tokenizer / "tokenizer.json").rename(whole / "tokenizer.json")
    quantize(load_settings(model=str(whole), calibration=text, device="cpu"), "awq", tmp_path / "out")
    said = capsys.readouterr().out
    assert TIMES.search(said), said
    assert "random" not in said


def test_drawn_weights_are_quantized_to_the_same_bytes_each_time(
    shape: Path, tokenizer: Path, text: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        source = RandomWeights(shape, CPU, Draw(1))
        quantize_to(source, "awq", tmp_path / name, text, lambda *_: None, "cpu", tokenizer)
    one, two = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    assert one.names == two.names
    assert all(one.read(name).equal(two.read(name)) for name in one.names)


@pytest.mark.parametrize("given", ["none", "demo", "no/folder"])
def test_trained_weights_with_a_tokenizer_are_refused_before_anything_is_fetched(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by `none`, which made the checkpoint one that has no tokenizer."""
    monkeypatch.setattr("service.cli.model.resolve", unwanted)
    with pytest.raises(
        SettingError, match=f"`tokenizer` = `{given}`: calibration reads the checkpoint's own"
    ):
        quantize(load_settings(model="some/model", tokenizer=given), "awq", tmp_path / "out")


def test_a_folder_in_use_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.quantize.find_model", lambda *_, **__: pytest.fail("it fetches"))
    (tmp_path / "mine").touch()
    with pytest.raises(SystemProblem, match="not an empty folder"):
        quantize(load_settings(model="ORG/NAME"), "awq", tmp_path)


def test_a_mode_without_a_checkpoint_is_refused_before_weights_are_read(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.quantize.source_sha256", unwanted)
    with pytest.raises(PrecisionError, match="`nf4` has no checkpoint of its own; accepted is `awq`"):
        quantize_to(tmp_path / "whole", "nf4", tmp_path / "out", "", unwanted, "cpu")


def test_a_device_without_room_is_told(
    shape: Path, tokenizer: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called a fault of ours."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("service.quantize.calibration.build_layer", full)
    settings = load_settings(
        model=str(shape), load_format="random", tokenizer=str(tokenizer), calibration=text, device="cpu"
    )
    with pytest.raises(ShortageError) as told:
        quantize(settings, "awq", tmp_path / "out")
    assert "no room for one layer at a time of the 16-bit weights that `awq` is made from" in str(told.value)
    assert told.value.hint.endswith("`halftone quantize --device cpu`")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--dtype=fp16", "--head=int8", "--kv-tokens=64", "--deterministic"])
def test_flags_that_would_be_ignored_are_none(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "demo", "--out", "out", flag]) == 2
    assert f"No such option: {flag.partition('=')[0]}" in capsys.readouterr().err


def test_threads_are_told_to_wait_asleep_before_torch_is_there() -> None:
    """Beside one other busy process a search of 0.5 s took 36, its threads spinning."""
    program = (
        "import os, sys; from service.engine import child; from service.__main__ import run; "
        "child.set_threads = lambda count: os._exit(40 + count + ('torch' in sys.modules)); "
        "run(['quantize', 'demo', '--threads', '3', '--out', 'out'])"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 43


def test_every_tensor_s_writing_counts(
    shape: Path, tokenizer: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of embedding and lm_head did not, nor the shard that they fill."""
    now, add = [0.0], ShardWriter.add

    def slow(self: ShardWriter, name: str, tensor: Tensor) -> None:
        now[0] += 1
        add(self, name, tensor)

    monkeypatch.setattr(spent, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ShardWriter, "add", slow)
    source = RandomWeights(shape, CPU, Draw(1))
    took = quantize_to(source, "awq", tmp_path / "out", text, lambda *_: None, "cpu", tokenizer)
    assert took.seconds["write"] == now[0] == len(Checkpoint(tmp_path / "out").names)


def test_a_part_within_a_part_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(spent.time, "monotonic", lambda: now[0])
    took = Spent(CPU)
    with took.on("observe"):
        now[0] += 1
        with took.on("read"):
            now[0] += 4
            with took.on("hash"):
                now[0] += 16
        now[0] += 32
    with took.on("observe"):
        now[0] += 64
    assert took.seconds == {"observe": 97, "read": 4, "hash": 16}
    assert took.peak_bytes > 0
