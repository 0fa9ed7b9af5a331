"""Figures against values worked out by hand."""

from itertools import accumulate
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.statistics import FORMULAS, TAIL_PERCENTILES, Record, describe, percentile, pool, summarize


def record(**fields: object) -> Record:
    """Due at 10.0, tokens at 10.5, 10.6 and (two at once) 10.9; finished at 11.0."""
    defaults: dict[str, object] = {
        "index": 0,
        "scheduled_s": 10.0,
        "sent_s": 10.1,
        "finished_s": 11.0,
        "arrivals": [(10.5, 1), (10.6, 2), (10.9, 4)],
        "output_tokens": 4,
        "asked_tokens": 4,
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
    summary = summarize(records)
    assert (summary["num_ok"], summary["num_errors"], summary["num_warmup_errors"]) == (2, 1, 1)
    assert summary["num_short"] == 1
    assert summary["errors"] == {"HTTP 503: gone": 2}
    assert summary["window_s"] == pytest.approx(2.0)  # 10.0 to 12.0
    assert summary["output_tokens_per_s"] == pytest.approx(6 / 2.0)
    assert summary["requests_per_s"] == pytest.approx(2 / 2.0)
    assert summary["ttft_s"]["p50"] == pytest.approx(0.75)
    assert summary["itl_s"]["n"] == 4
    assert summary["all_busy"] is None  # an open loop has no streams
    assert summary["tokens_per_event"] == pytest.approx(6 / 5)


def test_summary_of_nothing_but_errors_is_still_a_summary() -> None:
    summary = summarize([record(error="no token came", arrivals=[])])
    assert summary["num_errors"] == 1
    assert summary["ttft_s"] is None
    assert summary["output_tokens_per_s"] == 0.0


def test_pauses_are_those_of_all_streams() -> None:
    """Somebody else's token ends one, an answer alone has none, and nobody is missed between answers."""
    streams = [
        record(arrivals=[(1.0, 1), (1.1, 2), (1.7, 3), (1.8, 4)]),
        record(arrivals=[(1.05, 1), (1.1, 2), (1.75, 3)]),
        record(arrivals=[(1.1, 1), (1.5, 2)]),  # ends first
        record(arrivals=[(9.0, 1), (9.9, 2)]),  # alone
        record(arrivals=[], error="HTTP 503: gone"),
    ]
    summary = summarize(streams)
    longest, second, *rest = summary["pauses"]
    assert longest == {"seconds": pytest.approx(0.4), "start_s": 1.1, "num_answers": 3}
    assert second == {"seconds": pytest.approx(0.2), "start_s": 1.5, "num_answers": 2}
    assert len(rest) == 2  # 1.05 to 1.1, and 1.7 to 1.75
    assert pool([streams, []])["longest_pause"] == longest
    assert pool([[]])["longest_pause"] is None


def test_rebase_moves_every_time() -> None:
    one = record()
    one.rebase(10.0)
    assert (one.scheduled_s, one.finished_s, one.arrivals[0]) == (0.0, 1.0, (0.5, 1))
    assert one.ttft_s == pytest.approx(0.5)


GAPS = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 8)), min_size=1, max_size=30)


@settings(deadline=None)
@given(st.floats(0, 100), st.floats(0, 10), GAPS)
def test_tpot_is_the_mean_gap_where_the_first_event_brings_one_token(
    scheduled_s: float, wait_s: float, gaps: list[tuple[float, int]]
) -> None:
    """Whatever the events bring: gaps counted by their tokens sum to E2E - TTFT, over n - 1 of them."""
    first_s = scheduled_s + wait_s
    times_s = accumulate((gap_s for gap_s, _ in gaps), initial=first_s)
    counts = accumulate((tokens for _, tokens in gaps), initial=1)
    arrivals = list(zip(times_s, counts, strict=True))
    end_s, total = arrivals[-1]
    one = record(scheduled_s=scheduled_s, arrivals=arrivals, finished_s=end_s, output_tokens=total)
    known = one.gaps_s()
    assert len(known) == total - 1
    assert one.tpot_s == pytest.approx(sum(known) / len(known), abs=1e-9)
    assert one.ttft_s == pytest.approx(wait_s, abs=1e-9)
    assert one.tokens_by(end_s) == total
    assert one.tokens_by(first_s - 1) == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=80))
def test_a_description_is_ordered(values: list[float]) -> None:
    described = describe(values, TAIL_PERCENTILES)
    assert described is not None
    names = ("p50", "p95", "p99", "p99.9", "max")
    assert [described[name] for name in names] == sorted(described[name] for name in names)
    assert min(values) <= described["mean"] + 1e-9
    assert described["n"] == len(values)


def test_the_busy_window_ends_with_the_first_stream_that_is_done() -> None:
    """An event is worth as many tokens as every other of its request, where only the total is known."""
    records = [
        record(index=0, stream=0, sent_s=0.0, arrivals=[(1.0, 1), (2.0, 2)], finished_s=2.0),  # 2 tokens each
        record(index=1, stream=1, sent_s=0.5, arrivals=[(1.5, 1), (4.5, 2)], finished_s=4.5),
        record(index=2, stream=0, sent_s=2.0, finished_s=4.0, error="HTTP 503", arrivals=[]),
        record(index=3, stream=0, sent_s=0.0, finished_s=9.0, warmup=True),
    ]
    busy = summarize(records)["all_busy"]
    assert busy == pytest.approx({"window_s": 3.5, "output_tokens": 6, "output_tokens_per_s": 6 / 3.5})


def test_no_stream_of_one_request_is_ever_alone_with_others() -> None:
    apart = [
        record(index=0, stream=0, sent_s=0.0, finished_s=1.0),
        record(index=1, stream=1, sent_s=2.0, finished_s=3.0),
    ]
    assert summarize(apart)["all_busy"] is None


def test_repeats_are_pooled_by_request_and_rates_by_repeat() -> None:
    slow = [record(index=0), record(index=1, error="HTTP 503: gone", arrivals=[], output_tokens=0)]
    fast = [
        record(index=0, finished_s=10.8, arrivals=[(10.1, 1), (10.8, 4)]),
        record(index=1, finished_s=10.8, arrivals=[(10.2, 1), (10.8, 4)]),
        record(index=2, warmup=True, arrivals=[(99.0, 1)], cached_tokens=5),
    ]
    figures = pool([slow, fast])
    assert (figures["num_ok"], figures["num_errors"], figures["cached_tokens"]) == (3, 1, 0)
    assert figures["errors"] == {"HTTP 503: gone": 1}
    assert figures["output_tokens_per_s"] == pytest.approx({"median": 7.0, "min": 4.0, "max": 10.0})
    assert figures["ttft_s"]["n"] == 3
    assert figures["ttft_s"]["p50"] == pytest.approx(0.2)
    assert figures["all_busy_tokens_per_s"] is None
    assert figures["tokens_per_event"] == pytest.approx(12 / 7)


def test_the_page_has_the_formulas_of_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "loadtest/README.md").read_text(encoding="utf-8")
    for name, formula in FORMULAS.items():
        assert f"| {name} | `{formula}` |" in page
