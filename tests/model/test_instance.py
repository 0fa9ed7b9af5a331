"""The ledger counts every weight once, and the 8-bit head is an option that changes the head only."""

from pathlib import Path

import pytest
import torch

from service.kernels.paged_attention import attention_kernel
from service.model.checkpoint import Checkpoint
from service.model.instance import ModelInstance
from tests.tiny_models import load_instance, logits_of, make_checkpoint


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    # sizes that oneDNN's blocks divide, so packed weights take no extra bytes
    make_checkpoint(
        folder,
        "qwen3",
        torch.bfloat16,
        hidden_size=128,
        intermediate_size=192,
        head_dim=32,
        tie_word_embeddings=request.param,
    )
    return folder


@pytest.mark.parametrize(("precision", "width"), [("bf16", 2), ("fp32", 4)])
def test_weight_bytes_are_the_parameters(folder: Path, precision: str, width: int) -> None:
    instance = load_instance(folder, precision)
    logits_of(instance, [1, 2, 3])
    assert instance.weight_bytes == width * Checkpoint(folder).num_parameters
    ledger = instance.memory_bytes()
    assert instance.weight_bytes == sum(size for part, size in ledger.items() if part.startswith("weights."))
    assert ("weights.head" in ledger) is not instance.config.tied_head
    assert ledger["weights.embedding"] == width * 128 * 128


def test_int8_head(folder: Path) -> None:
    """Logits move by rounding only: half a step of each row's scale at most, summed over the inputs."""
    plain, eight = load_instance(folder, "bf16"), load_instance(folder, "bf16", head="int8")
    tokens = list(range(3, 40))
    expected, got = logits_of(plain, tokens), logits_of(eight, tokens)
    assert not torch.equal(expected, got)
    assert (expected - got).norm() / expected.norm() < 0.01
    assert eight.memory_bytes()["weights.head"] == 128 * (128 + 2)
    assert eight.kernels()["lm_head"] != plain.kernels()["lm_head"]


def test_kernels_name_every_layer_class(folder: Path) -> None:
    kernels = load_instance(folder).kernels()
    layers, rest = (
        {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"},
        {"add_rms_norm", "gated_silu"},
    )
    assert set(kernels) == layers | rest | {"attention", "rotary_kv"}
    assert all(kernels.values())
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        instance = load_instance(folder, precision)
        expected = attention_kernel(dtype, torch.device("cpu"), instance.config.head_dim, 2)
        assert instance.kernels()["attention"] == expected


def test_progress_ends_at_its_total(folder: Path) -> None:
    reports: list[tuple[str, int, int, str]] = []
    load_instance(folder, progress=lambda *report: reports.append(report))
    assert [stage for stage, *_ in reports] == sorted((stage for stage, *_ in reports), reverse=True)
    last = {stage: (done, total) for stage, done, total, _ in reports}
    assert last.keys() == {"verify", "load"}
    assert all(done == total > 0 for done, total in last.values())
    loaded = [(done, total, unit) for stage, done, total, unit in reports if stage == "load"]
    assert loaded == sorted(loaded)
    assert len(loaded) > 20
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert {unit for *_, unit in loaded} == {"bytes"}
    assert size - 8192 < loaded[-2][0] <= loaded[-2][1] < size  # but for the file's header


def test_kv_block_bytes(folder: Path) -> None:
    instance: ModelInstance = load_instance(folder, "bf16")
    assert instance.kv_block_bytes == 2 * 3 * 2 * 16 * 32 * 2
    assert instance.new_kv(5).bytes == 5 * instance.kv_block_bytes
