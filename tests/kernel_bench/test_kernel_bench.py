"""`halftone bench --kernels` on a CPU with tiny shapes: its table, its JSON, and what it refuses."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console

from service.__main__ import run
from service.kernel_bench import contestants, measure
from service.kernel_bench.contestants import Built, Contestant, others, ours
from service.kernel_bench.table import notes, show
from service.precision import TABLE
from service.precision.base import LinearGroup, Read

CPU = torch.device("cpu")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LINEARS = {"qkv_proj": [256, 128], "o_proj": [128, 128], "gate_up_proj": [512, 128], "down_proj": [128, 256]}
ROWS, OUTLIERS = [3, 1], [0, 5]
NAME = {"type": "string", "minLength": 1}
NUMBER = {"type": "number", "exclusiveMinimum": 0}
COUNT = {"type": "integer", "minimum": 0}
LAYER = {
    "contestant": {"type": "string"},
    "is_ours": {"type": "boolean"},
    "dtype": {"enum": ["float16", "bfloat16", "float32"]},
    "rows": COUNT,
    "outlier_columns": {"type": ["integer", "null"]},
    "microseconds": NUMBER,
    "weight_bytes": COUNT,
    "bytes_per_s": NUMBER,
    "ceiling_share": NUMBER,
    "is_from_memory": {"type": "boolean"},
    "is_captured": {"const": False},
}
FIGURE = LAYER | {
    "kernel": NAME,
    "linear": {"enum": list(LINEARS)},
    "read_microseconds": NUMBER,
    "copies": COUNT,
}


def exactly(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMA = exactly(
    {
        "format": {"const": "halftone-kernels/1"},
        "halftone": NAME,
        "method": NAME,
        "device": NAME,
        "model": NAME,
        "driver": {"type": "string"},
        "threads": {"type": "integer", "minimum": 1},
        "versions": exactly(
            {name: {"type": "string"} for name in ("python", "torch", "cuda", "triton", "bitsandbytes")}
        ),
        "linears": {"const": LINEARS},
        "rows": {"const": ROWS},
        "repeats": COUNT,
        "seed": COUNT,
        "ceiling_bytes_per_s": NUMBER,
        "figures": {"type": "array", "items": exactly(FIGURE)},
        "layers": {"type": "array", "items": exactly(LAYER)},
        "absent": {
            "type": "array",
            "items": exactly({"contestant": NAME, "linear": NAME, "reason": NAME}),
        },
    }
)


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """The command is run in this process, and sets how many torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the command itself, for every contestant."""
    out = tmp_path_factory.mktemp("result") / "kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MOST_COPIES", 2)
        flags = ("--rows", "3,1", "--outliers", "0,5", "--repeats", "2", "--device", "cpu", "--threads", "1")
        assert run(["bench", "--kernels", "--model", str(folder), *flags, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_json_has_its_schema(result: dict[str, Any]) -> None:
    jsonschema.validate(result, SCHEMA)
    assert not result["absent"]
    for figure in result["figures"]:
        assert math.isclose(
            figure["bytes_per_s"], figure["weight_bytes"] / figure["microseconds"] * 1e6, rel_tol=1e-9
        )


def test_everybody_is_measured_everywhere(result: dict[str, Any]) -> None:
    """Every row of the table of precisions, but the 16-bit types that were not asked for, and all others."""
    modes = set(TABLE) - {"fp32", "fp16"}
    foreign = {each.name for each in others(CPU, torch.bfloat16)}
    found = {
        (figure["contestant"], figure["rows"], figure["outlier_columns"], figure["linear"])
        for figure in result["figures"]
    }
    wanted = {
        (name, rows, outliers, linear)
        for name in modes | foreign
        for rows in ROWS
        for outliers in (OUTLIERS if "int8" in name else [None])
        for linear in LINEARS
    }
    assert found == wanted
    assert len(result["figures"]) == len(wanted)
    layers = {(each["contestant"], each["rows"], each["outlier_columns"]) for each in result["layers"]}
    assert layers == {key[:3] for key in wanted}
    assert {each["contestant"] for each in result["layers"] if each["is_ours"]} == modes


def test_a_layer_is_the_sum_of_its_linears(result: dict[str, Any]) -> None:
    for layer in result["layers"]:
        parts = [
            figure
            for figure in result["figures"]
            if all(figure[key] == layer[key] for key in ("contestant", "rows", "outlier_columns"))
        ]
        assert math.isclose(layer["microseconds"], sum(part["microseconds"] for part in parts))
        assert layer["weight_bytes"] == sum(part["weight_bytes"] for part in parts)
        share = sum(part["read_microseconds"] for part in parts) / layer["microseconds"]
        assert math.isclose(layer["ceiling_share"], share)


def shown(result: dict[str, Any]) -> str:
    console = Console(width=110, file=io.StringIO(), record=True)
    show(result, console)
    return console.export_text()


def test_the_table_has_a_line_for_each(result: dict[str, Any]) -> None:
    text = shown(result)
    for layer in result["layers"]:
        told = layer["contestant"]
        told += "" if layer["outlier_columns"] is None else f", {layer['outlier_columns']} outliers"
        assert text.count(f"\n  {told} ") == len(ROWS), told
    assert "…" not in text, "a column is cut"
    assert "stay in a cache" in text


def plan(folder: Path, **changed: Any) -> measure.Plan:
    given: dict[str, Any] = {
        "precisions": ["bf16"],
        "rows": [1],
        "outliers": [0],
        "repeats": 1,
        "seed": 0,
    }
    return measure.Plan(folder, CPU, torch.bfloat16, **(given | changed))


def unbuildable(group: LinearGroup, read: Read) -> Built:
    raise RuntimeError("no kernel for this device\nand more")


def test_who_cannot_be_measured_is_told_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' faults end nobody's table, and neither does a mode that does not fit the shape."""
    monkeypatch.setattr(measure, "MOST_COPIES", 2)
    narrow = folder.parent / "narrow"
    narrow.mkdir()
    (narrow / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 96}))
    absentee = Contestant("absentee", torch.bfloat16, unbuildable)
    monkeypatch.setattr(measure, "others", lambda *_: [absentee])
    found = measure.measure(plan(narrow, precisions=["nf4"]), "narrow", lambda *_: None)
    missing = {(each["contestant"], each["linear"]): each["reason"] for each in found["absent"]}
    assert set(missing) == {("nf4", "down_proj"), *(("absentee", name) for name in LINEARS)}
    assert missing["absentee", "o_proj"] == "RuntimeError: no kernel for this device"
    assert not found["layers"]
    text = shown(found)
    assert text.count("absentee") >= 2
    assert "divisible by 64" in " ".join(text.split())
    assert any("absentee has no figure for qkv_proj" in line for line in notes(found))


def test_a_fault_of_our_own_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "build_ours", lambda *_: unbuildable(*_[1:]))
    with pytest.raises(RuntimeError, match="no kernel"):
        measure.measure(plan(folder), "shape", lambda *_: None)


def test_outliers_are_planted_as_asked(folder: Path) -> None:
    for count in (0, 3, 32):
        x = measure.rows_of(plan(folder), torch.bfloat16, 7, 128, count)
        reached = x.abs() >= 6
        assert reached.all(0).sum() == reached.any(0).sum() == count


def test_weights_are_rotated_past_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as four caches hold, each with memory of its own, of whoever keeps tensors."""
    monkeypatch.setattr(measure.devices, "last_cache_bytes", lambda _: 20_000)
    (contestant,) = ours(["bf16"], CPU, torch.bfloat16)
    given = plan(folder)
    built = list(measure.copies_of(given, contestant, measure.source_of(given), "o_proj"))
    assert len(built) == math.ceil(4 * 20_000 / (128 * 128 * 2))
    for contestant in ours([], CPU, torch.bfloat16):
        source = measure.source_of(given, contestant)
        layers = [each.call.__self__ for each in measure.copies_of(given, contestant, source, "o_proj")]  # type: ignore[attr-defined]
        for buffers in zip(*(layer.buffers() for layer in layers), strict=True):
            held = [buffer.data_ptr() for buffer in buffers if buffer.numel()]
            assert len(set(held)) == len(held), contestant.name


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rows", "1,x"], "`x`"),
        (["--rows", "0"], "`0`"),
        (["--outliers", "-1"], "`-1`"),
        (["--precisions", "int5"], "`int5`"),
        (["--model", "preset:nothing"], "`nothing`"),
        (["--load-format", "random"], "--load-format"),
        (["--concurrency", "1"], "--concurrency"),
    ],
)
def test_bad_flags_are_named(flags: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--kernels", "--device", "cpu", *flags]) in (2, 3)
    printed = capfd.readouterr().err
    assert named in printed
    assert "hint: " in printed


def test_a_file_that_exists_is_left_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    out.write_text("mine")
    assert run(["bench", "--kernels", "--model", str(folder), "--json", str(out)]) == 2
    assert out.read_text() == "mine"
    assert str(out) in capfd.readouterr().err


def test_each_help_names_the_other_s_flags(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(["bench", "--help"])
    assert "--kernels" in capfd.readouterr().out
    assert run(["bench", "--kernels", "--help"]) == 0
    assert "--outliers" in capfd.readouterr().out
