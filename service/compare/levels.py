"""Every repeat's requests at one level of load -> the level's figures with intervals, alone and as ratios.

job --Finished of every repeat--> measured_level() --Level--> assemble
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.slo import Slo
from loadtest.statistics import Record
from service.compare.figures import FIGURES, Figures, Interval, Level, Run
from service.compare.loads import counted, one_run
from service.compare.plan import Phase
from service.compare.statistics import Counts, Sample, drawn_counts, estimate, ratio

CURVE_PERCENTS = range(0, 101, 2)
PERCENTS = {"p50": 50.0, "p95": 95.0, "p99": 99.0}


@dataclass(frozen=True)
class Observed:
    """One level in one repeat of one mode."""

    run: Run
    samples: Mapping[str, Sample]  # by name of figure; those that were measured
    gaps_s: Sequence[float]  # between tokens, of every request that counts

    @classmethod
    def read(cls, out: Path, run: Run, slo: Slo | None) -> "Observed":
        """From the file that the load generator left."""
        records = counted(one_run(out / run.raw))
        gaps_s = [gap for record in records if record.ok for gap in record.gaps_s()]
        return cls(run, samples_of(run, records, slo), gaps_s)


def samples_of(run: Run, records: Sequence[Record], slo: Slo | None) -> dict[str, Sample]:
    """One run's requests -> what each figure is made of."""
    done = [record for record in records if record.ok]
    samples = {
        "output_tokens_per_s": Sample.whole(run.output_tokens_per_s),
        "requests_per_s": Sample.whole(run.requests_per_s),
    }
    if slo is not None:
        # the mean over requests of N / window for a good one and 0 for another is the good ones / window
        good = [(not slo.missed(record)) * len(records) / run.window_s for record in records]
        samples["goodput_per_s"] = Sample.of(good, [record.index for record in records], None)
    if run.energy is not None:
        joules = run.energy.joules
        samples["joules_per_output_token"] = Sample.whole(joules / run.output_tokens)
        samples["joules_per_token"] = Sample.whole(joules / (run.prompt_tokens + run.output_tokens))
    values: dict[str, list[tuple[float, int]]] = {
        "ttft": [(record.ttft_s, record.index) for record in done],
        "itl": [(gap, record.index) for record in done for gap in record.gaps_s()],
        "tpot": [(tpot, record.index) for record in done if (tpot := record.tpot_s) is not None],
        "e2e": [(record.e2e_s, record.index) for record in done],
    }
    for name, pairs in values.items():
        for end, percent in PERCENTS.items():
            if pairs:
                numbers, requests = zip(*pairs, strict=True)
                samples[f"{name}_{end}_s"] = Sample.of(numbers, requests, percent)
    return samples


def counts_of(phase: Phase, repeats: Sequence[int]) -> dict[int, Counts]:
    """Repeat -> how often each request is drawn: the same for every mode, so that ratios pair requests."""
    drawn = drawn_counts(phase.num_warmup + phase.num_requests, max(repeats) + 1, phase.seed)
    return {repeat: drawn[repeat] for repeat in repeats}


def measured_level(
    phase: Phase, observed: Mapping[int, Observed], reference: Mapping[int, Observed] | None
) -> Level:
    """By repeat, one mode's observations and the reference's (None: it is the reference, or there is none).

    A ratio is over the repeats that both have.
    """
    repeats = sorted(observed)
    counts = counts_of(phase, repeats)
    shared = [repeat for repeat in repeats if reference and repeat in reference]
    gaps_s = [gap for one in observed.values() for gap in one.gaps_s]
    return Level(
        id=phase.id,
        concurrency=phase.concurrency,
        rate_per_s=phase.rate_per_s,
        num_requests=phase.num_requests,
        num_warmup=phase.num_warmup,
        runs=[observed[repeat].run for repeat in repeats],
        figures=Figures(
            **{
                name: estimate(list(found.values()), [counts[r] for r in repeats])
                for name in FIGURES
                if (found := samples_named(name, observed, repeats))
            }
        ),
        ratios=ratios(observed, reference, shared, counts) if reference and shared else None,
        itl_curve_s=np.percentile(gaps_s, list(CURVE_PERCENTS)).tolist() if gaps_s else [],
    )


def ratios(
    observed: Mapping[int, Observed],
    reference: Mapping[int, Observed],
    repeats: Sequence[int],
    counts: Mapping[int, Counts],
) -> Figures:
    """Every figure against the reference's, over the same repeats."""
    return Figures(
        **{
            name: ratio(list(mine.values()), list(theirs.values()), [counts[r] for r in repeats])
            for name in FIGURES
            if (mine := samples_named(name, observed, repeats))
            and (theirs := samples_named(name, reference, repeats))
        }
    )


def samples_named(
    name: str, observed: Mapping[int, Observed], repeats: Sequence[int]
) -> dict[int, Sample] | None:
    """Repeat -> one figure's sample; None where a repeat lacks it."""
    found = {repeat: observed[repeat].samples.get(name) for repeat in repeats}
    known = {repeat: sample for repeat, sample in found.items() if sample is not None}
    return known if len(known) == len(repeats) else None


def one_ratio(
    phase: Phase, figure: str, observed: Mapping[int, Observed], other: Mapping[int, Observed]
) -> Interval | None:
    """One figure of any two modes at one level; None where no repeat has both."""
    shared = sorted(repeat for repeat in observed if repeat in other)
    mine, theirs = (samples_named(figure, side, shared) for side in (observed, other))
    if not (shared and mine and theirs):
        return None
    counts = counts_of(phase, shared)
    return ratio(list(mine.values()), list(theirs.values()), list(counts.values()))
