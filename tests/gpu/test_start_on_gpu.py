"""A whole start on a CUDA device, its kernel caches empty. `pytest -m gpu`, by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.model.hub import PRESETS

pytestmark = pytest.mark.gpu

START = """
import json, sys, threading, time
started_at = time.monotonic()
from triton import knobs
from service.engine.startup import start
from service.messages import EngineConfig

compiled = []
knobs.compilation.listener = lambda src, **_: compiled.append((src.name, threading.current_thread().name))
config = EngineConfig(
    model_path=sys.argv[1], precision=sys.argv[2], load_format="random", device="cuda", kv_tokens=65536
)
info = start(config, lambda _: None, started_at).info
heavy = [name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules]
print(json.dumps({"compiled": compiled, "seconds": info.load_seconds, "heavy": heavy}))
"""


@pytest.mark.parametrize("precision", ["fp16", "nf4", "awq", "int8", "fp8"])
def test_all_kernels_are_compiled_ahead(tmp_path: Path, precision: str) -> None:
    """None by the thread that starts the engine, in its checks, first steps or captures: it would wait."""
    paths = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-c", START, str(PRESETS / "llama-3.2-1b"), precision]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    told = json.loads(found.splitlines()[-1])
    print(precision, {stage: round(seconds, 2) for stage, seconds in told["seconds"].items()})
    assert told["heavy"] == []
    assert len(told["compiled"]) > 20
    assert [name for name, thread in told["compiled"] if not thread.startswith("compile")] == []
