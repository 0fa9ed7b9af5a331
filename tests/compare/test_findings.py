"""Knee, crossover, front, null comparison and the verdict, from figures made by hand."""

from dataclasses import replace

import msgspec
import pytest

from service.compare.figures import Figures, Interval, Level
from service.compare.findings import SPEED, crossover, front, knee, null_comparison
from service.compare.report import Greedy, Memory, Mode, Purchase, Row
from service.compare.verdict import Case, judge
from tests.compare.fake_load import memory, quality

PLACE = "tiny on a fake device under this traffic"


def interval(value: float, spread: float = 0.02) -> Interval:
    return Interval(estimate=value, low=value - spread, high=value + spread, n=3)


def level(
    streams: int = 0,
    rate: float = 0.0,
    ttft_s: float = 0.1,
    speed: float = 100.0,
    ratio: Interval | None = None,
) -> Level:
    return Level(
        id=f"closed-{streams}" if streams else f"open-{rate:g}",
        concurrency=streams,
        rate_per_s=rate,
        num_requests=8,
        num_warmup=1,
        runs=[],
        figures=Figures(
            output_tokens_per_s=interval(speed),
            ttft_p95_s=interval(ttft_s, 0.01),
            goodput_per_s=interval(speed / 50),
        ),
        ratios=Figures(output_tokens_per_s=ratio, goodput_per_s=ratio) if ratio else None,
        itl_curve_s=[],
    )


def row(
    name: str,
    speed: float,
    weight_bytes: int = 10**9,
    loss: float = 1.0,
    kl: float = 0.0,
    spread: float = 0.02,
) -> Row:
    """One mode, `speed` times the reference, with an interval of ± `spread`."""
    ratio = None if name == "bf16" else interval(speed, spread)
    held: Memory = memory(weight_bytes)
    return Row(
        mode=Mode(name=name, precision=name),
        status="ok",
        num_repeats=3,
        levels=[
            level(1, ratio=ratio),
            level(4, speed=100 * speed, ratio=ratio),
            level(rate=2.0, ratio=ratio),
        ],
        memory=held,
        quality=quality(20 * loss, loss, kl),
        purchase=Purchase(
            freed_bytes=10**9 - weight_bytes,
            kv_bytes_per_token=1000,
            more_kv_tokens=(10**9 - weight_bytes) // 1000,
            request_tokens=100,
            more_requests=(10**9 - weight_bytes) // 100_000,
        ),
    )


def ratio_of(one: Row, other: Row, figure: str, level_id: str) -> Interval:
    """From both rows' own figures; as sure as both are."""
    mine, theirs = (row.figure(SPEED, "closed-4") for row in (one, other))
    assert mine
    assert theirs
    spreads = [r.high - r.estimate for row in (one, other) if (r := row.ratio(SPEED, "closed-4")) and r.high]
    return interval(mine.estimate / theirs.estimate, max(spreads, default=0.02))


def case(*rows: Row, slo: str = "", judges_quality: bool = True) -> Case:
    null = msgspec.structs.replace(row("bf16 again", 1.0), quality=None)
    return Case(
        rows=rows,
        reference="bf16",
        ratio=ratio_of,
        place=PLACE,
        throughput_level="closed-4",
        latency_level="open-2",
        rate_levels=["open-2"],
        slo=slo,
        max_perplexity_rise=0.05,
        judges_quality=judges_quality,
        null=null_comparison(null, "bf16"),
    )


@pytest.mark.parametrize(
    ("ttfts", "found", "beyond"),
    [
        ([0.11, 0.15, 0.19], 4.0, True),
        ([0.11, 0.19, 0.25], 2.0, False),
        ([0.11, 0.25, 0.15], 1.0, False),  # what is fine again behind the knee is chance
        ([0.3, 0.4, 0.5], 0.0, False),
    ],
)
def test_the_knee_is_the_highest_rate_within_twice_the_unloaded_ttft(
    ttfts: list[float], found: float, beyond: bool
) -> None:
    rates = [level(rate=rate, ttft_s=ttft) for rate, ttft in zip((1.0, 2.0, 4.0), ttfts, strict=True)]
    bend = knee([level(1, ttft_s=0.1), level(4, ttft_s=9.0), *rates])
    assert bend is not None
    assert (bend.rate_per_s, bend.is_beyond) == (found, beyond)
    assert bend.low_rate_per_s <= bend.rate_per_s <= bend.high_rate_per_s
    assert knee(rates) is None
    assert knee([level(1)]) is None


def test_a_knee_that_an_interval_straddles_is_said_to_be_unsure() -> None:
    bend = knee([level(1, ttft_s=0.1), level(rate=1.0, ttft_s=0.15), level(rate=2.0, ttft_s=0.205)])
    assert bend is not None
    assert (bend.low_rate_per_s, bend.rate_per_s, bend.high_rate_per_s) == (1.0, 1.0, 2.0)
    assert "perhaps to 2" in bend.said


@pytest.mark.parametrize(
    ("ratios", "kind", "streams"),
    [
        ([1.5, 1.3, 1.1], "always pays", None),
        ([0.5, 0.6, 0.9], "never pays", None),
        ([1.5, 1.1, 0.9], "stops paying", 8.0),  # halfway on the logarithm between 4 and 16
        ([1.2, 1.0, 0.8], "stops paying", 4.0),  # undecided between
        ([0.8, 0.9, 1.3], "starts paying", 5.65685),
        ([1.5, 1.01, 1.0], "undecided", None),
        ([1.0, 1.01, 1.0], "undecided", None),
    ],
)
def test_where_a_mode_stops_or_starts_paying(ratios: list[float], kind: str, streams: float | None) -> None:
    levels = [level(n, ratio=interval(ratio)) for n, ratio in zip((1, 4, 16), ratios, strict=True)]
    found = crossover([*reversed(levels), level(rate=2.0, ratio=interval(0.1))], "bf16")
    assert found is not None
    assert found.kind == kind
    assert found.streams == (streams if streams is None else pytest.approx(streams, rel=1e-4))
    assert "bf16" in found.said
    assert crossover([level(1)], "bf16") is None


def test_off_the_front_is_only_what_another_mode_surely_beats() -> None:
    rows = [
        row("bf16", 1.0),
        row("int8", 0.8, 5 * 10**8, kl=0.01),
        row("nf4", 1.5, 3 * 10**8, kl=0.2),
        row("awq", 1.49, 3 * 10**8, kl=0.1),
        row("int3", 1.3, 4 * 10**8, kl=0.3),
    ]
    found = front(rows, ratio_of, "closed-4", judges_quality=True)
    assert [name for name, on in found.items() if not on] == ["int3"]
    drawn = front(rows, ratio_of, "closed-4", judges_quality=False)
    assert [name for name, on in drawn.items() if not on] == ["bf16", "int8", "int3"]


def test_the_null_comparison_counts_what_lies_beyond() -> None:
    off = msgspec.structs.replace(
        row("bf16 again", 1.0), levels=[level(1, ratio=interval(1.1)), level(4, ratio=interval(1.0))]
    )
    found = null_comparison(off, "bf16")
    assert (found.num_figures, found.num_beyond) == (4, 2)
    assert found.beyond == ["closed-1 output_tokens_per_s", "closed-1 goodput_per_s"]
    assert "2 of 4 ratios" in found.said
    assert "too narrow" in found.said.partition(": ")[2]


def test_the_fastest_mode_within_the_allowed_loss_is_deployed() -> None:
    verdict = judge(
        case(
            row("bf16", 1.0),
            row("int8", 1.3, 5 * 10**8, loss=1.02, kl=0.02),
            row("nf4", 1.6, 3 * 10**8, loss=1.3, kl=0.3),
            row("fp8", 1.1, 5 * 10**8, loss=1.03, kl=0.03),
            row("awq", 1.5, 3 * 10**8, loss=1.045, kl=0.1),
        )
    )
    assert verdict.deploy == "int8"
    assert PLACE in verdict.headline
    assert verdict.tied == []
    assert "more than the 5 % allowed" in verdict.rejected["nf4"]
    assert "not surely within the 5 % allowed" in verdict.rejected["awq"]
    assert "against int8" in verdict.rejected["fp8"]
    assert "bf16" in verdict.rejected
    assert verdict.sureness[0].startswith("against bf16, each at 95 % confidence: tokens/s at least +2")
    assert ", perplexity at most +3.0 %" in verdict.sureness[0]
    assert any("tokens/s +30.0 %" in reason for reason in verdict.because)
    assert any("500 MB" in reason for reason in verdict.because)
    assert any("perplexity +2.0 %" in cost and "5 % are allowed" in cost for cost in verdict.costs)


def test_parted_answers_stand_beside_those_that_rounding_parts() -> None:
    def with_greedy(one: Row, share: float) -> Row:
        told = Greedy(num_prompts=16, num_tokens=64, same_share=share, same_standard_error=0.1,
                      median_agreed_tokens=30, agreed_tokens=[30] * 16)  # fmt: skip
        assert one.quality
        return msgspec.structs.replace(one, quality=msgspec.structs.replace(one.quality, greedy=told))

    rows = with_greedy(row("bf16", 1.0), 0.5625), with_greedy(row("int8", 1.3, kl=0.02), 0.25)
    assert (
        "25 % of greedy answers stay the same for 64 tokens, of bf16's own, rounded another way, 56 %"
        in judge(case(*rows)).costs
    )


def test_nothing_is_deployed_where_intervals_overlap_with_the_reference() -> None:
    verdict = judge(case(row("bf16", 1.0), row("int8", 1.01, 5 * 10**8, kl=0.01)))
    assert verdict.deploy == ""
    assert set(verdict.tied) == {"bf16", "int8"}
    assert "cannot tell" in verdict.headline
    assert "surely faster than bf16, so that it may stay" in verdict.because[0]
    assert verdict.because[1].startswith("int8: weights −50.0 %, perplexity ")
    assert verdict.because[2].startswith("int8 frees 500 MB")
    assert any("mean of 3 engines" in said for said in verdict.sureness)


def test_modes_that_speed_cannot_tell_apart_are_told_apart_by_what_is_known() -> None:
    near, far = row("int8", 1.5, 5 * 10**8, kl=0.01), row("fp8", 1.51, 4 * 10**8, kl=0.04)
    verdict = judge(case(row("bf16", 1.0), near, far))
    assert verdict.deploy == "int8"
    assert set(verdict.tied) == {"int8", "fp8"}
    assert verdict.because[-1] == "fp8 cannot be told from int8 in speed; int8 is nearer to bf16"
    alike = judge(case(row("bf16", 1.0), near, row("fp8", 1.51, 4 * 10**8, kl=0.0101)))
    assert alike.deploy == "fp8"  # divergence cannot tell them apart either; bytes are exact
    assert alike.because[-1] == "int8 cannot be told from fp8 in speed; fp8 has the fewest bytes"


def test_an_uncertain_fastest_mode_does_not_hide_one_that_is_surely_faster() -> None:
    """One slow engine of three made int8's interval hold the reference's speed, and fp8 was surely ahead."""
    uncertain, sure = (
        row("int8", 1.34, 5 * 10**8, kl=0.01, spread=0.4),
        row("fp8", 1.1, 5 * 10**8, kl=0.04, spread=0.07),
    )
    verdict = judge(case(row("bf16", 1.0), uncertain, sure))
    assert set(verdict.tied) == {"int8", "fp8"}
    assert verdict.deploy == "fp8"  # nearer or not, int8 is not surely faster than what it would replace
    assert verdict.rejected["bf16"].endswith("against fp8")
    assert any("tokens/s +10.0 %" in reason for reason in verdict.because)
    assert verdict.because[-1] == "int8 cannot be told from fp8 in speed, and not from bf16 either"


def test_the_reference_is_deployed_where_every_other_mode_is_slower() -> None:
    verdict = judge(case(row("bf16", 1.0), row("int8", 0.7, 5 * 10**8)))
    assert verdict.deploy == "bf16"
    assert verdict.costs == []


def test_random_weights_deploy_nothing() -> None:
    rows = (row("bf16", 1.0), row("nf4", 1.6, 3 * 10**8, loss=1.3, kl=0.3))
    verdict = judge(case(*rows, judges_quality=False))
    assert verdict.deploy == ""
    assert "nf4 is ahead" in verdict.headline
    assert "random" in verdict.headline
    assert not any("perplexity" in cost for cost in verdict.costs)
    alike = judge(case(row("bf16", 1.0), row("nf4", 1.01), judges_quality=False))
    assert "cannot be told apart in tokens/s" in alike.headline
    assert "ahead" not in alike.headline


def test_a_service_level_decides_first() -> None:
    verdict = judge(case(row("bf16", 1.0), row("int8", 1.3, loss=1.02, kl=0.02), slo="TTFT <= 500 ms"))
    assert "TTFT <= 500 ms" in verdict.rule
    assert any("requests/s within the SLO +30.0 %" in reason for reason in verdict.because)


def test_one_run_establishes_nothing() -> None:
    single = row("int8", 1.3, 5 * 10**8)
    levels = [
        msgspec.structs.replace(
            one, ratios=Figures(output_tokens_per_s=Interval(estimate=1.3, low=None, high=None, n=1))
        )
        for one in single.levels
    ]
    rows = (row("bf16", 1.0), msgspec.structs.replace(single, levels=levels))

    def once(one: Row, other: Row, figure: str, level_id: str) -> Interval:
        return Interval(estimate=1.3, low=None, high=None, n=1)

    assert judge(replace(case(*rows), ratio=once)).deploy == ""
    # nor without the reference, which may not fit
    others = (rows[1], msgspec.structs.replace(rows[1], mode=Mode(name="fp8", precision="fp8")))
    assert judge(replace(case(*others), ratio=once)).deploy == ""


def test_failures_and_other_servers_are_no_candidates() -> None:
    broken = Row(mode=Mode(name="nf4", precision="nf4"), status="failed", error="no kernel\nhint: none")
    other = msgspec.structs.replace(
        row("vllm", 3.0), mode=Mode(name="vllm", precision="", server="http://x"), quality=None, memory=None
    )
    verdict = judge(case(row("bf16", 1.0), broken, other))
    assert verdict.deploy == "bf16"
    assert verdict.rejected["nf4"] == "failed: no kernel"
    assert "another server" in verdict.rejected["vllm"]
