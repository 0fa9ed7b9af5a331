"""Figures of quality against independent sums, on a tiny random Llama."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import greedy, load_instance, logits_of, make_checkpoint, one_sequence
from torch import Tensor

from service.engine.evaluate import Evaluation, decode_spans
from service.engine.runner import Runner
from service.engine.startup import Serving, start
from service.engine.state import LENGTH
from service.messages import EngineConfig, Evaluate, Evaluated, GreedyAgreement, Sampling, Submit
from service.model.instance import GROUPS

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


def nll_of(folder: Path, windows: list[list[int]], precision: str = "fp32") -> float:
    instance = load_instance(folder, precision)
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


class FakeGraphs:
    """Stands for the runner's: sizes by four, beyond the lanes padding, computed kernel by kernel."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.asked_for: list[int] = []

    def forward(self, count: int) -> SimpleNamespace:
        self.asked_for.append(count)
        size = -(-count // 4) * 4
        return SimpleNamespace(num_rows=size, replay=lambda: self.replay(size))

    def replay(self, size: int) -> Tensor:
        state = self.runner.state
        lengths = state.fields[state.rows[:size].long(), LENGTH] + 1
        return self.runner.decode_step.logits(size, lengths.tolist())


def test_forced_decode_takes_the_graphs_that_serve(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the shorter windows have ended and leave their lanes to padding."""
    serving, config = serve(max_batch_requests=12)
    asked = Evaluate(1, WINDOWS, ["decode1", "decode8"], 200)
    plain = evaluate(serving, config, asked)
    graphs = FakeGraphs(serving.engine.runner)
    monkeypatch.setattr(serving.engine.runner, "graphs", graphs)
    got = evaluate(serving, config, asked)
    assert len(graphs.asked_for) > 200
    assert {1, 7, 8} <= set(graphs.asked_for)
    assert got.nll == pytest.approx(plain.nll, rel=1e-6)
    assert got.tokens == plain.tokens


def test_an_engine_of_fewer_rows_forces_as_many_lanes(serve: Serve) -> None:
    asked = Evaluate(1, WINDOWS, ["decode8"], 80)
    narrow = evaluate(*serve(max_batch_requests=3), asked)
    assert narrow.nll == pytest.approx(evaluate(*serve(), asked).nll, rel=1e-6)


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
    # residuals of one window, and those of one target, count as moving together
    residuals = np.ravel(differences) - np.mean(differences)
    window, target = np.repeat(np.arange(8), 10), np.ravel([window[1:11] for window in WINDOWS[:8]])

    def variance(*names: np.ndarray) -> float:
        together = np.all([name[:, None] == name for name in names], axis=0)
        count = len(np.unique(np.stack(names), axis=1).T)
        return float(residuals @ together @ residuals) * count / (count - 1) / 80**2

    apart = variance(window), variance(target)
    wanted = max(*apart, sum(apart) - variance(window, target)) ** 0.5
    assert got.paired["decode1"].standard_error == pytest.approx(wanted, rel=1e-3)
    assert got.paired["decode1"].windows == 8
    assert wanted > 0


def test_decode_without_prefill_has_no_pairs(serve: Serve) -> None:
    serving, config = serve()
    assert evaluate(serving, config, Evaluate(1, WINDOWS, ["decode8"], 80)).paired == {}


def test_kl_is_exact_and_against_the_reference(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference || served, in this order; slices of seven rows change nothing."""
    monkeypatch.setattr("service.engine.streamed.LOGIT_ROWS", 7)
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
    wanted = nll_of(folder, WINDOWS, "fp32")
    assert got.windows is not None
    assert got.against_reference is not None
    assert sum(got.windows.reference_nll) == pytest.approx(float(wanted), rel=1e-5)
    apart = (got.nll["prefill"] - sum(got.windows.reference_nll)) / count
    assert got.against_reference.mean == pytest.approx(apart)


def test_windows_carry_what_intervals_are_made_of(serve: Serve) -> None:
    """Windows of one size: the error of a mean is that of the windows' means."""
    windows = [[(11 * i + 7 * w) % 128 for i in range(33)] for w in range(6)]
    serving, config = serve(precision="bf16")
    got = evaluate(serving, config, Evaluate(1, windows, ["prefill"], reference="fp32"))
    scores = got.windows
    assert scores is not None
    assert scores.tokens == [32] * 6
    assert sum(scores.nll) == pytest.approx(got.nll["prefill"])
    assert sum(scores.agreeing) == pytest.approx(got.top1_agreement * 192)
    errors = {
        "nll_standard_error": scores.nll,
        "kl_standard_error": scores.kl,
        "top1_standard_error": scores.agreeing,
    }
    for name, sums in errors.items():
        wanted = np.std(np.array(sums) / 32, ddof=1) / 6**0.5
        assert getattr(got, name) == pytest.approx(wanted, rel=1e-6)
    apart = (np.array(scores.nll) - np.array(scores.reference_nll)) / 32
    assert got.against_reference is not None
    assert got.against_reference.standard_error == pytest.approx(np.std(apart, ddof=1) / 6**0.5, rel=1e-6)


@pytest.mark.parametrize("modes", [["prefill"], ["prefill", "decode8"]])
def test_what_is_before_the_first_scored_token_is_context(
    serve: Serve, folder: Path, modes: list[Literal["prefill", "decode8"]]
) -> None:
    """The second half of each window, as llama.cpp scores them; decode goes on scoring beginnings."""
    serving, config = serve()
    halves = [len(window) // 2 for window in WINDOWS]
    asked = Evaluate(1, WINDOWS, [*modes], 80, reference="bf16", scored_from=halves)
    got = evaluate(serving, config, asked)
    nats = [nats_of(logits_of(load_instance(folder), window)[:-1], window[1:]) for window in WINDOWS]
    wanted = [sum(values[half - 1 :]) for values, half in zip(nats, halves, strict=True)]
    assert got.windows is not None
    assert got.windows.nll == pytest.approx(wanted, rel=1e-5)
    scored = [len(window) - half for window, half in zip(WINDOWS, halves, strict=True)]
    assert got.windows.tokens == scored
    assert got.tokens["prefill"] == got.kl_tokens == sum(scored)
    if "decode8" in modes:
        assert got.tokens["decode8"] == got.paired["decode8"].tokens == 80
        assert abs(got.paired["decode8"].mean) < 1e-5


def test_a_reference_in_another_folder(serve: Serve, folder: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "other", "llama", torch.bfloat16, num_hidden_layers=1)
    make_checkpoint(tmp_path / "wide", "llama", torch.bfloat16, vocab_size=160)
    serving, config = serve()

    def against(path: Path) -> Evaluated:
        asked = Evaluate(1, WINDOWS[:2], ["prefill"], reference="fp32", reference_path=str(path))
        return evaluate(serving, config, asked)

    assert against(folder).kl_mean == 0
    assert against(tmp_path / "other").kl_mean > 0.1
    assert "160 tokens" in against(tmp_path / "wide").error


def test_greedy_answers_part_where_two_models_part(serve: Serve, folder: Path, tmp_path: Path) -> None:
    """As answering with both and comparing would find, in one pass of the reference. Both compute in fp32,
    so that no rounding of batches can turn a token."""
    other = make_checkpoint(tmp_path, "llama", torch.bfloat16)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path)
    prompts = [window[: 5 + 3 * n] for n, window in enumerate(WINDOWS)]
    serving, config = serve()
    asked = Evaluate(1, [], [], 0, "fp32", str(tmp_path), prompts=prompts, greedy_tokens=12)
    got = evaluate(serving, config, asked).greedy
    generated, agreed = [], []
    for prompt in prompts:
        ours, theirs = (greedy(load_instance(path), prompt, 12) for path in (folder, tmp_path))
        ours = ours[: ours.index(2) + 1] if 2 in ours else ours  # an answer ends with the stop token
        parting = (n for n, token in enumerate(ours) if token != theirs[n])
        generated.append(len(ours))
        agreed.append(next(parting, len(ours)))
    assert got == GreedyAgreement(generated, agreed)
    assert len(set(agreed)) > 2


def test_a_model_agrees_with_itself(serve: Serve) -> None:
    serving, config = serve()
    asked = Evaluate(1, WINDOWS[:2], ["prefill"], reference="fp32", prompts=WINDOWS[2:5], greedy_tokens=9)
    got = evaluate(serving, config, asked)
    assert got.greedy is not None
    assert got.greedy.agreed == got.greedy.generated
    assert got.kl_mean == 0


def test_kl_equals_a_brute_force_computation_with_transformers(tmp_path: Path) -> None:
    """Both models as transformers', the served one with the weights that NF4's codes mean."""
    reference = make_checkpoint(tmp_path, "llama", intermediate_size=128)
    config = EngineConfig(
        model_path=str(tmp_path), precision="nf4", device="cpu", dtype="fp32", kv_tokens=1024
    )
    serving = start(config, lambda _: None, 0.0)
    got = evaluate(serving, config, Evaluate(1, WINDOWS, ["prefill"], reference="fp32"))
    served = make_checkpoint(tmp_path / "again", "llama", intermediate_size=128)
    parameters = dict(served.named_parameters())
    with torch.no_grad():
        for layer in serving.model.layers():
            for name in GROUPS:
                linear = getattr(layer, name)
                for part, spec in enumerate(linear.group.parts):
                    parameters[f"{spec.path}.weight"].copy_(linear.dense(part))
    divergences, agreeing = [], 0
    for window in WINDOWS:
        with torch.no_grad():
            both = [model(torch.tensor([window])).logits[0, :-1].numpy() for model in (reference, served)]
        p, q = ([softmax(row) for row in logits.astype(np.float64)] for logits in both)
        divergences += [float((a * np.log(a / b)).sum()) for a, b in zip(p, q, strict=True)]
        agreeing += sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True))
    assert got.error == ""
    assert got.kl_mean == pytest.approx(np.mean(divergences), abs=1e-5)
    assert got.kl_mean > 0.05
    assert got.top1_agreement == pytest.approx(agreeing / len(divergences))
    assert got.kl_quantiles["max"] == pytest.approx(max(divergences), abs=1e-4)
    assert got.kl_quantiles["p50"] == pytest.approx(np.median(divergences), abs=0.05)


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


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
        (Evaluate(1, [[1, 2]], ["prefill"], scored_from=[2]), "scored_from"),
        (Evaluate(1, [[1, 2]], ["prefill"], scored_from=[1, 1]), "scored_from"),
        (Evaluate(1, [], [], prompts=[[1, 2]]), "none was named"),
        (Evaluate(1, [], [], reference="fp32", prompts=[[]]), "one token or more"),
        (Evaluate(1, [], [], reference="fp32", prompts=[[1] * 8], greedy_tokens=57), "65 tokens"),
        (Evaluate(1, [], [], reference="fp32", prompts=[[1, 128]], greedy_tokens=8), "token id"),
    ],
    ids=[
        *("none", "short", "vocabulary", "long", "wide", "reference", "from_beyond", "from_of_others"),
        *("greedy_alone", "empty_prompt", "long_prompt", "prompt_vocabulary"),
    ],
)
def test_what_cannot_be_evaluated_is_told(serve: Serve, message: Evaluate, error: str) -> None:
    serving, config = serve(kv_tokens=64)
    assert error in evaluate(serving, config, message).error


def test_spans_are_shared_out_evenly() -> None:
    assert decode_spans([513] * 16, 2048) == [256] * 8 + [0] * 8
    assert decode_spans([100] * 16, 1000) == [99] * 8 + [26] * 8
    assert decode_spans([3, 50, 50], 60) == [2, 29, 29]
    assert decode_spans([3], 60) == [2]
