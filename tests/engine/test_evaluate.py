"""Figures of quality against independent sums, on a tiny random Llama."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import load_instance, logits_of, make_checkpoint, one_sequence
from torch import Tensor

from service.engine.evaluate import Evaluation, decode_spans
from service.engine.startup import Serving, start
from service.messages import EngineConfig, Evaluate, Evaluated, Sampling, Submit

WINDOWS = [[(7 * i + 3 * w) % 128 for i in range(20 + 5 * w)] for w in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(path, "llama", torch.bfloat16)
    return path


Serve = Callable[..., tuple[Serving, EngineConfig]]


@pytest.fixture(scope="module")
def serve(folder: Path) -> Serve:
    def serve(**settings: object) -> tuple[Serving, EngineConfig]:
        config = EngineConfig(
            **{"model_path": str(folder), "precision": "fp32", "device": "cpu", "kv_tokens": 1024} | settings
        )
        return start(config, lambda _: None, 0.0), config

    return serve


def evaluate(serving: Serving, config: EngineConfig, message: Evaluate) -> Evaluated:
    sent: list[Evaluated] = []
    Evaluation(message, serving, config, sent.append).run()
    assert all(progress.done < progress.total for progress in sent[:-1])
    assert sent[-1].done == sent[-1].total
    serving.engine.check()
    assert serving.engine.cache.num_held == 0
    return sent[-1]


def nll_of(folder: Path, windows: list[list[int]]) -> float:
    instance = load_instance(folder)
    return sum(
        -logits_of(instance, window)[:-1].double().log_softmax(-1)[range(len(window) - 1), window[1:]].sum()
        for window in windows
    )


def test_all_modes_score_the_same_positions_alike(serve: Serve, folder: Path) -> None:
    """When the counts are equal, the positions are; fp32 then differs by rounding alone."""
    serving, config = serve()
    got = evaluate(serving, config, Evaluate(1, WINDOWS, ["prefill", "decode1", "decode8"], 10_000))
    num_tokens = sum(len(window) - 1 for window in WINDOWS)
    assert got.error == ""
    assert got.tokens == {"prefill": num_tokens, "decode1": num_tokens, "decode8": num_tokens}
    wanted = float(nll_of(folder, WINDOWS))
    assert got.nll == pytest.approx({mode: wanted for mode in got.nll}, rel=1e-5)


def test_decode_scores_beginnings_of_windows(serve: Serve, folder: Path) -> None:
    serving, config = serve()
    got = evaluate(serving, config, Evaluate(1, WINDOWS, ["decode1", "decode8"], 80))
    assert got.tokens == {"decode1": 80, "decode8": 80}
    wanted = float(nll_of(folder, [window[:11] for window in WINDOWS[:8]]))
    assert got.nll == pytest.approx({mode: wanted for mode in got.nll}, rel=1e-5)


def nats_of(logits: Tensor, targets: list[int]) -> list[float]:
    log_probabilities = logits.double().log_softmax(-1)
    return [-float(row[target]) for row, target in zip(log_probabilities, targets, strict=True)]


def test_pairs_are_the_positions_that_both_scored(serve: Serve, folder: Path) -> None:
    """Decode scores ten tokens of eight windows, prefill more of ten; they round differently."""
    serving, config = serve()
    got = evaluate(serving, config, Evaluate(1, WINDOWS, ["prefill", "decode1", "decode8"], 80))
    instance = load_instance(folder)
    differences = []
    for window in WINDOWS[:8]:
        prefill = nats_of(logits_of(instance, window)[:10], window[1:11])
        kv = instance.new_kv(3)
        steps = [instance.forward(one_sequence(window[: n + 1], n, kv), kv) for n in range(10)]
        decode = nats_of(torch.cat(steps), window[1:11])
        differences.append([one - other for one, other in zip(decode, prefill, strict=True)])
    assert got.paired.keys() == {"decode1", "decode8"}
    assert got.paired["decode1"].tokens == got.paired["decode8"].tokens == 80
    assert got.paired["decode1"].mean == pytest.approx(np.mean(differences), rel=1e-6)
    assert got.paired["decode1"].standard_error == pytest.approx(
        np.std(np.mean(differences, 1), ddof=1) / 8**0.5
    )
    assert got.paired["decode1"].standard_error > 0


def test_decode_without_prefill_has_no_pairs(serve: Serve) -> None:
    serving, config = serve()
    assert evaluate(serving, config, Evaluate(1, WINDOWS, ["decode8"], 80)).paired == {}


def test_kl_is_exact_and_against_the_reference(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference || served, in this order; slices of seven rows change nothing."""
    monkeypatch.setattr("service.engine.evaluate.LOGIT_ROWS", 7)
    serving, config = serve(precision="bf16")
    got = evaluate(serving, config, Evaluate(1, WINDOWS, ["prefill"], reference="fp32"))
    reference, served = load_instance(folder, "fp32"), load_instance(folder, "bf16")
    kl = agreeing = count = 0.0
    for window in WINDOWS:
        p = logits_of(reference, window)[:-1].double().log_softmax(-1)
        q = logits_of(served, window)[:-1].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agreeing += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    assert got.kl_tokens == got.tokens["prefill"] == count
    assert got.kl_mean == pytest.approx(kl / count, rel=1e-4)
    assert got.kl_mean > 0
    assert got.top1_agreement == pytest.approx(agreeing / count)


def test_the_same_precision_has_no_divergence(serve: Serve) -> None:
    serving, config = serve()
    got = evaluate(serving, config, Evaluate(1, WINDOWS[:2], [], reference="fp32"))
    assert (got.kl_mean, got.top1_agreement, got.nll) == (0.0, 1.0, {})


def test_requests_find_the_cache_as_they_left_it(serve: Serve) -> None:
    """Blocks kept for reuse are lent out only after they were made unfindable."""
    serving, config = serve(kv_tokens=64)
    prompt = WINDOWS[5][:33]

    def answer(request_id: int) -> list[int]:
        serving.engine.add(Submit(request_id, prompt, Sampling(6, temperature=0, ignore_eos=True)))
        tokens: list[int] = []
        while serving.engine.has_work:
            tokens += [token for output in serving.engine.step().outputs for token in output.token_ids]
        return tokens

    before = answer(1)
    evaluate(serving, config, Evaluate(1, WINDOWS[:2], ["prefill", "decode8"], 30))
    assert answer(2) == before


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Evaluate(1, [], ["prefill"]), "two tokens"),
        (Evaluate(1, [[1]], ["prefill"]), "two tokens"),
        (Evaluate(1, [[1, 128]], ["prefill"]), "token id"),
        (Evaluate(1, [[1] * 70], ["prefill"]), "context window 64"),
        (Evaluate(1, [[1] * 60] * 8, ["decode8"]), "KV cache"),
        (Evaluate(1, [[1, 2]], [], reference="fp9"), "fp9"),
    ],
    ids=["none", "short", "vocabulary", "long", "wide", "reference"],
)
def test_what_cannot_be_evaluated_is_told(serve: Serve, message: Evaluate, error: str) -> None:
    serving, config = serve(kv_tokens=64)
    assert error in evaluate(serving, config, message).error


def test_spans_are_shared_out_evenly() -> None:
    assert decode_spans([513] * 16, 2048) == [256] * 8 + [0] * 8
    assert decode_spans([100] * 16, 1000) == [99] * 8 + [26] * 8
    assert decode_spans([3, 50, 50], 60) == [2, 29, 29]
    assert decode_spans([3], 60) == [2]
