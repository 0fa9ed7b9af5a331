"""`halftone eval` over a real engine: what it prints, writes and refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import load_instance, logits_of, make_checkpoint
from tiny_tokenizers import write_checkpoint
from tokenizers import Tokenizer

from service.cli.evaluate import Asked, evaluate
from service.config import load_settings
from service.errors import SettingError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(path, "byte_level")
    make_checkpoint(path, "llama", torch.bfloat16, vocab_size=512, max_position_embeddings=1024)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(f"the fox number {n * n} jumps over {n} dogs" for n in range(400)))
    return path


def test_figures_are_stamped_and_written(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello world"}\n{"prompt": "stop here"}\n{"prompt": [5, 6, 7]}\n')
    settings = load_settings(model=str(folder), precision="fp8", device="cpu", kv_tokens=2048)
    asked = Asked(
        "fp32", str(text), "halftone,llama.cpp-512", 3, 65, 128, prompts=str(prompts), greedy_tokens=5
    )
    evaluate(settings, asked, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found["text"]["text"] == "prose.txt"
    assert len(found["text"]["sha256"]) == len(found["tokenizer_sha256"]) == 64
    ours, theirs = found["perplexities"]
    assert [ours["protocol"], theirs["protocol"]] == ["halftone", "llama.cpp-512"]
    assert [ours["scored_tokens"], theirs["scored_tokens"]] == [3 * 64, 3 * 255]
    assert "evenly spaced" in ours["words"]
    assert ours["divergence"]["kl_nats_per_token"] > 0
    assert ours["divergence"]["kl_standard_error"] > 0
    ratio = ours["perplexity"] / ours["divergence"]["reference_perplexity"] - 1
    assert ours["divergence"]["change"] == pytest.approx(ratio)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text()).ids
    model, nats = load_instance(folder, "fp32"), 0.0
    for start in range(0, 3 * 512, 512):
        window = ids[start : start + 512]
        logits = logits_of(model, window)[256:-1].double().log_softmax(-1)
        nats -= float(logits.gather(1, torch.tensor(window[257:])[:, None]).sum())
    assert theirs["divergence"]["reference_perplexity"] == pytest.approx(math.exp(nats / 3 / 255), rel=1e-5)
    assert found["decode"].keys() == {"decode1", "decode8"}
    assert found["decode"]["decode1"]["tokens"] == 128
    assert abs(found["decode"]["decode8"]["change"]) < 0.02
    assert len(found["greedy"]["agreed"]) == 3
    printed = capsys.readouterr().out
    for words in ("llama.cpp-512", "beside fp32", "Teacher-forced decode", "answers that part"):
        assert words in printed


def test_without_a_reference_it_is_perplexity_alone(folder: Path, text: Path, tmp_path: Path) -> None:
    settings = load_settings(model=str(folder), precision="fp32", device="cpu", kv_tokens=1024)
    evaluate(settings, Asked(text=str(text), window_tokens=33, decode_tokens=0), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_bytes())
    [one] = found["perplexities"]
    assert (one["divergence"], found["greedy"], found["decode"]) == (None, None, {})
    assert one["num_windows"] == 8


def test_a_reference_of_another_checkpoint(folder: Path, text: Path, tmp_path: Path) -> None:
    """What a quantized checkpoint was made from; here one with other weights."""
    write_checkpoint(tmp_path / "other", "byte_level")
    make_checkpoint(tmp_path / "other", "llama", torch.bfloat16, vocab_size=512, num_hidden_layers=1)
    settings = load_settings(model=str(folder), precision="fp32", device="cpu", kv_tokens=1024)
    asked = Asked(
        reference="fp32",
        reference_model=str(tmp_path / "other"),
        text=str(text),
        window_tokens=33,
        decode_tokens=0,
        greedy_tokens=0,
    )
    evaluate(settings, asked, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found["perplexities"][0]["divergence"]["kl_nats_per_token"] > 0.1
    with pytest.raises(SettingError, match="of no use without `--reference`"):
        evaluate(settings, replace(asked, reference=""), None)
    write_checkpoint(tmp_path / "other", "sentencepiece")
    make_checkpoint(tmp_path / "other", "llama", torch.bfloat16, vocab_size=512, num_hidden_layers=1)
    with pytest.raises(SettingError, match="another tokenizer"):
        evaluate(settings, asked, None)


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    settings = load_settings(model="/nowhere")
    with pytest.raises(SettingError, match="of no use without greedy answers"):
        evaluate(settings, Asked(prompts="mine.jsonl"), None)
    with pytest.raises(SettingError, match="cannot be read"):
        evaluate(settings, Asked("bf16", prompts="/nowhere/mine.jsonl"), None)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(SettingError, match="line 1"):
        evaluate(settings, Asked("bf16", prompts=str(tmp_path / "bad.jsonl")), None)
    with pytest.raises(SettingError, match="protocol `ptb` does not exist"):
        evaluate(settings, Asked(protocols="ptb"), None)
