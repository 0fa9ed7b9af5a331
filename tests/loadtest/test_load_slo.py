"""Which requests met a service level, by hand-made timestamps."""

import pytest

from loadtest.errors import LoadTestError
from loadtest.slo import Slo, goodput
from loadtest.statistics import Record


def answer(ttft_s: float, *gaps_s: float, error: str = "") -> Record:
    """A request that was due at 1 s."""
    times = [1 + ttft_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    arrivals = [(time_s, number) for number, time_s in enumerate(times, 1)]
    return Record(
        0, 1.0, sent_s=1.0, finished_s=times[-1], arrivals=arrivals, output_tokens=len(times), error=error
    )


def test_a_level_is_read_and_said_in_milliseconds() -> None:
    slo = Slo.parse("TTFT=0.5s, itl=30ms,e2e=2s")
    assert slo.limits_s == {"ttft": 0.5, "itl": 0.03, "e2e": 2.0}
    assert str(slo) == "ttft=500ms,itl=30ms,e2e=2000ms"
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttft=-5ms", "tft=5ms", "itl=1ms,itl=2ms", "e2e=0s"])
def test_what_is_no_level_is_refused(text: str) -> None:
    with pytest.raises(LoadTestError, match="`--slo`"):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("level", "record", "missed"),
    [
        ("ttft=100ms", answer(0.099), []),
        ("ttft=100ms", answer(0.101), ["ttft"]),
        ("ttft=100ms,e2e=1s", answer(0.05, 1.0), ["e2e"]),
        ("tpot=20ms", answer(0.5, 0.01, 0.029), []),  # the mean is 19.5 ms
        ("itl=20ms", answer(0.5, 0.01, 0.029), ["itl"]),  # and p95 is not
        ("itl=20ms", answer(0.5, *[0.01] * 99, 0.5), []),  # one pause in a hundred
        ("itl=20ms,tpot=20ms", answer(0.5), []),  # one token waits for no second
        ("ttft=9s,itl=9s", answer(0.1, error="cut"), ["ttft", "itl"]),
    ],
)
def test_a_request_meets_every_limit_or_has_missed(level: str, record: Record, missed: list[str]) -> None:
    assert Slo.parse(level).missed(record) == missed


def test_goodput_counts_good_requests_over_all_and_over_time() -> None:
    run = [answer(0.1, 0.01), answer(0.3, 0.01), answer(0.1, 0.2), answer(0.1, error="cut")]
    assert goodput(run, Slo.parse("ttft=200ms,itl=50ms"), window_s=2.0) == {
        "slo": "ttft=200ms,itl=50ms",
        "num_measured": 4,
        "num_good": 1,
        "good_share": 0.25,
        "requests_per_s": 0.5,
        "output_tokens_per_s": 1.0,
        "missed": {"ttft": 2, "itl": 2},
    }
    assert goodput([], Slo.parse("ttft=1s"), 0.0)["good_share"] == 0
