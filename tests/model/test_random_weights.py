"""config.json alone is enough: names and values as transformers initialises them, in every precision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from service.errors import CheckpointError, HalftoneError, SettingError, SystemProblem
from service.kernels.awq_linear.reference import dequantize, unpack
from service.model import shards
from service.model.checkpoint import Checkpoint
from service.model.config import FAMILIES
from service.model.random_weights import OUTLIER_GAIN, Draw, RandomWeights, save_random
from service.model.verify import verify
from service.precision import TABLE, load_backend
from service.quantize import packing
from tests.tiny_models import SHAPE, load_instance, logits_of, make_checkpoint, one_sequence
from tests.tiny_tokenizers import byte_level

CPU = torch.device("cpu")
TOKENS = list(range(3, 40))
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE, "intermediate_size": 128}


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Progress that nobody watches."""


def folder_of(folder: Path, **changes: Any) -> Path:
    """A folder with config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def weights(folder: Path, seed: int = 0, outliers: int = 0, precision: str = "bf16") -> RandomWeights:
    source = RandomWeights(folder, CPU, Draw(seed, outliers))
    backend = load_backend(precision)
    return source.quantized(packing(source.config, backend)) if backend.quantizer else source


def family_config(model_type: str) -> dict[str, Any]:
    """What transformers would write for this family."""
    sizes = {**SHAPE, "intermediate_size": 128, "head_dim": 16}
    config: dict[str, Any] = CONFIG_MAPPING[model_type](**sizes).to_dict()
    return config | {"architectures": [FAMILIES[model_type].architecture]}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_shapes_and_values_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    model = make_checkpoint(made, model_type, attention_bias=True, head_dim=16)
    fresh = AutoModelForCausalLM.from_config(model.config).state_dict()
    source, written = RandomWeights(made, CPU, Draw()), Checkpoint(made)
    assert sorted(source.names) == sorted(written.names)
    for name in source.names:
        tensor, initial = source.read(name), fresh[name]
        assert tensor.shape == source.info(name).shape == written.info(name).shape
        assert tensor.dtype == source.info(name).dtype == written.info(name).dtype
        assert tensor.isfinite().all()
        if initial.std() > 0:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(tensor.mean())) < 0.002
        else:
            assert torch.equal(tensor, initial)  # norms 1, biases 0


@pytest.mark.parametrize("precision", TABLE)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_runs_in_every_precision(model_type: str, precision: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_config(model_type)))
    source = weights(tmp_path, precision=precision)
    verify(source)
    instance = load_instance(source, precision)
    assert instance.backend.canonical == precision
    logits = logits_of(instance, TOKENS)
    assert logits.isfinite().all()
    assert 0.01 < float(logits.std()) < 1
    assert instance.random_weights["seed"] == "0"


def test_a_tensor_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    one, other = weights(folder), weights(folder)
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    first = one.read(q)
    other.read(k)
    assert torch.equal(first, other.read(q))
    assert torch.equal(first, one.read(q))
    assert not torch.equal(first[: len(one.read(k))], one.read(k))
    assert not torch.equal(first, weights(folder, seed=1).read(q))


def test_config_decides_type_and_deviation(tmp_path: Path) -> None:
    source = weights(folder_of(tmp_path, initializer_range=0.1, dtype="float16", hidden_size=256))
    embedding = source.read("model.embed_tokens.weight")
    assert embedding.dtype == source.dtype == torch.float16
    assert float(embedding.float().std()) == pytest.approx(0.1, rel=0.02)
    assert source.random_weights["standard_deviation"] == "0.1"
    narrow = RandomWeights(source.path, CPU, Draw(standard_deviation=0.05))
    assert float(narrow.read("model.embed_tokens.weight").float().std()) == pytest.approx(0.05, rel=0.02)
    assert narrow.random_weights["standard_deviation"] == "0.05"
    for changes, named in (
        ({"initializer_range": 0}, "initializer_range"),
        ({"initializer_range": True}, "initializer_range"),
        ({"dtype": "int4"}, "dtype"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8, "group_size": 32}}, "in 8 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 48}}, "groups of 48"),
    ):
        with pytest.raises(CheckpointError, match=named) as caught:
            weights(folder_of(tmp_path, **changes))
        assert caught.value.hint
    with pytest.raises(CheckpointError, match=r"config\.json"):
        weights(tmp_path / "nowhere")


def test_draws_are_finite_and_normal_beyond_one_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 16-bit uniform number that rounds to 0 has an infinite logarithm, if it is drawn in 16 bits."""
    folder = folder_of(tmp_path, vocab_size=6000, hidden_size=512)
    drawn = weights(folder).read("model.embed_tokens.weight").float() / 0.02
    assert drawn.isfinite().all()
    assert abs(float(drawn.mean())) < 0.002
    assert float(drawn.std()) == pytest.approx(1, rel=0.002)
    assert float((drawn.abs() > 3).float().mean()) == pytest.approx(0.0027, rel=0.1)
    assert len(drawn.view(-1).unique()) > 1000
    monkeypatch.setattr("service.model.random_weights.CHUNK", 1 << 16)
    cut = weights(folder).read("model.embed_tokens.weight").float() / 0.02
    assert float(cut.std()) == pytest.approx(1, rel=0.002)
    assert not torch.equal(cut[:3000], cut[3000:])


@pytest.mark.parametrize("bits", [4, 3])
def test_awq_is_drawn_packed_with_the_same_deviation(bits: int, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, hidden_size=512, intermediate_size=1024)
    source = weights(folder, precision=f"awq:bits={bits}")
    path = "model.layers.0.mlp.up_proj"
    assert f"{path}.weight" not in source
    packed: list[Tensor] = [source.read(f"{path}.{kind}") for kind in ("qweight", "qzeros", "scales")]
    codes, zeros = unpack(packed[0]), unpack(packed[1])
    assert sorted(codes.unique().tolist()) == list(range(2**bits))
    assert torch.bincount(codes.flatten().long()).float().std() < 0.02 * codes.numel() / 2**bits
    assert zeros.unique().tolist() == [2 ** (bits - 1) - 1, 2 ** (bits - 1)]
    assert 2 < float(packed[2].max() / packed[2].min()) <= 3.01
    weight = dequantize(*packed)
    assert weight.shape == (512, 1024)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.01)
    assert abs(float(weight.mean())) < 0.0002
    assert load_instance(source, f"awq:bits={bits}").kernels()["o_proj"]


def test_a_config_that_is_awq_already_is_drawn_as_awq(tmp_path: Path) -> None:
    quantization = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True}
    source = RandomWeights(folder_of(tmp_path, quantization_config=quantization), CPU, Draw())
    assert source.info("model.layers.2.mlp.up_proj.scales").shape == (1, 128)
    logits_of(load_instance(source, "awq"), TOKENS)


def test_outliers_exceed_the_threshold_where_they_are_planted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    source = weights(folder, outliers=3)
    gains = source.read("model.layers.0.input_layernorm.weight")
    assert sorted(gains.tolist()) == [1.0] * 61 + [OUTLIER_GAIN] * 3
    assert not torch.equal(gains, source.read("model.layers.1.input_layernorm.weight"))
    assert source.read("model.norm.weight").eq(1).all()
    instance = load_instance(source, "fp32")
    seen: dict[str, Tensor] = {}
    kv = instance.new_kv(4)
    instance.forward(one_sequence(TOKENS, 0, kv), kv, lambda path, x: seen.update({path: x}))
    for path, x in seen.items():
        outliers = int((x.abs() >= 6).any(0).sum())
        assert outliers == (0 if "o_proj" in path or "down_proj" in path else 3), path
    ordinary = logits_of(load_instance(weights(folder), "fp32"), TOKENS)
    assert torch.allclose(logits_of(instance, TOKENS), ordinary, atol=1e-5)
    packed = weights(folder, outliers=3, precision="awq")
    assert packed.read("model.layers.0.input_layernorm.weight").eq(1).all()
    assert packed.random_weights["outliers"] == "0"
    with pytest.raises(SettingError, match="random_outliers"):
        weights(folder, outliers=65)


class TestSave:
    @pytest.mark.parametrize("precision", ["bf16", "nf4", "awq"])
    def test_what_is_saved_is_what_was_served(self, precision: str, tmp_path: Path) -> None:
        source = weights(folder_of(tmp_path / "shape", vocab_size=424), 3, 2, precision)
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        byte_level().save(str(tokenizer / "tokenizer.json"))
        saved = tmp_path / "saved"
        save_random(source, tokenizer, saved, silent)
        checkpoint = Checkpoint(saved)
        verify(checkpoint)
        assert checkpoint.random_weights == source.random_weights
        assert (saved / "tokenizer.json").is_file()
        assert torch.equal(
            logits_of(load_instance(source, precision), TOKENS),
            logits_of(load_instance(saved, precision), TOKENS),
        )
        size = (saved / "model.safetensors").stat().st_size
        assert source.num_bytes < size < source.num_bytes + 20_000

    def test_transformers_reads_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
        source = weights(folder_of(tmp_path / "shape", dtype="float32", tie_word_embeddings=True))
        save_random(source, source.path, tmp_path / "saved", silent)
        files = list((tmp_path / "saved").glob("*.safetensors"))
        assert len(files) > 3
        assert all(file.stat().st_size < 110_000 for file in files)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        with torch.no_grad():
            expected = model(torch.tensor([TOKENS])).logits[0]
        got = logits_of(load_instance(source, "fp32"), TOKENS)
        assert torch.allclose(got, expected, atol=1e-5)

    def test_the_same_stays_and_others_are_refused(self, tmp_path: Path) -> None:
        source, saved = weights(folder_of(tmp_path / "shape")), tmp_path / "saved"
        save_random(source, source.path, saved, silent)
        before = (saved / "model.safetensors").stat().st_mtime_ns
        save_random(source, source.path, saved, silent)
        assert (saved / "model.safetensors").stat().st_mtime_ns == before
        for other in (weights(source.path, seed=1), weights(source.path, precision="awq")):
            with pytest.raises(SystemProblem, match="holds something else"):
                save_random(other, source.path, saved, silent)

    def test_an_interrupted_save_leaves_nothing(self, tmp_path: Path) -> None:
        source = weights(folder_of(tmp_path / "shape"))

        def stop(stage: str, done: int, total: int, unit: str) -> None:
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save_random(source, source.path, tmp_path / "saved", stop)
        assert [path.name for path in tmp_path.iterdir()] == ["shape"]

    def test_a_disk_without_room_is_told_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = weights(folder_of(tmp_path / "shape"))
        monkeypatch.setattr(RandomWeights, "num_bytes", 1 << 60)
        with pytest.raises(HalftoneError, match="needs"):
            save_random(source, source.path, tmp_path / "saved", silent)
