"""From a 16-bit folder to a quantized one: what stands in it, and that it is whole or not there."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from service.errors import CheckpointError, PrecisionError, SystemProblem
from service.kernels.awq_linear.reference import pack, unpack
from service.kernels.dense_linear import pack_weight, unpack_weight
from service.messages import EngineConfig
from service.model import shards
from service.model.checkpoint import Checkpoint
from service.model.config import read_config
from service.precision import load_backend
from service.quality.texts import Text
from service.quantize import awq_checkpoint, cache, calibration_info, prepare, quantize_to
from service.quantize.awq import Grid, Rounded, quantize_layer, round_weight
from service.quantize.awq_checkpoint import (
    checkpoint_bytes,
    choose_grid,
    gemm_layout,
    quantize_checkpoint,
    quantized_tensors,
)
from service.quantize.cache import cache_key, source_sha256
from service.quantize.calibration import InputStatistics, ObservedLayer
from tests.tiny_models import load_instance, logits_of, make_checkpoint
from tests.tiny_tokenizers import byte_level

SHAPE = {"vocab_size": 424, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT = "the quick brown fox jumps over the lazy dog and says hello world to everyone in the street; " * 60
CPU = torch.device("cpu")


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    make_checkpoint(folder, "llama", torch.bfloat16, **SHAPE)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "foxes.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def quantized(source: Path, calibration: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize_to(source, "awq", out, calibration, silent, "cpu")
    return out


def test_words_made_by_hand() -> None:
    """Column j of eight sits at nibble (0, 4, 1, 5, 2, 6, 3, 7)[j]: columns 0..7 hold 1..8."""
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    assert pack(values).tolist() == [[0x8642_7531 - 2**32]]
    codes = torch.arange(16, dtype=torch.uint8).view(8, 2)  # 8 outputs, 2 inputs
    zeros = torch.tensor([[7, 6, 5, 4, 3, 2, 1, 0]], dtype=torch.uint8).t()
    scales = torch.arange(8, dtype=torch.float16).view(8, 1)
    tensors = gemm_layout(Rounded(codes, zeros, scales))
    even, odd = 0xECA8_6420, 0xFDB9_7531  # column j holds 2j at input 0, 2j + 1 at input 1
    by_hand = [[0xEA62_C840 - 2**32], [0xFB73_D951 - 2**32]]
    assert even.bit_count() + odd.bit_count() == sum(int(code).bit_count() for code in codes.flatten())
    assert tensors["qweight"].tolist() == by_hand
    assert tensors["qzeros"].tolist() == [[0x0246_1357]]
    assert tensors["scales"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unpack(tensors["qweight"]).tolist() == codes.t().tolist()


def test_the_folder_stands_alone(source: Path, quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (quantized / name).read_bytes() == (source / name).read_bytes()
    tensors = load_file(quantized / "model.safetensors")
    before = load_file(source / "model.safetensors")
    path = "model.layers.1.mlp.down_proj"
    assert tensors[f"{path}.qweight"].shape == (96, 8)
    assert tensors[f"{path}.qzeros"].shape == (3, 8)
    assert tensors[f"{path}.scales"].shape == (3, 64)
    assert tensors[f"{path}.scales"].dtype == torch.float16
    assert f"{path}.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    norm = "model.layers.1.input_layernorm.weight"
    assert tensors[norm].dtype == torch.bfloat16
    assert not torch.equal(tensors[norm], before[norm])


def test_the_quantized_model_computes_what_the_source_does(source: Path, quantized: Path) -> None:
    """Read by the backend, it is nearer than round-to-nearest: layout, folds and zeros are all right."""
    tokens = byte_level().encode(TEXT).ids[:100]
    expected = logits_of(load_instance(source), tokens)
    got = logits_of(load_instance(quantized, "awq", dtype=torch.float32), tokens)
    plain = load_instance(source)
    for layer in plain.decoder.layers:
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            linear = getattr(layer, name)
            rounded = round_weight(unpack_weight(linear.weight), None, Grid(4, 32))
            linear.weight = pack_weight(rounded.dequantize())
    assert (got - expected).square().mean() < (logits_of(plain, tokens) - expected).square().mean()


def test_provenance_is_read_back(source: Path, quantized: Path) -> None:
    info = calibration_info(quantized)
    assert info["text"] == "foxes.txt"
    assert info["sha256"] == Text("", TEXT).sha256
    assert int(info["tokens"]) == 512 * int(info["windows"])
    assert calibration_info(source) == {}
    assert json.loads((quantized / "halftone.json").read_text())["source_sha256"] == source_sha256(source)


def test_shards_have_an_index(
    source: Path, quantized: Path, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    quantize_to(source, "awq", tmp_path / "out", calibration, silent, "cpu")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    sharded, whole = Checkpoint(tmp_path / "out"), Checkpoint(quantized)
    assert sorted(sharded.names) == sorted(whole.names)
    assert all(torch.equal(sharded.read(name), whole.read(name)) for name in whole.names)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(
    stop: BaseException, source: Path, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(awq_checkpoint, "write_manifest", fail)  # the last thing that is written
    expected = SystemProblem if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        quantize_to(source, "awq", tmp_path / "out", calibration, silent, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(source: Path, calibration: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemProblem, match="is there already"):
        quantize_to(source, "awq", tmp_path, calibration, silent, "cpu")
    assert (tmp_path / "mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    quantize_to(source, "awq:bits=3", tmp_path / "empty", calibration, silent, "cpu")
    assert read_config(tmp_path / "empty")[1]["bits"] == 3  # type: ignore[index]


def test_no_room_is_told_before_work(
    source: Path, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.disk.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    monkeypatch.setattr(awq_checkpoint, "observe_layers", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SystemProblem, match=r"has 1 MB free; .* needs \d+ MB"):
        quantize_to(source, "awq", tmp_path / "out", calibration, silent, "cpu")


def test_the_size_that_is_asked_for_is_enough(source: Path, quantized: Path) -> None:
    needed = checkpoint_bytes(Checkpoint(source), Grid(4, 32))
    taken = sum(file.stat().st_size for file in quantized.iterdir())
    assert taken < needed < taken + 40_000_000


def test_only_a_sixteen_bit_checkpoint_and_a_calibrated_precision(
    source: Path, quantized: Path, calibration: str, tmp_path: Path
) -> None:
    with pytest.raises(PrecisionError, match="quantized by `awq` already"):
        quantize_to(quantized, "awq", tmp_path / "out", calibration, silent, "cpu")
    with pytest.raises(PrecisionError, match="accepted is `awq`"):
        quantize_to(source, "bf16", tmp_path / "out", calibration, silent, "cpu")


def test_group_sizes(source: Path, tmp_path: Path) -> None:
    config = Checkpoint(source).config
    assert choose_grid(config, 4, 0) == Grid(4, 32)
    with pytest.raises(PrecisionError, match="group size 64 divides"):
        choose_grid(config, 4, 64)
    make_checkpoint(tmp_path, "llama", **{**SHAPE, "intermediate_size": 72})
    with pytest.raises(PrecisionError, match="no group size divides"):
        choose_grid(Checkpoint(tmp_path).config, 4, 0)


def test_activations_that_overflow_are_an_error(source: Path) -> None:
    inputs = {"qkv_proj": InputStatistics(torch.full((64, 64), torch.inf), torch.ones(64))}
    with pytest.raises(CheckpointError, match="activations at `qkv_proj` of layer 1 overflow"):
        quantized_tensors(Checkpoint(source), ObservedLayer(1, {}, inputs), Grid(4, 32))


class TestCache:
    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        made: list[str] = []

        def count(*arguments: object) -> None:
            made.append(str(arguments[1]))
            quantize_checkpoint(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr("service.quantize.quantize_checkpoint", count)
        return made

    @pytest.fixture
    def prepared(self, source: Path, calibration: str, tmp_path: Path) -> Callable[..., Path]:
        def call(precision: str = "awq", model: Path = source, text: str = calibration) -> Path:
            config = EngineConfig(
                model_path=str(model),
                precision=precision,
                device="cpu",
                calibration=text,
                cache_dir=str(tmp_path / "cache"),
            )
            return prepare(model, load_backend(precision), config, silent)

        return call

    def test_made_once(self, counted: list[str], prepared: Callable[..., Path]) -> None:
        first = prepared()
        assert prepared() == first
        assert len(counted) == 1
        assert (first / "halftone.json").is_file()
        assert [path for path in first.parent.iterdir() if path.suffix != ".lock"] == [first]

    def test_a_damaged_folder_is_made_again(self, counted: list[str], prepared: Callable[..., Path]) -> None:
        folder = prepared()
        (folder / "model.safetensors").write_bytes(b"cut")
        assert prepared() == folder
        assert len(counted) == 2
        assert (folder / "model.safetensors").stat().st_size > 3

    def test_every_ingredient_makes_another_folder(
        self, prepared: Callable[..., Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.quantize.make_whole", lambda folder, *_: None)
        folders = {prepared(), prepared("awq:bits=3")}
        other_text = tmp_path / "other.txt"
        other_text.write_text(TEXT + "more")
        folders.add(prepared(text=str(other_text)))
        folders.add(prepared(text=""))
        other_model = tmp_path / "tiny"
        make_checkpoint(other_model, "llama", torch.bfloat16, **{**SHAPE, "num_hidden_layers": 1})
        byte_level().save(str(other_model / "tokenizer.json"))
        folders.add(prepared(model=other_model))
        monkeypatch.setattr("service.quantize.code_version", lambda: "other")
        folders.add(prepared())
        assert len(folders) == 6

    @pytest.mark.parametrize("changed", cache.CODE)
    def test_a_change_of_any_source_is_another_version(
        self, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in cache.CODE:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((cache.PACKAGE / name).read_bytes())
        before = cache.code_version()
        monkeypatch.setattr(cache, "PACKAGE", tmp_path)
        assert cache.code_version() == before
        (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes() + b"#")
        assert cache.code_version() != before

    def test_the_sources_are_all_that_they_import_to_quantize(self) -> None:
        """The packing of codes was left out once."""
        imported = {
            node.module.replace(".", "/") + ".py"
            for name in cache.CODE
            for node in ast.walk(ast.parse((cache.PACKAGE / name).read_bytes()))
            if isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith(("service.quantize.", "service.quality.", "service.kernels."))
        }
        assert imported <= {f"service/{name}" for name in cache.CODE}
        assert "service/quantize/awq.py" in imported

    def test_a_changed_weight_is_seen_though_size_and_name_stay(self, source: Path, tmp_path: Path) -> None:
        model, cache = tmp_path / "model", tmp_path / "cache"
        make_checkpoint(model, "llama", **SHAPE)
        before = source_sha256(model, cache)
        assert source_sha256(model, cache) == before == source_sha256(model)
        weights = model / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert source_sha256(model, cache) != before

    def test_keys_do_not_run_into_each_other(self) -> None:
        assert cache_key("ab", "c", "d", "e") != cache_key("a", "bc", "d", "e")
        assert cache_key("a", "b", "c", "d") == cache_key("a", "b", "c", "d")


def test_quantize_layer_changes_no_tensor_it_was_given() -> None:
    """float32 weights are the caller's own memory: scaling them in place spoiled the source once."""
    torch.manual_seed(0)
    paths = {
        "qkv_proj": ("q", "k", "v"),
        "o_proj": ("o",),
        "gate_up_proj": ("gate", "up"),
        "down_proj": ("down",),
    }
    tensors = {f"{path}.weight": torch.randn(32, 32) for group in paths.values() for path in group}
    tensors |= {f"{norm}.weight": torch.ones(32) for norm in ("input_layernorm", "post_attention_layernorm")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    inputs = {name: InputStatistics.of(torch.randn(64, 32) * 3) for name in paths}
    quantize_layer(tensors, paths, inputs, Grid(4, 32))
    assert all(torch.equal(tensors[name], before[name]) for name in before)
