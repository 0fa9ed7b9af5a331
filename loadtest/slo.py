"""A service level -> the requests that met it, and how many of these came a second: goodput.

`--slo ttft=500ms,itl=30ms` --Slo.parse()--> goodput(), once for every run

A request meets a level when it meets every limit in it. A failed request met none: an answer that never came
was not in time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.statistics import Record, percentile

FIGURES = ("ttft", "itl", "tpot", "e2e")
ITL_PERCENT = 95.0  # of a request's gaps that a limit on ITL is for: a reader notices pauses, not the mean
LIMIT = re.compile(r"([a-z0-9]+)=([0-9]*\.?[0-9]+)(ms|s)")
SECONDS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """Limits in seconds, each on one figure of a request; `ttft`, `itl` (its p95), `tpot`, `e2e`."""

    limits_s: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """`ttft=500ms,itl=30ms` -> the Slo. Raises LoadTestError."""
        limits_s: dict[str, float] = {}
        for part in text.split(","):
            found = LIMIT.fullmatch(part.strip().lower())
            if found is None or found[1] not in FIGURES or found[1] in limits_s or not float(found[2]):
                raise LoadTestError(
                    f"`--slo` {text}: `{part.strip()}` is not a limit, or is the second one on its figure",
                    hint=f"one of {', '.join(FIGURES)}, and a time: `ttft=500ms,itl=30ms`",
                )
            limits_s[found[1]] = float(found[2]) * SECONDS[found[3]]
        return cls(limits_s)

    def __str__(self) -> str:
        return ",".join(f"{figure}={1e3 * limit_s:g}ms" for figure, limit_s in self.limits_s.items())

    def missed(self, record: Record) -> list[str]:
        """-> the figures of one request that are over their limit; all of them where it failed."""
        if not record.ok:
            return list(self.limits_s)
        return [name for name, limit_s in self.limits_s.items() if figure_s(record, name) > limit_s]


def figure_s(record: Record, name: str) -> float:
    """One figure of an answered request, in seconds; an answer of one token has ITL and TPOT 0."""
    if name == "itl":
        gaps_s = record.gaps_s()
        return percentile(gaps_s, ITL_PERCENT) if gaps_s else 0.0
    if name == "tpot":
        return record.tpot_s or 0.0
    return record.ttft_s if name == "ttft" else record.e2e_s


def goodput(measured: Sequence[Record], slo: Slo, window_s: float) -> dict[str, Any]:
    """The requests of one run that count, and the seconds it took -> what met the level."""
    missed = [slo.missed(record) for record in measured]
    good = [record for record, names in zip(measured, missed, strict=True) if not names]
    return {
        "slo": str(slo),
        "num_measured": len(measured),
        "num_good": len(good),
        "good_share": len(good) / len(measured) if measured else 0.0,
        "requests_per_s": len(good) / window_s if window_s else 0.0,
        "output_tokens_per_s": sum(record.output_tokens for record in good) / window_s if window_s else 0.0,
        "missed": {name: sum(name in names for names in missed) for name in slo.limits_s},
    }
