"""What a report is made of: its schema, what follows from its figures, and where it was made."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import msgspec
import pytest

from service import cores
from service.compare.environment import environment
from service.compare.quality import agreement_of
from service.compare.report import Apart, Report, schema, shipped_schema
from service.compare.words import supports
from service.errors import HalftoneError
from service.messages import Evaluated, Paired
from tests.compare.made_up import MODES, failed, made_up, too_large

KINDS = {
    "all measured": made_up(),
    "one run": made_up(repeats=1, null=None),
    "one mode": made_up(MODES[:1], verdict=None),
    "failures": made_up(rows=[failed("bf16", "no kernel"), too_large("fp32")], complete=False, verdict=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reports_keep_the_shipped_schema(kind: str) -> None:
    assert shipped_schema() == schema(), "write it anew: python -m service.compare.report"
    jsonschema.Draft202012Validator.check_schema(shipped_schema())
    good = msgspec.to_builtins(KINDS[kind])
    jsonschema.validate(good, shipped_schema())
    assert msgspec.convert(good, Report) == KINDS[kind]
    for broken in ({**good, "rows": [{"name": "x"}]}, {**good, "complete": "yes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, shipped_schema())


@pytest.mark.parametrize(
    ("change", "standard_error", "num_windows", "flagged"),
    [
        (0.003, 0.001, 8, True),
        (-0.003, 0.001, 8, True),
        (-0.003, 0.002, 8, False),
        (0.0015, 0.0001, 8, False),
        (0.003, 0.001, 3, False),  # of three windows the error itself is badly known
        (0.003, 0.0014, 0, True),  # an earlier report: its page flags what it flagged
        (0.003, 0.0016, 0, False),
    ],
)
def test_a_flag_needs_both_size_and_certainty(
    change: float, standard_error: float, num_windows: int, flagged: bool
) -> None:
    apart = Apart(change=change, standard_error=standard_error, num_windows=num_windows)
    assert apart.is_flagged is flagged


def test_agreement_by_hand() -> None:
    nll = {"prefill": 6.0, "decode1": 6.003, "decode8": 5.991}
    paired = {"decode1": Paired(3, 0.001, 0.0001, 8), "decode8": Paired(3, -0.003, 0.001, 8)}
    agreement = agreement_of(Evaluated(1, 1, 1, nll, dict.fromkeys(WAYS, 3), paired=paired))
    assert agreement.prefill == pytest.approx(7.389056)
    assert agreement.decode8_apart.change == pytest.approx(-0.0029955, rel=1e-4)  # exp(-0.003) - 1
    assert agreement.decode8_apart.change == pytest.approx(agreement.decode8 / agreement.prefill - 1)
    assert agreement.decode8_apart.standard_error == pytest.approx(0.001 * 0.9970045)
    assert agreement.disagreement == pytest.approx(0.0029955, rel=1e-4)
    assert not agreement.agrees
    paired["decode8"] = Paired(3, -0.003, 0.0016, 8)
    assert agreement_of(Evaluated(1, 1, 1, nll, dict.fromkeys(WAYS, 3), paired=paired)).agrees
    for tokens, common in (({"prefill": 3, "decode1": 3, "decode8": 2}, 3), (dict.fromkeys(WAYS, 3), 2)):
        paired["decode8"] = Paired(common, 0.0, 0.0, 8)
        with pytest.raises(HalftoneError, match="different tokens"):
            agreement_of(Evaluated(1, 1, 1, nll, tokens, paired=paired))


WAYS = ("prefill", "decode1", "decode8")


@pytest.mark.parametrize("random_weights", [{}, {"seed": "0"}], ids=["trained", "random"])
def test_what_figures_support_ends_with_their_repeats(random_weights: dict[str, str]) -> None:
    """Of random weights that sentence was lost."""
    model = msgspec.structs.replace(made_up().model, random_weights=random_weights)
    plan: Any = SimpleNamespace(settings=SimpleNamespace(model="a/model"))
    assert supports(plan, model, 1).endswith("a difference of a few percent is not evidence.")
    said = supports(plan, model, 3)
    assert "Each speed is the mean of 3 engines' runs" in said
    assert ("no verdict on quality" in said) == bool(random_weights)


def test_readme_of_the_load_generator_is_what_the_page_says() -> None:
    """One definition of TPOT, in both places."""
    readme = (Path(__file__).resolve().parents[2] / "loadtest/README.md").read_text()
    assert "(E2E - TTFT) / (n - 1)" in readme


def test_the_environment_is_told_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no such call, and a comparison there ended without its report."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "_mac_cores", lambda: 8)
    assert environment("")["machine"].endswith(", 8 cores usable")
