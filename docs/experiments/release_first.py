"""Triton's kernels release their successor before they wait for their predecessor, or after, as they do: decode steps of both.

python docs/experiments/release_first.py --out FOLDER [--precisions fp16,awq] [--streams 1,16,64]

Released early, a linear's blocks take their places and ask for weights while the kernel before the norm still drains. What
they read before their own wait no kernel writes, and whom they wait for has waited for all before it. The code is changed in
a copy of it, and each engine's table printed: read `decode step`.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("service", "loadtest", "tests")
AFTER = "        gdc_wait()\n        gdc_launch_dependents()\n"
BEFORE = "        gdc_launch_dependents()\n        gdc_wait()\n"


def changed_copy(folder: Path) -> Path:
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)
    source = folder / "service" / "kernels" / "launch.py"
    text = source.read_text()
    assert text.count(AFTER) == 1
    source.write_text(text.replace(AFTER, BEFORE))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precisions", default="fp16,awq")
    parser.add_argument("--streams", default="1,16,64")
    arguments = parser.parse_args()
    trees = {"after, as served": ROOT, "before": changed_copy((arguments.out / "released-first").absolute())}
    for precision in arguments.precisions.split(","):
        for name, tree in trees.items():
            print(f"\n{precision}, released {name}", flush=True)
            command = [sys.executable, "-m", "tests.benchmarks.engine_steps", "--precision", precision]
            command += ["--streams", arguments.streams, "--rounds", "1"]
            inherited = os.environ.get("PYTHONPATH", "")
            paths = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{inherited}" if inherited else str(tree)}
            subprocess.run(command, cwd=tree, env=paths, check=True)


if __name__ == "__main__":
    main()
