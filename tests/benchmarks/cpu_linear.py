"""Microseconds of every linear of a model on this CPU, by precision and by rows: docs/cpu-kernels.md.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 .venv/bin/python -m tests.benchmarks.cpu_linear [--rows 1,8,64,512]

Each layer class is built as often as the model has layers and the copies are called in turn, so that weights
come from memory as they do in a server. All modes run in turns inside one process; the least of the rounds
counts, and what is printed is the sum over all layers, in milliseconds a step.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from service.kernels.awq_linear import cpu
from service.kernels.awq_linear.reference import pack
from service.precision import load_backend
from service.precision.base import LinearGroup, LinearSpec

LAYERS = 30
GROUP = 64
SHAPES = {"qkv_proj": (576, 960), "o_proj": (576, 576), "gate_up_proj": (576, 3072), "down_proj": (1536, 576)}
MODES = ("bf16", "int8", "int8:threshold=0", "nf4", "nf4:double_quant=off", "awq")
Layer = Callable[[Tensor], Tensor]


def tensors(in_features: int, out_features: int) -> dict[str, Tensor]:
    """Random weights of one linear, 16-bit and in AutoAWQ's layout."""
    groups = in_features // GROUP
    return {
        "linear.weight": (torch.randn(out_features, in_features) * 0.05).bfloat16(),
        "linear.qweight": pack(torch.randint(0, 16, (in_features, out_features))),
        "linear.qzeros": pack(torch.randint(0, 16, (groups, out_features))),
        "linear.scales": (torch.rand(groups, out_features) * 0.01).half(),
    }


def build(mode: str, name: str) -> list[Layer]:
    """One layer class of the model; AWQ's two CPU paths are told apart by `awq/packed`, `awq/dequantized`."""
    in_features, out_features = SHAPES[name]
    parts = (LinearSpec("linear", in_features, out_features),)
    group = LinearGroup(name, parts, torch.device("cpu"), torch.bfloat16)
    backend = load_backend(mode)
    return [backend.build(group, tensors(in_features, out_features).__getitem__) for _ in range(LAYERS)]


def step_milliseconds(layers: list[Layer], x: Tensor) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,512")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    columns = [*MODES, "awq/packed", "awq/dequantized"]
    least = {(count, column): 0.0 for count in rows for column in columns}
    for name, (in_features, _) in SHAPES.items():
        built = {mode: build(mode, name) for mode in MODES}
        for count in rows:
            x = torch.randn(count, in_features).bfloat16()
            best = dict.fromkeys(columns, float("inf"))
            for _ in range(arguments.rounds):
                for column in columns:
                    mode, _, path = column.partition("/")
                    limit = cpu.MAX_PACKED_ROWS
                    if path:
                        cpu.MAX_PACKED_ROWS = 1 << 30 if path == "packed" else 0
                    best[column] = min(best[column], step_milliseconds(built[mode], x))
                    cpu.MAX_PACKED_ROWS = limit
            for column in columns:
                least[count, column] += best[column]
    print(f"| rows | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for count in rows:
        print(f"| {count} | {' | '.join(f'{least[count, column]:.1f}' for column in columns)} |")


if __name__ == "__main__":
    main()
