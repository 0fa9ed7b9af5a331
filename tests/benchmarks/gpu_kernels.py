"""Microseconds of every own kernel of a step on this GPU, against the time in which its bytes can be read.

    python -m tests.benchmarks.gpu_kernels [--rows 1,16,64,256] [--sweep] [--only kv8|decode|decode8]

Shapes are Llama-3.1-8B's at 640 tokens of context, in float16. Each figure is the median of captured replays
over 32 copies of weights and pages, so that nothing stays in the L2 cache. `--sweep` also tries other shapes
of tiles than those that the kernels choose, which is where their constants come from. `--only kv8`: attention
over 8-bit codes of K and V beside that over 16 bits. `--only decode`: a decode's attention in one launch, its
variants and Triton's kernels (decode_sweep.py); `--only decode8`: over 8-bit codes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels import launch
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.coded_attention import triton as coded
from service.kernels.decode_splits.triton import PROGRAMS
from service.kernels.dense_linear import dense_linear
from service.kernels.dense_linear import triton as linear
from service.kernels.fixed_linear import triton as fixed
from service.kernels.gated_silu import gated_silu
from service.kernels.greedy import greedy
from service.kernels.kv_codes import is_coded
from service.kernels.paged_attention import AttentionPlan, decode_plan, paged_attention, plan_attention
from service.kernels.paged_attention import plan as plans
from service.kernels.paged_attention import triton as attention
from service.kernels.rotary_kv import rotary_kv
from service.kernels.sample import sample
from service.kernels.sample_likely import sample_likely
from tests.benchmarks import decode_sweep
from tests.benchmarks.gpu_timing import (
    CONTEXT,
    CUDA,
    HALF,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    PAGE,
    QKV,
    VOCAB,
    microseconds,
    show,
)

LINEARS = {
    "qkv": (HIDDEN, QKV),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (HIDDEN, 2 * INNER),
    "down": (INNER, HIDDEN),
    "lm_head": (HIDDEN, VOCAB),
}
ATTENTION_SHAPES = ((32, 3), (64, 2), (64, 3), (64, 4))  # of a decode: keys in a tile, stages
CODED_SHAPES = (
    (64, 4, 3),
    (64, 2, 3),
    (128, 4, 2),
    (128, 4, 3),
    (128, 4, 4),
    (128, 8, 3),
)  # keys, warps, stages
CODED_PREFILL_SHAPES = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3))
PREFILL_SHAPES = ((128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2))
STREAM_SHAPES = ((64, 128, 4), (64, 256, 3), (64, 128, 6), (128, 128, 4))  # outputs, inputs, stages


def few_rows(rows: int, name: str, sweep: bool) -> None:
    in_features, out_features = LINEARS[name]
    copies = 2 if name == "lm_head" else LAYERS
    weights = [torch.randn(out_features, in_features, device=CUDA, dtype=HALF) * 0.02 for _ in range(copies)]
    x = torch.randn(rows, in_features, device=CUDA, dtype=HALF)
    num_bytes = in_features * out_features * 2

    def stream(splits: int) -> float:
        return microseconds(lambda i: linear.stream_linear(x, weights[i], None, splits), copies)

    show(rows, f"{name} cuBLAS", microseconds(lambda i: F.linear(x, weights[i]), copies), num_bytes)
    show(rows, f"{name} stream", stream(0), num_bytes)
    usual = linear.TILE_OUT, linear.TILE_IN, linear.STAGES
    for shape in STREAM_SHAPES if sweep else ():
        linear.TILE_OUT, linear.TILE_IN, linear.STAGES = shape
        for splits in (1, 2, 4):
            if in_features % (splits * linear.TILE_IN) == 0:
                show(rows, f"{name} stream {shape} splits {splits}", stream(splits), num_bytes)
    linear.TILE_OUT, linear.TILE_IN, linear.STAGES = usual


def any_rows(rows: int, name: str, sweep: bool) -> None:
    """The linear of a deterministic model; a sweep tells whether products of another width add alike."""
    in_features, out_features = LINEARS[name]
    copies = 2 if name == "lm_head" else LAYERS
    weights = [torch.randn(out_features, in_features, device=CUDA, dtype=HALF) * 0.02 for _ in range(copies)]
    x = torch.randn(rows, in_features, device=CUDA, dtype=HALF)
    num_bytes = in_features * out_features * 2

    def timed(tiles: fixed.Tiles | None) -> float:
        return microseconds(lambda i: fixed.fixed_linear(x, weights[i], tiles=tiles), copies)

    show(rows, f"{name} cuBLAS", microseconds(lambda i: F.linear(x, weights[i]), copies), num_bytes)
    show(rows, f"{name} fixed", timed(None), num_bytes)
    usual = fixed.fixed_linear(x, weights[0])
    for width, base in (
        ((16, fixed.FEW), (32, fixed.FEW), (128, fixed.FEW), (128, fixed.MANY)) if sweep else ()
    ):
        tiles = replace(base, rows=width, num_stages=3)
        bits = "same" if torch.equal(fixed.fixed_linear(x, weights[0], tiles=tiles), usual) else "other"
        show(rows, f"{name} fixed {width} x {tiles.outputs}, {bits} bits", timed(tiles), num_bytes)


def decode(rows: int, keys: list[Tensor], values: list[Tensor], sweep: bool) -> None:
    pages = CONTEXT // PAGE
    tables = (torch.randperm(rows * pages, device=CUDA, dtype=torch.int32) + 1).view(rows, pages)
    tables = F.pad(tables, (0, 8192 // PAGE - pages))  # as wide as the longest request may become
    plan = decode_plan(tables, torch.full((rows,), CONTEXT, dtype=torch.int32, device=CUDA))
    q = torch.randn(rows, HEADS, HEAD_DIM, device=CUDA, dtype=HALF)
    num_bytes = rows * CONTEXT * KV_HEADS * HEAD_DIM * 4

    def attend(splits: int) -> Callable[[int], None]:
        return lambda i: attention.decode(
            q, keys[i], values[i], plan, torch.empty_like(q), 0.1, 0, 0.0, splits
        )

    show(rows, "decode attention", microseconds(attend(0)), num_bytes)
    fixed_plan = decode_plan(tables, plan.lengths, deterministic=True)
    fixed_us = microseconds(lambda i: paged_attention(q, keys[i], values[i], fixed_plan, 0.1))
    show(rows, "decode attention, deterministic", fixed_us, num_bytes)
    usual = attention.decode_shape
    for shape in ATTENTION_SHAPES if sweep else ():
        attention.decode_shape = lambda *_, found=shape: found
        for splits in (1, 2, 4, 8, 16, 32):
            if rows * KV_HEADS * splits <= 4 * PROGRAMS:
                got = microseconds(attend(splits))
                show(rows, f"decode {shape} splits {splits}", got, num_bytes)
    attention.decode_shape = usual


@dataclass(frozen=True)
class Coded:
    """Copies of a cache of one type, and what attends to them."""

    keys: Tensor  # [copies, blocks, KV_HEADS, PAGE, HEAD_DIM]
    values: Tensor
    scales: Tensor

    @classmethod
    def random(cls, copies: int, blocks: int, dtype: torch.dtype) -> "Coded":
        shape = (copies, blocks, KV_HEADS, PAGE, HEAD_DIM)
        keys, values = (torch.randint(-100, 100, shape, device=CUDA, dtype=torch.int8) for _ in range(2))
        scales = torch.full((*shape[:-1], 2), 0.01, device=CUDA, dtype=torch.bfloat16)
        return cls(keys.half().to(dtype), values.half().to(dtype), scales)

    @property
    def name(self) -> str:
        return str(self.keys.dtype).removeprefix("torch.")

    @property
    def token_bytes(self) -> int:
        """Of K and V."""
        codes = is_coded(self.keys.dtype)
        return 2 * KV_HEADS * (HEAD_DIM + 2 if codes else 2 * HEAD_DIM)

    def attend(self, i: int, q: Tensor, plan: AttentionPlan) -> Tensor:
        if is_coded(self.keys.dtype):
            caches = self.keys[i], self.values[i], self.scales[i]
            return coded.coded_attention(q, *caches, plan, HEAD_DIM**-0.5)
        return attention.paged_attention(q, self.keys[i], self.values[i], plan, HEAD_DIM**-0.5)


def kv8(rows: int, context: int, sweep: bool) -> None:
    """A decode over caches of each type."""
    pages = context // PAGE
    copies = LAYERS if rows * context <= 1 << 16 else 4  # each many times the L2
    tables = (torch.randperm(rows * pages, device=CUDA, dtype=torch.int32) + 1).view(rows, pages)
    tables = F.pad(tables, (0, 8192 // PAGE - pages))
    plan = decode_plan(tables, torch.full((rows,), context, dtype=torch.int32, device=CUDA))
    q = torch.randn(rows, HEADS, HEAD_DIM, device=CUDA, dtype=HALF)
    for dtype in (HALF, torch.int8, torch.float8_e4m3fn):
        cache = Coded.random(copies, rows * pages + 1, dtype)
        num_bytes = rows * context * cache.token_bytes

        def timed(cache: Coded = cache) -> float:
            return microseconds(lambda i: cache.attend(i, q, plan), copies)

        show(rows, f"decode behind {context} in {cache.name}", timed(), num_bytes)
        usual = coded.decode_shape
        for shape in CODED_SHAPES if sweep and is_coded(dtype) else ():
            coded.decode_shape = lambda *_, found=shape: found
            show(rows, f"decode behind {context} in {cache.name} {shape}", timed(), num_bytes)
        coded.decode_shape = usual


def kv8_prefill(chunk: int, earlier: int, sweep: bool) -> None:
    pages = -(-(chunk + earlier) // PAGE)
    tables = (torch.randperm(pages, device=CUDA, dtype=torch.int32) + 1).view(1, pages)
    q = torch.randn(chunk, HEADS, HEAD_DIM, device=CUDA, dtype=HALF)
    qkv = torch.randn(chunk, QKV, device=CUDA, dtype=HALF)
    slots, positions = torch.arange(chunk, device=CUDA), torch.arange(chunk, device=CUDA)
    cos, sin = torch.rand(2, chunk, HEAD_DIM, device=CUDA)
    for dtype in (HALF, torch.int8, torch.float8_e4m3fn):
        cache = Coded.random(4, pages + 1, dtype)

        def timed(cache: Coded = cache) -> float:
            plan = plan_attention(tables, [0, chunk], [chunk + earlier], 0)
            return microseconds(lambda i: cache.attend(i, q, plan), 4)

        def written(i: int, cache: Coded = cache) -> Tensor:
            scales = cache.scales[i] if is_coded(cache.keys.dtype) else None
            caches = cache.keys[i], cache.values[i], scales
            return rotary_kv(qkv, cos, sin, positions, slots, None, None, 1e-5, *caches)

        show(chunk, f"prefill behind {earlier} in {cache.name}", timed())
        usual_tokens = plans.COPIED_TOKENS
        for tokens, way in ((0, "in place"), (1 << 20, "copied")) if is_coded(dtype) else ():
            plans.COPIED_TOKENS = tokens
            show(chunk, f"prefill behind {earlier} in {cache.name}, {way}", timed())
        plans.COPIED_TOKENS = 0
        usual = coded.prefill_shape
        for shape in CODED_PREFILL_SHAPES if sweep and is_coded(dtype) else ():
            coded.prefill_shape = lambda *_, found=shape: found
            show(chunk, f"prefill behind {earlier} in {cache.name} {shape}", timed())
        coded.prefill_shape, plans.COPIED_TOKENS = usual, usual_tokens
        if not earlier:
            show(chunk, f"rotary_kv into {cache.name}", microseconds(written, 4))


def layers(rows: int, keys: list[Tensor], values: list[Tensor]) -> None:
    """The decode of all layers, kernel behind kernel, with and without dependent launch."""
    linears = [LINEARS[name] for name in ("qkv", "o", "gate_up", "down")]
    weights = [
        [torch.randn(shape[::-1], device=CUDA, dtype=HALF) * 0.02 for shape in linears] for _ in range(LAYERS)
    ]
    pages = CONTEXT // PAGE
    tables = (torch.randperm(rows * pages, device=CUDA, dtype=torch.int32) + 1).view(rows, pages)
    plan = decode_plan(tables, torch.full((rows,), CONTEXT, dtype=torch.int32, device=CUDA))
    norm = torch.ones(HIDDEN, device=CUDA, dtype=HALF)
    cos, sin = torch.rand(2, 1024, HEAD_DIM, device=CUDA)
    positions = torch.full((rows,), CONTEXT - 1, device=CUDA)
    slots = tables[:, -1].long() * PAGE + PAGE - 1
    hidden = torch.randn(rows, HIDDEN, device=CUDA, dtype=HALF)

    def layer(i: int) -> None:
        total, x = add_rms_norm(hidden, hidden, norm, 1e-5)
        x = dense_linear(x, weights[i][0])
        q = rotary_kv(x, cos, sin, positions, slots, None, None, 1e-5, keys[i], values[i])
        x = paged_attention(q, keys[i], values[i], plan, HEAD_DIM**-0.5).view(rows, -1)
        _, x = add_rms_norm(total, dense_linear(x, weights[i][1]), norm, 1e-5)
        dense_linear(gated_silu(dense_linear(x, weights[i][2])), weights[i][3])

    num_bytes = sum(weight.numel() for weight in weights[0]) * 2 + rows * CONTEXT * KV_HEADS * HEAD_DIM * 4
    for is_dependent in (False, True):
        launch.DEPENDENT = is_dependent
        label = "with" if is_dependent else "without"
        show(rows, f"a whole layer, {label} dependent launch", microseconds(layer), num_bytes)


def prefill(chunk: int, earlier: int, keys: list[Tensor], values: list[Tensor], sweep: bool) -> None:
    pages = -(-(chunk + earlier) // PAGE)
    tables = (torch.randperm(pages, device=CUDA, dtype=torch.int32) + 1).view(1, pages)
    q = torch.randn(chunk, HEADS, HEAD_DIM, device=CUDA, dtype=HALF)
    flops = 4 * HEADS * HEAD_DIM * (chunk * earlier + chunk * chunk / 2)

    def attend(deterministic: bool = False) -> float:
        plan = plan_attention(tables, [0, chunk], [chunk + earlier], 0, deterministic=deterministic)
        return microseconds(lambda i: attention.paged_attention(q, keys[i], values[i], plan, 0.1))

    def tell(label: str, deterministic: bool = False) -> None:
        got = attend(deterministic)
        show(chunk, f"prefill behind {earlier}{label}: {flops / got / 1e6:.0f} TFLOP/s", got)

    tell("")
    tell(", deterministic", deterministic=True)
    usual = attention.prefill_shape
    for shape in PREFILL_SHAPES if sweep else ():
        attention.prefill_shape = lambda *_, found=shape: found
        tell(f" {shape}")
    attention.prefill_shape = usual


def small(rows: int, keys: list[Tensor], values: list[Tensor]) -> None:
    hidden, delta = torch.randn(2, rows, HIDDEN, device=CUDA, dtype=HALF)
    weight = torch.ones(HIDDEN, device=CUDA, dtype=HALF)
    qkv = torch.randn(rows, QKV, device=CUDA, dtype=HALF)
    gate_up = torch.randn(rows, 2 * INNER, device=CUDA, dtype=HALF)
    cos, sin = torch.rand(2, 1024, HEAD_DIM, device=CUDA)
    positions, slots = (
        torch.full((rows,), CONTEXT - 1, device=CUDA),
        torch.randperm(rows * PAGE, device=CUDA)[:rows],
    )
    logits = torch.randn(rows, VOCAB, device=CUDA)
    seeds, temperature = torch.arange(rows, device=CUDA), torch.ones(rows, device=CUDA)
    show(rows, "add_rms_norm", microseconds(lambda _: add_rms_norm(hidden, delta, weight, 1e-5)))
    show(rows, "gated_silu", microseconds(lambda _: gated_silu(gate_up)))

    def rotate(i: int) -> Tensor:
        return rotary_kv(qkv, cos, sin, positions, slots, None, None, 1e-5, keys[i], values[i])

    show(rows, "rotary_kv", microseconds(rotate))
    num_bytes = logits.numel() * 4
    show(rows, "greedy", microseconds(lambda _: greedy(logits), 4), num_bytes)
    keys = (temperature, seeds, positions, seeds)
    show(rows, "sample at a temperature", microseconds(lambda _: sample(logits, *keys), 4), 2 * num_bytes)
    # long lists in logits as random weights have them, short ones in those of a trained model
    for name, spread in (("flat", logits), ("steep", logits * 4)):
        for top_k, top_p in ((0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)):
            taken = filtered(spread, keys, top_k, top_p)
            show(rows, f"sample_likely, {name}, top-k {top_k}, top-p {top_p}", taken, 2 * num_bytes)


def filtered(logits: Tensor, keys: tuple[Tensor, Tensor, Tensor, Tensor], top_k: int, top_p: float) -> float:
    """Microseconds of a draw in which all rows filter alike."""
    rows = len(logits)
    counts = torch.full((rows,), top_k, dtype=torch.int32, device=CUDA)
    shares = torch.full((rows,), top_p, dtype=torch.float64, device=CUDA)
    min_p = torch.zeros_like(shares)
    return microseconds(lambda _: sample_likely(logits, *keys, counts, shares, min_p), 4)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", choices=["kv8", "decode", "decode8"])
    arguments = parser.parse_args()
    all_rows = [int(rows) for rows in arguments.rows.split(",")]
    print(torch.cuda.get_device_name())
    if arguments.only == "decode":
        decode_sweep.run(all_rows)
        return
    if arguments.only == "decode8":
        decode_sweep.run(all_rows, (torch.int8, torch.float8_e4m3fn), (CONTEXT, 2 * CONTEXT))
        return
    for rows in all_rows:
        for context in (CONTEXT, 2 * CONTEXT):
            kv8(rows, context, arguments.sweep)
    for chunk, earlier in ((1024, 0), (1024, 8192)):
        kv8_prefill(chunk, earlier, arguments.sweep)
    if arguments.only:
        return
    blocks = max(*all_rows, 16) * (CONTEXT // PAGE) + 1
    shape = (LAYERS, blocks, KV_HEADS, PAGE, HEAD_DIM)
    keys, values = (list(torch.randn(shape, device=CUDA, dtype=HALF).unbind()) for _ in range(2))
    for rows in all_rows:
        small(rows, keys, values)
        decode(rows, keys, values, arguments.sweep)
        layers(rows, keys, values)
    for chunk, earlier in ((1024, 0), (512, 0), (1024, 8192)):
        prefill(chunk, earlier, keys, values, arguments.sweep)
    del keys, values
    for rows in all_rows:
        for name in LINEARS if rows <= 64 else ():
            few_rows(rows, name, arguments.sweep)
    for rows in (*all_rows, 1024):
        for name in LINEARS if rows < 1024 else [name for name in LINEARS if name != "lm_head"]:
            any_rows(rows, name, arguments.sweep)


if __name__ == "__main__":
    main()
