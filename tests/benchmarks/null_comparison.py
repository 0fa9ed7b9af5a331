"""What `halftone compare` finds where the truth is known: nothing, and 5 % less speed.

    python -m tests.benchmarks.null_comparison [--comparisons 20] [--slower 1.05] [--step-ms 20]

Each comparison is a whole run of compare, by the real front, load generator and clock, over engines that
compute nothing and sleep through their steps: `bf16`, itself again, and `int8`, which takes 1.05 times as
long for each step. Printed: how often the null comparison's interval excludes 1, and how often the slower
mode is found.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from service.api.app import create_app
from service.compare.job import run_compare
from service.compare.modes import parse_modes
from service.compare.options import CompareOptions, parse_levels
from service.compare.report import Report, Row
from service.config import load_settings
from tests.tiny_tokenizers import write_bare_model

FAKE_ENGINE = (sys.executable, str(Path(__file__).resolve().parents[1] / "fake_engine.py"))
FIGURES = (("output_tokens_per_s", "closed-4"), ("tpot_p50_s", "closed-4"), ("e2e_p50_s", "closed-4"))


def comparison(folder: Path, seed: int) -> Report:
    """One run of compare; its prompts and order follow from `seed`."""
    model = folder / "model"
    return run_compare(
        load_settings(model=str(model), cache_dir=folder / "cache"),
        model,
        parse_modes("bf16,int8"),
        folder / str(seed),
        CompareOptions(
            precisions="",
            levels=parse_levels("4,10/s"),
            output_tokens=32,
            open_s=0.0,
            minutes=60.0,
            kv_tokens=65_536,
            window_tokens=33,
            agreement_tokens=128,
            seed=seed,
        ),
        app_factory=create_app,
        console=Console(file=io.StringIO()),
        command=FAKE_ENGINE,
    )


def said(row: Row) -> str:
    found = (row.ratio(*figure) for figure in FIGURES)
    return ", ".join(f"{one.estimate:.4f} ({one.low:.4f} to {one.high:.4f})" for one in found if one)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--slower", type=float, default=1.05)
    parser.add_argument("--step-ms", type=float, default=20.0)
    options = parser.parse_args()
    os.environ["FAKE_STEP_MS"] = str(options.step_ms)
    os.environ["FAKE_SLOWER"] = f"int8:{options.slower}"
    beyond = dict.fromkeys(FIGURES, 0)
    found = dict.fromkeys(FIGURES, 0)
    with tempfile.TemporaryDirectory() as folder:
        write_bare_model(Path(folder) / "model")
        for seed in range(options.comparisons):
            started_s = time.monotonic()
            report = comparison(Path(folder), seed)
            assert report.null
            null, slower = report.null.row, report.rows[1]
            for figure in FIGURES:
                beyond[figure] += bool((ratio := null.ratio(*figure)) and ratio.excludes(1.0))
                found[figure] += bool((ratio := slower.ratio(*figure)) and ratio.excludes(1.0))
            print(
                f"{seed + 1}: {null.num_repeats} repeats, {time.monotonic() - started_s:.0f} s, load average "
                f"{os.getloadavg()[0]:.1f}\n   null {said(null)}\n   slow {said(slower)}",
                flush=True,
            )
    for figure in FIGURES:
        print(
            f"{figure[0]}: of {options.comparisons}, the null comparison differs in {beyond[figure]}, and "
            f"{options.slower:g} times slower steps are found in {found[figure]}"
        )


if __name__ == "__main__":
    main()
