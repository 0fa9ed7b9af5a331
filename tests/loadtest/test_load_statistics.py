"""Figures against values worked out by hand."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.statistics import Record, describe, percentile, summarize


def record(**fields: object) -> Record:
    """Due at 10.0, tokens at 10.5, 10.6 and (two at once) 10.9; finished at 11.0."""
    defaults: dict[str, object] = {
        "index": 0,
        "scheduled_s": 10.0,
        "sent_s": 10.1,
        "finished_s": 11.0,
        "arrivals": [(10.5, 1), (10.6, 2), (10.9, 4)],
        "output_tokens": 4,
        "finish_reason": "length",
    }
    return Record(**(defaults | fields))  # type: ignore[arg-type]


def test_latencies_of_one_request() -> None:
    one = record()
    assert one.ttft_s == pytest.approx(0.5)  # from when it was due, not from 10.1
    assert one.e2e_s == pytest.approx(1.0)
    assert one.tpot_s == pytest.approx((1.0 - 0.5) / 3)
    assert one.gaps_s() == pytest.approx([0.1, 0.15, 0.15])  # two tokens in one chunk halve its gap


def test_one_token_has_no_tpot() -> None:
    one = record(arrivals=[(10.5, 1)], output_tokens=1)
    assert one.tpot_s is None
    assert one.gaps_s() == []


def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95) == pytest.approx(4.8)
    assert percentile([7.0], 99) == 7.0
    assert describe([]) is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_lies_within_and_agrees_with_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)), abs=1e-6)


def test_summary_counts_errors_and_leaves_out_the_warm_up() -> None:
    records = [
        record(index=0, scheduled_s=0.0, finished_s=5.0, warmup=True),
        record(index=1),
        record(index=2, scheduled_s=10.5, finished_s=12.0, arrivals=[(11.5, 1), (12.0, 2)], output_tokens=2),
        record(index=3, scheduled_s=10.6, error="HTTP 503: gone", arrivals=[], output_tokens=0),
        record(index=4, warmup=True, error="HTTP 503: gone"),
    ]
    summary = summarize(records, output_tokens=4)
    assert (summary["num_ok"], summary["num_errors"], summary["num_warmup_errors"]) == (2, 1, 1)
    assert summary["num_short"] == 1
    assert summary["errors"] == {"HTTP 503: gone": 2}
    assert summary["window_s"] == pytest.approx(2.0)  # 10.0 to 12.0
    assert summary["output_tokens_per_s"] == pytest.approx(6 / 2.0)
    assert summary["requests_per_s"] == pytest.approx(2 / 2.0)
    assert summary["ttft_s"]["p50"] == pytest.approx(0.75)
    assert summary["itl_s"]["n"] == 4


def test_summary_of_nothing_but_errors_is_still_a_summary() -> None:
    summary = summarize([record(error="no token came", arrivals=[])], output_tokens=4)
    assert summary["num_errors"] == 1
    assert summary["ttft_s"] is None
    assert summary["output_tokens_per_s"] == 0.0


def test_rebase_moves_every_time() -> None:
    one = record()
    one.rebase(10.0)
    assert (one.scheduled_s, one.finished_s, one.arrivals[0]) == (0.0, 1.0, (0.5, 1))
    assert one.ttft_s == pytest.approx(0.5)
