"""One turn of the schedule: one mode from load to figures, in one engine process of its own.

job --plan, turn--> measure(): Host (fresh engine) --loads, Evaluate--> Finished

An engine that had to quantize first is ended when that is done, and another measured: seconds and peak of
loading are those of a start, and the making of a checkpoint is a figure of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from service import ledger
from service.compare.figures import Run
from service.compare.loads import read_run, run_load
from service.compare.plan import Phase, Plan, Rates
from service.compare.power import PowerLog, metered
from service.compare.quality import quality_of
from service.compare.report import Memory, Mode, Model, Quality, Turn
from service.compare.windows import EvaluationText
from service.errors import HalftoneError
from service.front.host import AppFactory, Host, spare_from_collections
from service.front.supervisor import ENGINE_COMMAND
from service.messages import EngineInfo, Loading

Advance = Callable[[str, float], None]  # stage, share of it that is done
POLL_S = 0.2
CALIBRATE, QUANTIZE = "calibrate", "quantize"  # stages of loading; the first also looks into the cache
GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """Everything one turn needs."""

    plan: Plan
    turn: Turn
    mode: Mode
    phases: Sequence[Phase]
    text: EvaluationText
    prompts: list[list[int]]  # token ids: answered greedily by this mode and by the reference
    wants_quality: bool  # once in a mode: weights are the same in every repeat
    out: Path
    app_factory: AppFactory
    command: Sequence[str] = ENGINE_COMMAND


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine told of itself."""

    model: Model
    precision: str  # canonical
    device: str
    device_name: str
    torch_version: str
    dtype: str
    kv_dtype: str
    kernels: dict[str, str]
    calibration: dict[str, str]


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """What a turn's file holds. Another server has runs alone."""

    turn: Turn
    runs: dict[str, Run]  # id of the phase -> its figures
    served: Served | None = None
    memory: Memory | None = None
    stages: dict[str, float] = msgspec.field(default_factory=dict)  # of loading -> seconds
    quantize_seconds: float = 0.0
    quality: Quality | None = None
    quality_seconds: float = 0.0
    seconds: float = 0.0


async def measure(job: Job, advance: Advance) -> Finished:
    """One turn. Raises HalftoneError; the engine is gone when this returns or raises."""
    started_s = time.monotonic()
    if job.mode.server:
        runs = await drive(job, job.mode.server, "", advance, None)
        return Finished(turn=job.turn, runs=runs, seconds=time.monotonic() - started_s)
    async with contextlib.AsyncExitStack() as engines:
        host = await engines.enter_async_context(fresh_host(job))
        info = await wait_ready(host, advance)
        quantize_seconds = seconds_quantizing(info)
        if quantize_seconds:
            await engines.aclose()
            host = await engines.enter_async_context(fresh_host(job))
            info = await wait_ready(host, advance)
        process = host.supervisor.process
        power = engines.enter_context(metered(info.device_uuid))
        runs = await drive(job, host.url, host.settings.name, advance, power)
        memory = memory_of(host, info)
        quality_started_s = time.monotonic()
        quality = await evaluate(job, host, advance) if job.wants_quality else None
        ended_s = time.monotonic()
        if host.supervisor.process is not process:  # another engine has answered since
            raise HalftoneError("the engine died while it was measured, and was started again")
    return Finished(
        turn=job.turn,
        runs=runs,
        served=served_of(job, info),
        memory=memory,
        stages=info.load_seconds,
        quantize_seconds=quantize_seconds,
        quality=quality,
        quality_seconds=ended_s - quality_started_s if quality else 0.0,
        seconds=time.monotonic() - started_s,
    )


def fresh_host(job: Job) -> Host:
    plan = job.plan
    return Host(
        plan.settings_of(job.mode),
        plan.path_of(job.mode),
        job.app_factory,
        command=job.command,
        metrics_host=plan.metrics_host,
    )


def served_of(job: Job, info: EngineInfo) -> Served:
    model = Model(
        name=job.plan.settings.name,
        path=str(job.plan.model_path),
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        random_weights=info.random_weights,
    )
    return Served(
        model=model,
        precision=info.precision,
        device=info.device,
        device_name=info.device_name,
        torch_version=info.torch_version,
        dtype=info.dtype,
        kv_dtype=info.kv_dtype,
        kernels=info.kernels,
        calibration=info.calibration,
    )


async def look(job: Job, advance: Advance) -> Rates:
    """What the reference can answer with the most streams, from an engine that is not measured -> the rates.

    It also makes what first starts make (compiled kernels, files in the system's cache), so that no measured
    engine is the first.
    """
    host = fresh_host(job)
    phase = job.plan.closed_phases[-1]
    raw = job.out / job.plan.turn_file(job.turn, phase)
    async with host:
        await wait_ready(host, advance)
        advance("look", 0.5)
        options = job.plan.options
        await run_load(host.url, host.settings.name, phase, options.output_tokens, options.prompts, raw)
    return job.plan.settle(read_run(raw, job.turn, phase, None, None).requests_per_s)


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
        info = ready.result()
        spare_from_collections()
        return info
    finally:
        ready.cancel()


def seconds_quantizing(info: EngineInfo) -> float:
    """What this engine spent on making its checkpoint, calibration included; 0 where it found one."""
    if QUANTIZE not in info.load_seconds:
        return 0.0
    return sum(info.load_seconds.get(stage, 0.0) for stage in (CALIBRATE, QUANTIZE))


async def drive(job: Job, url: str, model: str, advance: Advance, power: PowerLog | None) -> dict[str, Run]:
    """Every phase of load in turn -> their figures, by the phase's id."""
    options = job.plan.options
    runs = {}
    async with contextlib.AsyncExitStack() as watch:
        if power is not None:
            await power.watch_idle()
            await watch.enter_async_context(power.running())
        for place, phase in enumerate(job.phases):
            advance("traffic", place / len(job.phases))
            raw = job.out / job.plan.turn_file(job.turn, phase)
            await run_load(
                *(url, model, phase, options.output_tokens, options.prompts, raw),
                is_ours=not job.mode.server,
            )
            runs[phase.id] = read_run(raw, job.turn, phase, options.slo, power)
    return runs


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
    """Perplexity, divergence and greedy answers against the reference; the beginnings of windows by decode
    too."""
    modes: list[Literal["prefill", "decode1", "decode8"]] = ["prefill", "decode1", "decode8"]
    reference = job.plan.reference
    evaluated = await host.client.evaluate(
        job.text.windows,
        modes,
        decode_tokens=job.plan.options.agreement_tokens,
        reference=reference.precision,
        # the weights that divergence is from are the model's, whatever this mode serves
        reference_path=str(job.plan.model_path) if job.mode.checkpoint else "",
        # of the reference too: where its decode parts from its own prefill is the floor of the others' figure
        prompts=job.prompts,
        greedy_tokens=GREEDY_TOKENS,
        progress=lambda message: advance("quality", message.done / max(message.total, 1)),
    )
    return quality_of(evaluated)
