"""16-bit linears of many rows on Llama-3.1-8B's shapes: w16_tile.cu beside cuBLAS and our gated_silu, alone and held.

python docs/experiments/w16_tile.py --out FOLDER [--rows 1024,512,768,2048] [--seconds 85]

Alone: microseconds in CUDA graphs with weights rotated past the L2, dependent launches. Held: the best of each kind and
cuBLAS in turn, each replayed for 1.5 s, so that the clock is what the board's power allows: microseconds, joules, watts, MHz.
Checked against float64 with poisoned outputs, on a ragged shape too, and for the same bits after all that was timed.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from w16_tile_variants import IN_FLOAT16, all_variants, compile_all
from workers import measure, read_lines, work

ROWS = (1024, 512, 768, 2048)  # what is to be known first
LAYER = ("qkv", "o", "gate_up", "down")


def list_tasks(all_rows: list[int]) -> list[dict[str, Any]]:
    """Each with its kind and rows."""
    tasks: list[dict[str, Any]] = [
        {"kind": "ragged", "rows": 0, "variant": i} for i in range(len(all_variants()))
    ]
    for rows in all_rows:
        tasks.append({"kind": "cublas", "rows": rows})
        tasks += [{"kind": "own", "rows": rows, "variant": i} for i in range(len(IN_FLOAT16))]
    for rows in all_rows:
        tasks += [{"kind": "held", "rows": rows}, {"kind": "held", "rows": rows, "layer": 1}]
    return tasks


def report_wrong(results: list[dict[str, Any]]) -> None:
    for r in results:
        name = all_variants()[r["variant"]].label if "variant" in r else f"{r['kind']} {r.get('layer', '')}"
        if "failed" in r or not r.get("right", True):
            print(f"WRONG {name} M={r['rows']}: {r.get('failed') or r['error']}")
    ragged = {all_variants()[r["variant"]].label: r["blocks"] for r in results if "blocks" in r}
    print("blocks:", "; ".join(f"{label} {blocks}" for label, blocks in ragged.items()))


def report_alone(results: list[dict[str, Any]]) -> None:
    print(
        f"alone, microseconds\n{'M':>4} {'qkv':>6} {'o':>6} {'gate_up':>7} {'down':>6} {'four':>7} {'gated':>7}"
    )
    for rows in dict.fromkeys(r["rows"] for r in results if "us" in r):
        here = [r for r in results if r["rows"] == rows and "us" in r and r.get("right", True)]
        plain = []
        for r in here:
            us = r["us"]
            if "variant" not in r:
                name, gated = f"cuBLAS; gated_silu {us['gated_silu']:.1f}", us["gated"]
            else:
                variant = all_variants()[r["variant"]]
                name, gated = variant.label, us["gate_up"] if variant.gated else None
            told = ""
            if gated is None or "variant" not in r:
                four = sum(us[shape] for shape in LAYER)
                told = f"{us['qkv']:6.1f} {us['o']:6.1f} {us['gate_up']:7.1f} {us['down']:6.1f} {four:7.1f}"
                plain += [r] * ("variant" in r)
            print(f"{rows:4} {told:36} {'' if gated is None else f'{gated:.1f}':>7} {name}")
        if plain:
            best = sum(min(r["us"][shape] for r in plain) for shape in LAYER)
            print(f"{rows:4} ours, best of each shape: {best:.1f}")


def report_held(results: list[dict[str, Any]]) -> None:
    print(f"held\n{'M':>4} {'what':>7} {'us':>7} {'mJ':>7} {'W':>5} {'MHz':>5}  each round's us")
    for r in results:
        for name, rounds in r.get("held", {}).items():
            us, joules, watts, mhz = (
                statistics.mean(one[key] for one in rounds) for key in ("us", "joules", "watts", "mhz")
            )
            each = ", ".join(f"{one['us']:.1f}" for one in rounds)
            what = "layer" if r.get("layer") else "gate_up"
            print(
                f"{r['rows']:4} {what:>7} {us:7.1f} {joules * 1e3:7.1f} {watts:5.0f} {mhz:5.0f}  {name} ({each})"
            )


def report(folder: Path, machine: str) -> None:
    tasks = json.loads((folder / "tasks.json").read_text())
    results = [{**tasks[line["task"]], **line} for line in read_lines(folder / "results.jsonl")]
    told = {"machine": machine, "variants": [v.label for v in all_variants()], "results": results}
    (folder / "w16_tile.json").write_text(json.dumps(told, indent=1))
    if len(results) < len(tasks):
        print(f"{len(tasks) - len(results)} of {len(tasks)} tasks had no time")
    report_wrong(results)
    report_alone(results)
    report_held(results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--rows", default=",".join(map(str, ROWS)), help="at most 2048, in the order of interest"
    )
    parser.add_argument("--seconds", type=int, default=85, help="of the device, compilation included")
    parser.add_argument("--work", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if arguments.work:
        from w16_tile_worker import Worker

        work(folder, Worker(folder).run)
        return
    tasks = list_tasks([int(rows) for rows in arguments.rows.split(",")])
    machine = measure(Path(__file__), folder, tasks, compile_all, arguments.seconds)
    report(folder, machine)


if __name__ == "__main__":
    main()
