"""Writes the dashboards: `python deploy/grafana/generate.py`, then commit. With `--check` it writes nothing,
and fails where a file is not what it would write.

precision.py, operations.py --panels--> dashboards/*.json, which Grafana is provisioned with
"""

import json
import sys
from pathlib import Path
from typing import Any

import operations
import precision
from panels import choice, dashboard

FOLDER = Path(__file__).parent / "dashboards"


def boards() -> dict[str, dict[str, Any]]:
    """File name -> dashboard."""
    return {
        "precision.json": dashboard(
            "halftone-precision",
            "Precision side by side",
            "What each precision of a model costs and gives: latency, memory, energy, quality.",
            precision.panels(),
            [],
        ),
        "operations.json": dashboard(
            "halftone-operations",
            "Operations",
            "Health of Halftone's servers: traffic, errors, latency, saturation.",
            operations.panels(),
            [
                # bounds of the buckets, where a share is exact
                choice("ttft_slo", "TTFT within, s", ["0.1", "0.2", "0.5", "1.0", "2.0"], "0.5"),
                choice("tpot_slo", "TPOT within, s", ["0.01", "0.02", "0.05", "0.1", "0.2"], "0.05"),
            ],
        ),
    }


def main() -> int:
    stale = []
    for name, board in boards().items():
        content = json.dumps(board, indent=1, ensure_ascii=False) + "\n"
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(content, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"{', '.join(stale)} is not what deploy/grafana/generate.py writes; run it, and commit")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
