"""The load generator's JSON as the report has it."""

import json
from pathlib import Path

from service.compare.loads import read_run
from service.compare.plan import Phase
from service.compare.report import Turn
from tests.compare.fake_load import write_raw

PHASE = Phase("closed-1", concurrency=1, rate_per_s=0.0, num_requests=3, num_warmup=1, seed=7)
TURN = Turn(order=0, repeat=0, mode="nf4")


def test_what_the_server_counts_otherwise_stays_with_the_run(tmp_path: Path) -> None:
    """The generator ends with 4 then, which is a result and not a failure."""
    raw = tmp_path / "raw.json"
    write_raw(raw, PHASE)
    assert read_run(raw, TURN, PHASE, None, None).disagreements == []
    result = json.loads(raw.read_bytes())
    result["levels"][0]["runs"][0]["server_check"]["figures"] = {
        "output tokens": {"client": 96, "server": 96.0, "difference": 0.0, "agrees": True},
        "sum of TTFT, s": {"client": 2.0, "server": 1.8, "difference": -0.1, "agrees": False},
    }
    raw.write_text(json.dumps(result))
    assert read_run(raw, TURN, PHASE, None, None).disagreements == [
        "sum of TTFT, s: the server counts -10.0 %"
    ]
