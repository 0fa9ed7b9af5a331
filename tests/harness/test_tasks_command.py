"""`halftone eval --tasks` over a real engine: two ways, the same digits, and what is said where they part."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import load_instance, logits_of, make_checkpoint
from tiny_tokenizers import write_checkpoint
from tokenizers import Tokenizer

from service.cli.tasks import evaluate_tasks
from service.config import Settings, load_settings
from service.errors import HalftoneError, SettingError
from service.harness import scorer
from service.harness.run import Scores, TaskRun, disagreements, in_process, require_harness, run_one
from service.messages import TokenLogprobs

INSTALLED = Path(__file__).with_name("installed")


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, even where the real one is installed."""
    monkeypatch.syspath_prepend(INSTALLED)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(path, "byte_level")
    make_checkpoint(path, "llama", torch.bfloat16, vocab_size=512, max_position_embeddings=256)
    return path


def settings_of(folder: Path, **more: Any) -> Settings:
    return load_settings(model=str(folder), device="cpu", kv_tokens=512, **{"precision": "fp32"} | more)


@pytest.mark.parametrize("more", [{"precision": "fp8"}, {"deterministic": True}], ids=["alone", "in_company"])
def test_both_ways_agree_to_the_digit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    out = tmp_path / "scores.json"
    evaluate_tasks(settings_of(folder, **more), TaskRun(tasks=["choose", "say"]), "both", out)
    found = json.loads(out.read_bytes())
    assert found["agree"] is True
    assert found["results"]["engine"] == found["results"]["http"]
    assert found["results"]["http"]["choose"] == {"acc,none": 1.0, "acc_stderr,none": 0.5}
    assert found["num_documents"] == {"choose": 4, "say": 4}
    assert (found["lm_eval"], found["document_hashes"]["say"]) == ("0.4.99", "abc")
    printed = capsys.readouterr().out
    assert "over HTTP" in printed
    assert "to the last digit" in printed


def test_scores_are_the_model_s(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside logits of the same weights; and one prompt's token too few would shift them all."""
    seen: list[Any] = []
    monkeypatch.setattr("service.cli.tasks.table_of", lambda info, scores: seen.append(scores) or "")
    evaluate_tasks(settings_of(folder), TaskRun(tasks=["choose"], limit=2), "http", None)
    [[score, is_greedy]] = [answer[0] for answer in seen[0]["http"].responses["choose"][0][:1]]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    context = "the quick brown fox jumps over the"
    first = len(tokenizer.encode(context).ids)
    ids = tokenizer.encode(context + " lazy dog").ids
    rows = logits_of(load_instance(folder), ids)[first - 1 : -1].double().log_softmax(-1)
    assert score == pytest.approx(float(rows.gather(1, torch.tensor(ids[first:])[:, None]).sum()), rel=1e-5)
    assert is_greedy == (rows.argmax(-1).tolist() == ids[first:])


def test_ways_that_differ_in_the_last_digit_fail(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = scorer.summed
    monkeypatch.setattr(scorer, "summed", lambda *asked: (right(*asked)[0] * (1 + 2**-52), right(*asked)[1]))
    out = tmp_path / "scores.json"
    with pytest.raises(HalftoneError, match="different answers: choose: 2 of 2 documents, first number 0"):
        evaluate_tasks(settings_of(folder), TaskRun(tasks=["choose"], limit=2), "both", out)
    assert json.loads(out.read_bytes())["agree"] is False


def test_the_harness_s_errors_are_told(folder: Path) -> None:
    base = importlib.import_module("lm_eval.models.openai_completions").LocalCompletionsAPI
    unasked: Any = None
    model = in_process(base, unasked)(
        model="m", base_url="", tokenizer=str(folder), max_length=9, batch_size=1, seed=1
    )
    with pytest.raises(
        HalftoneError, match=r"harness failed: ValueError: no such task: \{'other'\}"
    ) as error:
        run_one(model, TaskRun(tasks=["other"]))
    assert "--task-path" in error.value.hint
    with pytest.raises(HalftoneError, match=r"generates with \['top_k'\]"):
        run_one(model, TaskRun(tasks=["warm"]))


def test_what_is_wrong_is_told_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(model="/nowhere")
    with pytest.raises(SettingError, match="is no folder"):
        evaluate_tasks(settings, TaskRun(tasks=["say"], include="/nowhere/tasks"), "both", None)
    monkeypatch.setattr("service.harness.run.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="not installed") as error:
        require_harness()
    assert ".[tasks]" in error.value.hint


def test_an_infinite_logprob_is_what_json_can_say() -> None:
    none_likely = TokenLogprobs(6, float("-inf"), 9, [1], [-0.5])
    rows = [None, none_likely, TokenLogprobs(7, -1, 1, [7], [-1])]
    answer: Any = SimpleNamespace(prompt=[5, 6, 7], prompt_logprobs=rows)
    assert scorer.summed(answer, 1) == (-10000.0, False)
    assert scorer.summed(answer, 2) == (-1, True)


def test_disagreements_name_the_document() -> None:
    def scores(*responses: Any, acc: float = 1.0) -> Scores:
        return Scores(
            results={"t": {"acc": acc}},
            versions={},
            num_fewshot={},
            num_documents={},
            document_hashes={},
            responses={"t": list(responses)},
        )

    assert disagreements(scores(1, 2), scores(1, 2)) == []
    assert disagreements(scores(1, 2), scores(1, 3)) == ["t: 1 of 2 documents, first number 1: 2 and 3"]
    assert disagreements(scores(1, 2), scores(1)) == ["t: 2 documents and 1"]
    assert disagreements(scores(1), scores(1, acc=0.5)) == ["the same responses gave other metrics"]
