"""Milliseconds of every linear of a model on this CPU, by precision, kernels and rows: docs/cpu-kernels.md.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 .venv/bin/python -m tests.benchmarks.cpu_linear [--rows 1,8,64,512]

Each layer class is built as often as the model has layers and the layers are called in their order, so that
weights come from memory as they do in a server. All modes run in turns inside one process. The least time of
each single layer over the rounds counts, so that other work on the machine disturbs little; printed is
their sum, in milliseconds a step. With OMP_NUM_THREADS=1 it is CPU time, which a busy machine hardly moves.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from service.kernels import native
from service.kernels.awq_linear.reference import pack
from service.kernels.dense_linear import pack_weight
from service.model.head import FullHead
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.linear import LinearSpec

LAYERS = 30
GROUP = 64
VOCAB, HIDDEN = 49152, 576
SHAPES = {"qkv_proj": (576, 960), "o_proj": (576, 576), "gate_up_proj": (576, 3072), "down_proj": (1536, 576)}
MODES = ("bf16", "int8", "nf4", "awq", "head")
CHOICES: tuple[native.Choice, ...] = ("native", "torch")
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


def build(mode: str) -> list[tuple[int, Layer]]:
    """All layers of the model, or its bf16 head, in their order, each with its number of input features."""
    if mode == "head":
        return [(HIDDEN, FullHead(pack_weight((torch.randn(VOCAB, HIDDEN) * 0.05).bfloat16())))]
    backend = load_backend(mode)
    layers: list[tuple[int, Layer]] = []
    given = {name: tensors(*shape) for name, shape in SHAPES.items()}
    for _ in range(LAYERS):
        for name, (in_features, out_features) in SHAPES.items():
            parts = (LinearSpec("linear", in_features, out_features),)
            group = LinearGroup(name, parts, torch.device("cpu"), torch.bfloat16)
            layers.append((in_features, backend.build(group, given[name].__getitem__)))
    return layers


def measure(layers: list[tuple[int, Layer]], inputs: dict[int, Tensor], least: list[float]) -> None:
    """One round; lowers each layer's time in `least`."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for number, (in_features, layer) in enumerate(layers):
        start = clock()
        layer(inputs[in_features])
        least[number] = min(least[number], clock() - start)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,512")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    built = {}
    for choice in CHOICES:
        native.choose(choice)
        built |= {f"{mode} {choice}": build(mode) for mode in MODES}
    print(f"| rows | {' | '.join(built)} |")
    print("|---" * (len(built) + 1) + "|")
    for count in rows:
        inputs = {width: torch.randn(count, width).bfloat16() for width, _ in SHAPES.values()}
        least = {name: [float("inf")] * len(layers) for name, layers in built.items()}
        for _ in range(arguments.rounds):
            for name, layers in built.items():
                measure(layers, inputs, least[name])
        times = " | ".join(f"{sum(least[name]) * 1e3:.1f}" for name in built)
        print(f"| {count} | {times} |", flush=True)


if __name__ == "__main__":
    main()
