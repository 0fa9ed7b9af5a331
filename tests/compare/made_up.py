"""Reports with invented figures: what every form of a report is drawn, and tested, from.

Nothing here was measured. `made_up(MODES)` has every kind of figure; each test changes what it is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.compare.figures import FIGURES, Energy, Figures, Interval, Latency, Level, Run
from service.compare.report import (
    FORMAT,
    Agreement,
    Apart,
    Crossover,
    Device,
    Fit,
    Greedy,
    Knee,
    Loading,
    Memory,
    Mode,
    Model,
    NullComparison,
    Purchase,
    Quality,
    Report,
    Row,
    Slo,
    Text,
    Turn,
    Verdict,
    Workload,
)

STREAMS = (1, 4, 16, 64)
RATES = (2.0, 4.0, 8.0, 16.0)
KV_BYTES_PER_TOKEN = 131_072
LEDGER = {"codes": 0.86, "scales": 0.03, "zeros": 0.001, "embedding": 0.109}  # shares of weight bytes


@dataclass(frozen=True)
class Made:
    """One mode in a few numbers; speed is against the reference, at one stream and at the most."""

    name: str
    gigabytes: float
    speed_alone: float = 1.0
    speed_crowded: float = 1.0
    kl: float = 0.0
    kv_dtype: str = "auto"
    spread: float = 0.02  # half an interval, as a share


MODES = (
    Made("bf16", 16.06),
    Made("int8", 9.09, 0.62, 0.81, 0.0011),
    Made("nf4", 5.69, 1.92, 0.94, 0.0216),
    Made("awq", 5.72, 2.14, 1.22, 0.0173),
    Made("fp8", 9.08, 1.51, 1.38, 0.0042),
)
TEN = (
    *MODES,
    Made("nf4 + kv int8", 5.69, 1.86, 0.99, 0.0229, "int8"),
    Made("awq=ORG/MODEL-AWQ + kv fp8", 5.72, 2.05, 1.27, 0.0181, "fp8"),
    Made("gptq:bits=3", 4.6, 1.7, 0.9, 0.094),
    Made("hqq:bits=2", 3.9, 1.4, 0.7, 0.61),
    Made("aqlm", 3.8, 0.8, 0.4, 0.13),
)
GRID = tuple(
    Made(
        made.name if kv == "auto" else f"{made.name} + kv {kv}",
        made.gigabytes,
        made.speed_alone,
        made.speed_crowded * (1.0 if kv == "auto" else 1.1),
        made.kl + {"auto": 0.0, "int8": 0.0006, "fp8": 0.0031}[kv],
        kv,
    )
    for made in (MODES[0], MODES[2], MODES[4])
    for kv in ("auto", "int8", "fp8")
)


def interval(estimate: float, spread: float, n: int = 3) -> Interval:
    """Without ends where one repeat can have none."""
    if n < 2:
        return Interval(estimate=estimate, low=None, high=None, n=n)
    return Interval(estimate=estimate, low=estimate * (1 - spread), high=estimate * (1 + spread), n=n)


def speed_at(made: Made, streams: float) -> float:
    """Against the reference, from one stream to the most in equal steps of doubling."""
    share = min(streams.bit_length() - 1 if isinstance(streams, int) else 3.0, 6.0) / 6
    return made.speed_alone * (made.speed_crowded / made.speed_alone) ** share


def figures(made: Made, streams: int, rate_per_s: float, repeats: int, *, relative: bool) -> Figures:
    """Of one level; `relative`: against a mode of speed 1, with intervals half as wide again."""
    speed = speed_at(made, streams or 8)
    load = streams or 8.0
    crowd = 1.0 if relative else 1 + (rate_per_s / speed / 12) ** 4 + streams / 40
    spread = made.spread * (1.5 if relative else 1.0)

    def good(of_speed: float) -> float:
        return rate_per_s / (1 + (rate_per_s / of_speed / 11) ** 6)

    def latency(seconds: float) -> Interval:
        return interval((1.0 if relative else seconds * crowd) / speed, spread, repeats)

    tokens_per_s = 1.0 if relative else 70 * load / (1 + load / 30)
    found = {
        "output_tokens_per_s": interval(tokens_per_s * speed, spread, repeats),
        "requests_per_s": interval(tokens_per_s * speed / (1 if relative else 128), spread, repeats),
        "goodput_per_s": interval(good(speed) / (good(1.0) if relative else 1.0), spread, repeats)
        if rate_per_s
        else None,
        "joules_per_output_token": interval((1.0 if relative else 1.9 / load**0.5) / speed, spread, repeats),
        "joules_per_token": interval((1.0 if relative else 0.9 / load**0.5) / speed, spread, repeats),
    }
    for name, seconds in (("ttft", 0.061), ("itl", 0.0143), ("tpot", 0.0145), ("e2e", 1.9)):
        for percent, factor in (("p50", 1.0), ("p95", 1.8), ("p99", 2.6)):
            found[f"{name}_{percent}_s"] = latency(seconds * factor)
    assert set(found) == set(FIGURES)
    return Figures(**found)


def run(level_figures: Figures, repeat: int, order: int, raw: str) -> Run:
    """One repeat whose figures are about the level's."""

    def latency(name: str) -> Latency:
        p50, p95, p99 = (value_of(level_figures, f"{name}_{percent}_s") for percent in ("p50", "p95", "p99"))
        return Latency(n=64, mean=p50 * 1.1, p50=p50, p95=p95, p99=p99, max=p99 * 1.2)

    factor = (0.99, 1.0, 1.01)[repeat % 3]
    return Run(
        repeat=repeat,
        order=order,
        seed=1000 + repeat,
        num_ok=64,
        num_errors=0,
        num_short=0,
        errors={},
        window_s=12.5,
        prompt_tokens=12_800,
        output_tokens=8192,
        output_tokens_per_s=factor * value_of(level_figures, "output_tokens_per_s"),
        requests_per_s=factor * value_of(level_figures, "requests_per_s"),
        goodput_per_s=level_figures.goodput_per_s and level_figures.goodput_per_s.estimate,
        ttft_s=latency("ttft"),
        itl_s=latency("itl"),
        tpot_s=latency("tpot"),
        e2e_s=latency("e2e"),
        energy=Energy(joules=4100.0, window_s=12.5, idle_watts=71.0),
        client_cpu_share=0.07,
        client_lag_p99_s=0.0006,
        raw=raw,
    )


def value_of(level_figures: Figures, name: str) -> float:
    found: Interval = getattr(level_figures, name)
    return found.estimate


def levels(made: Made, repeats: int, *, is_reference: bool) -> list[Level]:
    found = []
    for streams, rate_per_s in [(n, 0.0) for n in STREAMS] + [(0, rate) for rate in RATES]:
        id = f"closed-{streams}" if streams else f"open-{rate_per_s:g}"
        own = figures(made, streams, rate_per_s, repeats, relative=False)
        ratios = None if is_reference else figures(made, streams, rate_per_s, repeats, relative=True)
        runs = [run(own, n, n, f"modes/{n}-{id}.json") for n in range(repeats)]
        found.append(
            Level(
                id=id,
                concurrency=streams,
                rate_per_s=rate_per_s,
                num_requests=64,
                num_warmup=8,
                runs=runs,
                figures=own,
                ratios=ratios,
                itl_curve_s=[(0.008 + 0.0004 * n) / speed_at(made, 8) for n in range(51)],
            )
        )
    return found


def quality(made: Made, disagreement: float = 0.0005, standard_error: float = 0.001) -> Quality:
    perplexity = 7.42 * (1 + 1.6 * made.kl)
    apart = Apart(change=disagreement, standard_error=standard_error, num_windows=8)
    still = Apart(change=0.0, standard_error=standard_error, num_windows=8)
    return Quality(
        perplexity=perplexity,
        tokens=4096,
        kl_mean=made.kl,
        kl_tokens=4096,
        top1_agreement=1 - 1.9 * made.kl**0.5 / 3,
        agreement=Agreement(
            tokens=2048,
            prefill=perplexity,
            decode1=perplexity * (1 + disagreement),
            decode8=perplexity,
            decode1_apart=apart,
            decode8_apart=still,
            disagreement=abs(disagreement),
            agrees=not apart.is_flagged,
        ),
        perplexity_ratio=interval(1 + 1.6 * made.kl, 0.004, 8),
        reference_perplexity=7.42,
        kl=interval(made.kl, 0.08, 8),
        top1=interval(1 - 1.9 * made.kl**0.5 / 3, 0.01, 8),
        greedy=Greedy(
            num_prompts=16,
            num_tokens=64,
            same_share=0.5,
            same_standard_error=0.125,
            median_agreed_tokens=23,
            agreed_tokens=[23] * 8 + [64] * 8,
        )
        if made.kl
        else None,
    )


def row(made: Made, reference: Made, repeats: int = 3) -> Row:
    is_reference = made is reference
    weight_bytes = int(made.gigabytes * 1e9)
    kv_bytes = int(20_000 * KV_BYTES_PER_TOKEN * (1.0 if made.kv_dtype == "auto" else 0.52))
    per_token = kv_bytes / 20_000
    freed = int((reference.gigabytes - made.gigabytes) * 1e9)
    more_kv_tokens = int((freed + 20_000 * KV_BYTES_PER_TOKEN) / per_token) - 20_000
    knee_rate = 8.0 if speed_at(made, 8) > 1.2 else 4.0
    return Row(
        mode=Mode(name=made.name, precision=made.name.split(" ")[0], kv_dtype=made.kv_dtype),
        status="ok",
        num_repeats=repeats,
        levels=levels(made, repeats, is_reference=is_reference),
        knee=Knee(
            unloaded_ttft_p95_s=0.11,
            rate_per_s=knee_rate,
            low_rate_per_s=knee_rate / 2,
            high_rate_per_s=knee_rate,
            is_beyond=False,
            said=f"p95 TTFT stays within twice the unloaded one up to {knee_rate:g} requests/s",
        ),
        crossover=None if is_reference else crossover(made),
        is_on_front=made.name in ("bf16", "fp8", "awq"),
        memory=Memory(
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            kv_tokens=20_000,
            kv_bytes_per_token=per_token,
            peak_load_bytes=int(1.1 * weight_bytes),
            peak_bytes=weight_bytes + kv_bytes + 1_900_000_000,
            peak_without_kv_bytes=weight_bytes + 1_900_000_000,
            parts={
                **{f"weights.{part}": int(share * weight_bytes) for part, share in LEDGER.items()},
                "kv.free": kv_bytes,
                "activations": 900_000_000,
                "graphs": 400_000_000,
            },
        ),
        loading=Loading(
            seconds=interval(9.1 + made.gigabytes / 2, 0.06, repeats),
            stages={"import": 3.1, "load": 6.0 + made.gigabytes / 2},
            quantize_seconds=212.0 if made.name == "awq" else 0.0,
        ),
        quality=quality(made),
        purchase=None
        if is_reference
        else Purchase(
            freed_bytes=freed,
            kv_bytes_per_token=per_token,
            more_kv_tokens=more_kv_tokens,
            request_tokens=328.0,
            more_requests=more_kv_tokens // 328,
        ),
        dtype="bf16",
        kv_dtype="bf16" if made.kv_dtype == "auto" else made.kv_dtype,
        kernels={"qkv_proj": f"{made.name.split(':')[0]}_linear", "attention": "paged"},
        calibration={"text": "python-documentation-a", "sha256": "2" * 64} if made.name == "awq" else {},
        seconds=95.0,
    )


def crossover(made: Made) -> Crossover:
    first, last = made.speed_alone, made.speed_crowded
    if min(first, last) > 1.02:
        return Crossover(kind="always pays", streams=None, low_streams=0, high_streams=0, said="pays")
    if max(first, last) < 0.98:
        said = "never writes more tokens/s than the reference"
        return Crossover(kind="never pays", streams=None, low_streams=0, high_streams=0, said=said)
    said = "stops paying between 16 and 64 streams, about 33"
    return Crossover(kind="stops paying", streams=33.0, low_streams=16, high_streams=64, said=said)


VERDICT = Verdict(
    deploy="fp8",
    tied=[],
    headline=(
        "For llama-8b on one NVIDIA H100 80GB, with this traffic and TTFT <= 500 ms, ITL <= 30 ms: fp8."
    ),
    because=[
        "It writes the most tokens/s with 64 streams: +38 % against bf16 [+34, +42].",
        "Its weights take 57 % of the bytes of bf16.",
    ],
    costs=["Perplexity +0.7 % [+0.3, +1.1], KL 0.0042 nats per token."],
    sureness=["Three repeats, interleaved; the reference differs from itself by no more than 3 %."],
    rejected={"int8": "surely slower than bf16", "nf4": "no faster than bf16 with 64 streams"},
    rule="The fastest mode whose divergence stays below 0.02 nats per token.",
)


def made_up(modes: Sequence[Made] = MODES, *, repeats: int = 3, **changes: Any) -> Report:
    reference = modes[0]
    rows = [row(made, reference, repeats) for made in modes]
    null_made = Made(f"{reference.name} again", reference.gigabytes, 1.004, 1.004, 0.0)
    null = NullComparison(
        row=row(null_made, reference, repeats),
        num_figures=136,
        num_beyond=5,
        beyond=["closed-16 ttft_p99_s"],
        said=(
            f"{reference.name} against itself: 5 of 136 ratios exclude 1, where chance alone makes it 7; "
            "tokens/s differed by 0.4 %."
        ),
    )
    report = Report(
        format=FORMAT,
        first_line=(
            "llama-8b (LlamaForCausalLM, 8030.3 M parameters) on NVIDIA H100 80GB HBM3 (cuda:0); 1, 4, 16 "
            "and 64 streams and Poisson arrivals at 2, 4, 8 and 16 requests/s, 64 texts of prompts.jsonl, "
            "128 output tokens each"
        ),
        supports="Invented figures: they support nothing.",
        complete=True,
        not_measured=[],
        reference=reference.name,
        model=Model(
            name="llama-8b", path="/models/llama-8b", architecture="LlamaForCausalLM", num_parameters=1
        ),
        device=Device(kind="cuda:0", name="NVIDIA H100 80GB HBM3", threads=0),
        workload=Workload(
            prompts="64 texts of prompts.jsonl",
            prompts_sha256="0" * 64,
            seed=0,
            rate_rule="as asked",
            output_tokens=128,
            kv_tokens=20_000,
            num_repeats=3,
            max_repeats=6,
            slo=Slo(ttft_s=0.5, itl_s=0.03),
            throughput_level=f"closed-{STREAMS[-1]}",
            latency_level=f"open-{RATES[2]:g}",
        ),
        text=Text(
            name="python-documentation-b",
            sha256="1" * 64,
            python="3.12.3",
            calibration_name="python-documentation-a",
            calibration_sha256="2" * 64,
            num_windows=8,
            window_tokens=513,
            protocol="token perplexity over 8 disjoint windows of 513 tokens",
        ),
        rows=rows,
        null=null,
        verdict=VERDICT if len(modes) > 1 else None,
        schedule=[Turn(order=n, repeat=0, mode=made.name) for n, made in enumerate(modes)],
        environment={"halftone": "0.2.0", "torch": "2.13.0", "commit": "0123456789ab", "gpu driver": "580.1"},
        started_at="2026-01-01T00:00:00+00:00",
        seconds=812.0,
    )
    return msgspec.structs.replace(report, **changes)


def failed(name: str, error: str) -> Row:
    return Row(mode=Mode(name=name, precision=name), status="failed", error=error)


def too_large(name: str) -> Row:
    """A mode of which quality alone is known."""
    return Row(
        mode=Mode(name=name, precision=name),
        status="does not fit",
        error="does not fit: needs 16.1 GB, has 12.0 GB",
        fit=Fit(needs_bytes=16_100_000_000, has_bytes=12_000_000_000),
        quality=quality(Made(name, 16.1)),
    )
