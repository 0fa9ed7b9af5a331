"""Load and engines without a clock: requests at times that a mode's speed and a seed decide.

`write_raw()` leaves the file that `python -m loadtest` would; `FakeTurns` stands in for a whole turn.
"""

import dataclasses
import json
import random
from pathlib import Path

from loadtest.check import unchecked
from loadtest.statistics import Record, summarize
from service.compare.figures import Interval
from service.compare.loads import read_run
from service.compare.mode import Advance, Finished, Job, Served
from service.compare.plan import Phase, Rates
from service.compare.report import Agreement, Apart, Memory, Model, Quality
from service.errors import HalftoneError

TOKENS = 4
REQUEST_S = 0.1


def write_raw(raw: Path, phase: Phase, slowness: float = 1.0, noise: float = 0.0, draw: str = "") -> None:
    """Requests one after another in each stream, or at their times; `slowness` stretches every answer."""
    chance = random.Random(f"{draw}:{phase.seed}")
    lengths = random.Random(f"{phase.seed}")  # the same prompts whatever the mode
    run_factor = slowness * chance.lognormvariate(0, noise)
    records, due_s = [], 0.0
    for index in range(phase.num_warmup + phase.num_requests):
        taken_s = REQUEST_S * run_factor * lengths.lognormvariate(0, 0.2) * chance.lognormvariate(0, noise)
        record = Record(index, scheduled_s=due_s, warmup=index < phase.num_warmup, counted_by="server")
        step_s = taken_s / TOKENS
        record.arrivals = [(due_s + step_s * (place + 1), place + 1) for place in range(TOKENS)]
        record.finished_s, record.sent_s = due_s + taken_s, due_s
        record.output_tokens = record.asked_tokens = TOKENS
        record.prompt_tokens, record.finish_reason = 6, "length"
        records.append(record)
        due_s += taken_s / phase.concurrency if phase.concurrency else 1 / phase.rate_per_s
    run = {
        "seed": phase.seed,
        "monotonic_s": 0.0,
        "summary": summarize(records),
        "client": {"cpu_share": 0.01, "lag_s": None},
        "server_check": unchecked("no server"),
        "requests": [dataclasses.asdict(record) for record in records],
    }
    raw.write_text(json.dumps({"levels": [{"runs": [run]}]}))


async def fake_run_load(
    url: str, model: str, phase: Phase, tokens: int, prompts: str, raw: Path, **rest: object
) -> None:
    """As `loads.run_load`, without a generator."""
    write_raw(raw, phase)


def quality(perplexity: float, ratio: float, kl: float) -> Quality:
    apart = Apart(change=0.0, standard_error=0.001, num_windows=8)
    near = 0.01
    return Quality(
        perplexity=perplexity,
        tokens=256,
        kl_mean=kl,
        kl_tokens=256,
        top1_agreement=0.9,
        agreement=Agreement(
            tokens=128,
            prefill=perplexity,
            decode1=perplexity,
            decode8=perplexity,
            decode1_apart=apart,
            decode8_apart=apart,
            disagreement=0.0,
            agrees=True,
        ),
        perplexity_ratio=Interval(estimate=ratio, low=ratio - near, high=ratio + near, n=8),
        reference_perplexity=20.0,
        kl=Interval(estimate=kl, low=kl * 0.9, high=kl * 1.1, n=8),
    )


@dataclasses.dataclass
class Behaviour:
    """What a mode of FakeTurns does."""

    slowness: float = 1.0
    weight_bytes: int = 268_000_000
    perplexity_ratio: float = 1.0
    kl: float = 0.0
    fault: BaseException | None = None
    fault_from: int = 0  # repeat


class FakeTurns:
    """`measure` and `look` of a machine with known speeds; remembers what it was asked."""

    def __init__(self, noise: float = 0.0, seed: int = 0, **modes: Behaviour) -> None:
        self.modes, self.noise, self.seed = modes, noise, seed
        self.asked: list[tuple[str, int]] = []
        self.looked: list[str] = []
        self.with_quality: list[str] = []

    def behaviour(self, mode: str) -> Behaviour:
        return self.modes.get(mode.partition(" ")[0], Behaviour())

    async def look(self, job: Job, advance: Advance) -> Rates:
        self.looked.append(job.mode.name)
        self.fail(job)
        return job.plan.settle(10.0)

    def fail(self, job: Job) -> None:
        behaviour = self.behaviour(job.mode.name)
        if behaviour.fault is not None and max(job.turn.repeat, 0) >= behaviour.fault_from:
            raise behaviour.fault

    async def measure(self, job: Job, advance: Advance) -> Finished:
        self.asked.append((job.mode.name, job.turn.repeat))
        if job.wants_quality:
            self.with_quality.append(job.mode.name)
        self.fail(job)
        behaviour = self.behaviour(job.mode.name)
        runs = {}
        for phase in job.phases:
            advance("traffic", 0.5)
            raw = job.out / job.plan.turn_file(job.turn, phase)
            write_raw(raw, phase, behaviour.slowness, self.noise, f"{self.seed}:{job.mode.name}")
            runs[phase.id] = read_run(raw, job.turn, phase, job.plan.options.slo, None)
        return Finished(
            turn=job.turn,
            runs=runs,
            served=served(job),
            memory=memory(behaviour.weight_bytes),
            stages={"import": 0.1, "load": 0.5},
            quality=quality(20 * behaviour.perplexity_ratio, behaviour.perplexity_ratio, behaviour.kl)
            if job.wants_quality
            else None,
            quality_seconds=1.0 if job.wants_quality else 0.0,
            seconds=2.0,
        )


def served(job: Job) -> Served:
    return Served(
        model=Model(name=job.plan.settings.name, path="/m", architecture="Fake", num_parameters=134_000_000),
        precision=job.mode.precision,
        device="cpu",
        device_name="fake",
        torch_version="none",
        dtype="bf16",
        kv_dtype="bf16",
        kernels={"qkv_proj": "fake_linear"},
        calibration={},
    )


def memory(weight_bytes: int) -> Memory:
    return Memory(
        weight_bytes=weight_bytes,
        kv_bytes=23_040_000,
        kv_tokens=1000,
        kv_bytes_per_token=23_040,
        peak_load_bytes=300_000_000,
        peak_bytes=weight_bytes + 50_000_000,
        peak_without_kv_bytes=weight_bytes + 26_960_000,
        parts={"weights.codes": weight_bytes, "kv.free": 23_040_000},
    )


def no_room() -> HalftoneError:
    return HalftoneError("`int8` has no kernel here", hint="use nf4")
