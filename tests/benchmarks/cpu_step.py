"""Microseconds of every op between a model's linears on this CPU, by torch and by our own kernels.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 .venv/bin/python -m tests.benchmarks.cpu_step [--rows 1,8]

Shapes of the demo model (hidden 576, 9 heads, 3 KV heads, head_dim 64, FFN 1536, vocabulary 49,152),
bfloat16, 128 tokens of context, operands in the caches. Both take turns; the least of the rounds counts.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, get_args

import torch

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.gated_silu import gated_silu
from service.kernels.greedy import greedy
from service.kernels.native import Choice, choose
from service.kernels.paged_attention import paged_attention, plan_attention
from service.kernels.rotary_kv import rotary_kv
from service.model.batch import BLOCK_TOKENS

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 576, 9, 3, 64, 1536, 49_152
CONTEXT = 128
PREFILL = 512
Call = tuple[str, Callable[..., Any], tuple[Any, ...]]


def decode_calls(rows: int) -> list[Call]:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    pages = CONTEXT // BLOCK_TOKENS
    tables = (torch.arange(rows * pages, dtype=torch.int32) + 1).view(rows, pages)
    keys, values = numbers(2, rows * pages + 1, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    cos, sin = torch.randn(2, CONTEXT, HEAD_DIM)
    positions = torch.full((rows,), CONTEXT - 1)
    slots = tables[:, -1].long() * BLOCK_TOKENS + BLOCK_TOKENS - 1
    qkv = numbers(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    plan = plan_attention(tables, list(range(rows + 1)), [CONTEXT] * rows, rows)
    hidden = numbers(rows, HIDDEN)
    q = numbers(rows, HEADS, HEAD_DIM)
    return [
        ("add_rms_norm", add_rms_norm, (hidden, hidden, numbers(HIDDEN), 1e-5)),
        ("rotary_kv", rotary_kv, (qkv, cos, sin, positions, slots, None, None, 1e-5, keys, values)),
        ("paged_attention", paged_attention, (q, keys, values, plan, HEAD_DIM**-0.5)),
        ("gated_silu", gated_silu, (numbers(rows, 2 * INNER),)),
        ("greedy", greedy, (torch.randn(rows, VOCAB),)),
    ]


def prefill_call() -> Call:
    pages = PREFILL // BLOCK_TOKENS
    keys, values = torch.randn(2, pages, KV_HEADS, BLOCK_TOKENS, HEAD_DIM).bfloat16()
    tables = torch.arange(pages, dtype=torch.int32)[None]
    plan = plan_attention(tables, [0, PREFILL], [PREFILL], 0)
    q = torch.randn(PREFILL, HEADS, HEAD_DIM).bfloat16()
    return f"paged_attention, prefill of {PREFILL}", paged_attention, (q, keys, values, plan, HEAD_DIM**-0.5)


def microseconds(call: Call, repeats: int = 20) -> float:
    _, function, arguments = call
    start = time.perf_counter()
    for _ in range(repeats):
        function(*arguments)
    return (time.perf_counter() - start) / repeats * 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    calls = [(rows, call) for rows in map(int, arguments.rows.split(",")) for call in decode_calls(rows)]
    for rows, call in [*calls, (PREFILL, prefill_call())]:
        least = {}
        for choice in [c for c in get_args(Choice) if c != "auto"]:
            choose(choice)
            least[choice] = min(
                microseconds(call, 1 if rows == PREFILL else 20) for _ in range(arguments.rounds)
            )
        print(f"{rows:4} {call[0]:34}", *(f"{name} {found:9.1f}" for name, found in least.items()))


if __name__ == "__main__":
    main()
