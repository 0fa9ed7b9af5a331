"""One precision from load to quality, in one engine process: a Row, or why there is none.

job --plan, place--> Host (fresh engine) --loads, Evaluate--> Row

An engine that had to quantize first is ended when that is done, and another measured: seconds and peak of
loading are those of a start, and the making of a checkpoint is a figure of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, expm1
from pathlib import Path
from typing import Literal

from service import ledger
from service.compare.figures import Interval, Level
from service.compare.loads import run_load
from service.compare.plan import Plan
from service.compare.report import (
    Agreement,
    Apart,
    Memory,
    Mode,
    Model,
    Quality,
    Row,
)
from service.compare.report import (
    Loading as LoadTime,
)
from service.compare.windows import EvaluationText
from service.errors import HalftoneError
from service.front.host import AppFactory, Host
from service.front.supervisor import ENGINE_COMMAND
from service.messages import EngineInfo, Evaluated, Loading

Advance = Callable[[str, float], None]  # stage, share of it that is done
POLL_S = 0.2
CALIBRATE, QUANTIZE = "calibrate", "quantize"  # stages of loading; the first also looks into the cache
STAGES = {
    "prepare": 20.0,
    "load": 8.0,
    "traffic": 20.0,
    "quality": 50.0,
}  # rough seconds each, for the bar only


@dataclass(frozen=True)
class Job:
    """Everything one row needs; `rate_per_s` is 0 until a mode has settled it."""

    plan: Plan
    place: int
    text: EvaluationText
    rate_per_s: float
    out: Path
    app_factory: AppFactory
    command: Sequence[str] = ENGINE_COMMAND

    @property
    def precision(self) -> str:
        return self.plan.precisions[self.place]


@dataclass(frozen=True)
class Measured:
    """A row with what it settles for the report and for the rows after it."""

    row: Row
    model: Model | None = None
    device: str = ""
    device_name: str = ""
    torch_version: str = ""
    rate_per_s: float = 0.0


async def measure(job: Job, advance: Advance) -> Measured:
    """One mode in a fresh engine. Raises HalftoneError; the engine is gone when this returns or raises."""
    started_s = time.monotonic()
    settings = job.plan.settings.model_copy(update={"precision": job.precision})

    def fresh_host() -> Host:
        return Host(
            settings,
            job.plan.model_path,
            job.app_factory,
            command=job.command,
            metrics_host=job.plan.metrics_host,
        )

    async with contextlib.AsyncExitStack() as engines:
        host = await engines.enter_async_context(fresh_host())
        info = await wait_ready(host, advance)
        quantize_seconds = seconds_quantizing(info)
        if quantize_seconds:
            await engines.aclose()
            host = await engines.enter_async_context(fresh_host())
            info = await wait_ready(host, advance)
        process = host.supervisor.process
        levels, rate_per_s = await drive(job, host, settings.name, advance)
        memory = memory_of(host, info)
        quality = await evaluate(job, host, advance)
        if host.supervisor.process is not process:  # another engine has answered since
            raise HalftoneError("the engine died while it was measured, and was started again")
    seconds_to_load = sum(info.load_seconds.values())
    row = Row(
        mode=Mode(name=job.precision, precision=info.precision, kv_dtype=settings.kv_dtype),
        status="ok",
        num_repeats=1,
        memory=memory,
        quality=quality,
        loading=LoadTime(
            seconds=Interval(estimate=seconds_to_load, low=None, high=None, n=1),
            stages=info.load_seconds,
            quantize_seconds=quantize_seconds,
        ),
        levels=levels,
        dtype=info.dtype,
        kv_dtype=info.kv_dtype,
        kernels=info.kernels,
        calibration=info.calibration,
        seconds=time.monotonic() - started_s,
    )
    model = Model(
        name=settings.name,
        path=str(job.plan.model_path),
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        random_weights=info.random_weights,
    )
    return Measured(row, model, info.device, info.device_name, info.torch_version, rate_per_s)


async def wait_ready(host: Host, advance: Advance) -> EngineInfo:
    """Shows the stages of loading until the engine is ready; one that quantizes only prepares."""
    stage = "load"
    ready = asyncio.create_task(host.ready())
    try:
        while not ready.done():
            loading: Loading | None = host.client.loading
            if loading is not None:
                stage = "prepare" if loading.stage == QUANTIZE else stage
                advance(stage, loading.done / max(loading.total, 1))
            await asyncio.wait({ready}, timeout=POLL_S)
        return ready.result()
    finally:
        ready.cancel()


def seconds_quantizing(info: EngineInfo) -> float:
    """What this engine spent on making its checkpoint, calibration included; 0 where it found one."""
    if QUANTIZE not in info.load_seconds:
        return 0.0
    return sum(info.load_seconds.get(stage, 0.0) for stage in (CALIBRATE, QUANTIZE))


async def drive(job: Job, host: Host, model: str, advance: Advance) -> tuple[list[Level], float]:
    """Every phase of load in turn -> their figures, and the open loop's rate."""
    options, phases = job.plan.options, job.plan.phases
    rate_per_s = options.rate_per_s or job.rate_per_s
    levels: list[Level] = []
    for place, phase in enumerate(phases):
        advance("traffic", place / len(phases))
        if not phase.concurrency and not rate_per_s:
            rate_per_s = round(levels[-1].runs[0].requests_per_s / 2, 3)
        raw = job.out / job.plan.load_file(job.place, phase)
        level = await run_load(
            host.url, model, phase, rate_per_s, options.output_tokens, options.prompts, raw
        )
        if not level.runs[0].num_ok:
            reasons = "; ".join(level.runs[0].errors) or "no request was answered"
            raise HalftoneError(f"load phase `{phase.id}` got no answer: {reasons}")
        levels.append(level)
    return levels, rate_per_s


def memory_of(host: Host, info: EngineInfo) -> Memory:
    """Ledger and peaks as the engine last reported them, after load and before quality is computed."""
    parts, peaks = (
        {label: int(size) for (label,), size in host.metrics.numbers(name).items()}
        for name in ("halftone_memory_bytes", "halftone_memory_peak_bytes")
    )
    parts = parts or info.memory_bytes
    kv_bytes = ledger.kv_bytes(parts)
    # a system that cannot begin a new peak after loading reports only the one until then
    peak = max((size for phase, size in peaks.items() if phase != "load"), default=info.peak_load_bytes)
    return Memory(
        weight_bytes=ledger.weight_bytes(parts) or info.weight_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=info.kv_tokens,
        # one block more than can be filled: padding writes go there
        kv_bytes_per_token=kv_bytes / (info.kv_tokens + info.kv_block_tokens),
        peak_load_bytes=info.peak_load_bytes,
        peak_bytes=peak,
        peak_without_kv_bytes=peak - kv_bytes,
        parts=parts,
    )


async def evaluate(job: Job, host: Host, advance: Advance) -> Quality:
    """Perplexity and divergence over the whole text by prefill, and its windows' beginnings by decode too."""
    modes: list[Literal["prefill", "decode1", "decode8"]] = ["prefill", "decode1", "decode8"]
    evaluated = await host.client.evaluate(
        job.text.windows,
        modes,
        decode_tokens=job.plan.options.agreement_tokens,
        reference=job.plan.reference,
        progress=lambda message: advance("quality", message.done / max(message.total, 1)),
    )
    return Quality(
        perplexity=perplexity(evaluated, "prefill"),
        tokens=evaluated.tokens["prefill"],
        kl_mean=evaluated.kl_mean,
        kl_tokens=evaluated.kl_tokens,
        top1_agreement=evaluated.top1_agreement,
        agreement=agreement_of(evaluated),
    )


def perplexity(evaluated: Evaluated, mode: str) -> float:
    """exp(mean negative log-likelihood)."""
    return exp(evaluated.nll[mode] / evaluated.tokens[mode])


def agreement_of(evaluated: Evaluated) -> Agreement:
    """Three perplexities of the same tokens -> how far decode is from prefill, and how sure that is.

    Prefill scored more tokens than decode did; of those that both did, the pairs tell its share. Raises
    HalftoneError where the modes scored different numbers of tokens: that compares nothing.
    """
    pairs = [evaluated.paired[mode] for mode in ("decode1", "decode8")]
    counts = {evaluated.tokens["decode1"], evaluated.tokens["decode8"], *(pair.tokens for pair in pairs)}
    if len(counts) != 1:
        raise HalftoneError(f"prefill and decode scored different tokens: {evaluated.tokens}")
    decode1, decode8 = (perplexity(evaluated, mode) for mode in ("decode1", "decode8"))
    prefill = decode1 * exp(-pairs[0].mean)
    # exp(mean) is the ratio of the perplexities, and also what a small error of the mean is multiplied by
    apart1, apart8 = (
        Apart(change=expm1(pair.mean), standard_error=exp(pair.mean) * pair.standard_error) for pair in pairs
    )
    return Agreement(
        tokens=counts.pop(),
        prefill=prefill,
        decode1=decode1,
        decode8=decode8,
        decode1_apart=apart1,
        decode8_apart=apart8,
        disagreement=max(abs(apart1.change), abs(apart8.change)),
        agrees=not (apart1.is_flagged or apart8.is_flagged),
    )
