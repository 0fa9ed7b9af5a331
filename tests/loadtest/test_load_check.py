"""Two accounts of a run: what counts as agreement, for each kind of server."""

from typing import Any

import pytest

from loadtest.check import compare
from loadtest.client import Client
from loadtest.scrape import KINDS, ScrapeError, Scraper, Totals, samples
from loadtest.statistics import Record

HALFTONE = """\
# HELP halftone_requests_total Requests that ended.
# TYPE halftone_requests_total counter
halftone_requests_total{model="m",precision="nf4",finish_reason="stop"} 2.0
halftone_requests_total{model="m",precision="nf4",finish_reason="length"} 3.0
halftone_requests_total{model="m",precision="nf4",finish_reason="abort"} 7.0
halftone_requests_total{model="m",precision="fp16",finish_reason="length"} 40.0
halftone_requests_total{model="other",precision="nf4",finish_reason="length"} 50.0
halftone_tokens_total{model="m",precision="nf4",kind="generated"} 100.0
halftone_tokens_total{model="m",precision="nf4",kind="discarded"} 4.0
halftone_tokens_total{model="m",precision="nf4",kind="prompt"} 50.0
halftone_tokens_total{model="m",precision="nf4",kind="cached"} 6.0
halftone_time_to_first_token_seconds_sum{model="m",precision="nf4"} 0.25
halftone_request_duration_seconds_sum{model="m",precision="nf4",endpoint="/v1/completions",status="200"} 1.5
halftone_request_duration_seconds_sum{model="m",precision="nf4",endpoint="/metrics",status="200"} 9.0
vllm:request_success_total{model_name="m",finished_reason="stop"} 1000
"""
VLLM = """\
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 5.0
vllm:generation_tokens_total{engine="0",model_name="m"} 96.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 56.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 0.25
vllm:e2e_request_latency_seconds_sum{engine="0",model_name="m"} 1.5
"""
SGLANG = VLLM.replace("vllm:request_success", "sglang:num_requests").replace("vllm:", "sglang:")
TGI = """\
tgi_request_success{method="completions"} 5
tgi_request_generated_tokens_sum 96
tgi_request_input_length_sum 56
tgi_request_duration_sum 1.5
"""
LLAMA = "llamacpp:tokens_predicted_total 96\nllamacpp:prompt_tokens_total 56\n"
COUNTS = {"requests": 5, "output_tokens": 96, "prompt_tokens": 56, "ttft_s": 0.25, "e2e_s": 1.5}


def read(text: str, model: str = "m") -> Totals:
    return Scraper(Client("http://x:1"), "/metrics", model).read(text)


@pytest.mark.parametrize(
    ("text", "kind", "absent"),
    [
        (HALFTONE, "halftone", ()),
        (VLLM, "vllm", ()),
        (SGLANG, "sglang", ()),
        (SGLANG.replace("sglang:", "sglang_"), "sglang", ()),
        (TGI, "text-generation-inference", ("ttft_s",)),
        (LLAMA, "llama.cpp", ("requests", "ttft_s", "e2e_s")),
    ],
)
def test_each_kind_of_server_counts_the_same_in_its_own_names(
    text: str, kind: str, absent: tuple[str, ...]
) -> None:
    totals = read(text, "m@nf4" if kind == "halftone" else "m")
    assert totals.kind == kind
    assert totals.counts == {name: count for name, count in COUNTS.items() if name not in absent}


def test_a_model_of_two_precisions_is_counted_apart_where_one_is_named() -> None:
    assert read(HALFTONE, "m@fp16").counts["requests"] == 40
    assert read(HALFTONE, "m").counts["requests"] == 45


def test_no_series_is_named_twice() -> None:
    for quantities in KINDS.values():
        assert len(set(quantities)) == len(quantities)


@pytest.mark.parametrize(("text", "why"), [(VLLM, "other models"), ("go_threads 9\n", "no kind of server")])
def test_what_cannot_be_read_is_said(text: str, why: str) -> None:
    with pytest.raises(ScrapeError, match=why):
        read(text, "another")


def test_prometheus_text_with_everything_in_it() -> None:
    text = '# TYPE a counter\na{x="1",y="q\\"}\\\\"} 2.5e3 1700000000\nb 1\nb_bad x\n\nc{} NaN\n'
    found = list(samples(text))
    assert found[:2] == [("a", {"x": "1", "y": 'q\\"}\\\\'}, 2500.0), ("b", {}, 1.0)]
    assert [name for name, _, _ in found] == ["a", "b", "c"]


def record(index: int, **fields: Any) -> Record:
    """Sent at 1.0 and connected 0.2 ms later; 24 tokens in 0.3 s, the first after 50 ms."""
    defaults: dict[str, Any] = {
        "scheduled_s": 0.5,
        "sent_s": 1.0,
        "connected_s": 1.0002,
        "finished_s": 1.3,
        "arrivals": [(1.05, 1), (1.3, 24)],
        "prompt_tokens": 14,
        "output_tokens": 24,
        "counted_by": "usage",
        "finish_reason": "length",
    }
    return Record(index, **(defaults | fields))


RUN = [record(0), record(1), record(2), record(3)]
ACCOUNT = {"requests": 4, "output_tokens": 96, "prompt_tokens": 56, "ttft_s": 0.199, "e2e_s": 1.19}
ZERO = Totals("halftone", {})


def checked(records: list[Record], **counts: float) -> dict[str, Any]:
    before = Totals("halftone", dict.fromkeys(ACCOUNT, 1000.0))
    after = {name: 1000.0 + count for name, count in (ACCOUNT | counts).items()}
    return compare(records, before, Totals("halftone", after))


def test_an_honest_run_agrees_and_the_schedule_is_not_held_against_the_server() -> None:
    check = checked(RUN)
    assert check["agrees"] is True
    assert check["not_checked"] == {}
    assert check["figures"]["sum of TTFT, s"]["client"] == pytest.approx(0.2)
    assert check["figures"]["sum of TTFT, s"]["difference"] == pytest.approx(-0.005)


@pytest.mark.parametrize(
    ("wrong", "figure"),
    [
        ({"requests": 5.0}, "answered requests"),
        ({"output_tokens": 90.0}, "output tokens"),
        ({"output_tokens": 102.0}, "output tokens"),
        ({"prompt_tokens": 59.0}, "prompt tokens"),
        ({"ttft_s": 0.1}, "sum of TTFT, s"),  # the first event was no token
        ({"e2e_s": 1.30}, "sum of E2E, s"),
    ],
)
def test_more_than_a_twentieth_is_a_disagreement(wrong: dict[str, float], figure: str) -> None:
    check = checked(RUN, **wrong)
    assert check["agrees"] is False
    assert [name for name, item in check["figures"].items() if not item["agrees"]] == [figure]


@pytest.mark.parametrize("near", [{"output_tokens": 92.0}, {"ttft_s": 0.19}, {"e2e_s": 1.25}])
def test_within_a_twentieth_is_none(near: dict[str, float]) -> None:
    assert checked(RUN, **near)["agrees"] is True


def test_a_network_of_a_millisecond_is_no_disagreement_about_short_answers() -> None:
    fast = [record(0, arrivals=[(1.0042, 1)], finished_s=1.0042)]
    counts = {"requests": 1, "output_tokens": 24, "prompt_tokens": 14, "ttft_s": 0.002, "e2e_s": 0.002}
    assert checked(fast, **counts)["agrees"] is True
    assert checked(fast, **(counts | {"ttft_s": 0.0015}))["agrees"] is False


def test_what_cannot_be_compared_is_named_and_not_taken_for_agreement() -> None:
    failed = checked([*RUN, record(4, error="cut")])
    assert set(failed["figures"]) == {"answered requests"}
    assert failed["agrees"] is True
    uncounted = checked([record(0, counted_by="events")] * 4)
    assert set(uncounted["not_checked"]) == {"output tokens", "prompt tokens"}
    preempted = checked(RUN, preemptions=1.0, prompt_tokens=90.0)
    assert preempted["agrees"] is True
    assert "preempted" in preempted["not_checked"]["prompt tokens"]
    bare = compare(RUN, Totals("llama.cpp", {}), Totals("llama.cpp", {}))
    assert bare["agrees"] is None
    assert len(bare["not_checked"]) == 5


def test_a_series_that_came_with_its_first_event_counts_from_nothing() -> None:
    assert compare(RUN, ZERO, Totals("halftone", ACCOUNT))["agrees"] is True
