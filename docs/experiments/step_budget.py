"""The budget of one decode step: which kernel takes how many microseconds, against its floor.

No model and no server: 32 layers of Llama-3.1-8B's shapes with random weights, captured in one CUDA graph, at
M sequences of `CONTEXT` tokens. Each part is also captured alone over all layers, so that its weights never
stay in the L2 cache, and printed beside the time in which its bytes can be read.

    python docs/experiments/step_budget.py [--rows 1,16,64,256] [--json FILE]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from graph_times import capture, replays_us
from torch import Tensor

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 32, 4096, 32, 8, 128, 14336, 128256
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
CONTEXT, BLOCK_TOKENS = 640, 16
READ_BYTES_PER_S = 3.04e12  # sum over 1 GiB on the card of the table in docs/performance.md


@triton.jit
def add_rms_norm(x, residual, weight, out, eps, WIDTH: tl.constexpr):
    """residual += x; out = rms_norm(residual) * weight. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    total = tl.load(x + row * WIDTH + columns).to(tl.float32)
    total += tl.load(residual + row * WIDTH + columns).to(tl.float32)
    tl.store(residual + row * WIDTH + columns, total.to(residual.dtype.element_ty))
    scale = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    normed = total * scale * tl.load(weight + columns).to(tl.float32)
    tl.store(out + row * WIDTH + columns, normed.to(out.dtype.element_ty))


@triton.jit
def rotary_and_store(
    qkv, cos, sin, positions, slots, keys, values,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rotate q in place; rotate k and copy v into their pages. One program a (token, head)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, DIM // 2)
    base = qkv + token * ((Q_HEADS + 2 * K_HEADS) * DIM) + head * DIM
    first, second = tl.load(base + half), tl.load(base + DIM // 2 + half)
    slot = tl.load(slots + token)
    kv_head = (head - Q_HEADS) % K_HEADS
    target = ((slot // PAGE) * K_HEADS + kv_head) * (PAGE * DIM) + (slot % PAGE) * DIM
    if head >= Q_HEADS + K_HEADS:
        tl.store(values + target + half, first)
        tl.store(values + target + DIM // 2 + half, second)
    else:
        position = tl.load(positions + token)
        c = tl.load(cos + position * (DIM // 2) + half)
        s = tl.load(sin + position * (DIM // 2) + half)
        a, b = first.to(tl.float32), second.to(tl.float32)
        rotated_first, rotated_second = (a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype)
        if head < Q_HEADS:
            tl.store(base + half, rotated_first)
            tl.store(base + DIM // 2 + half, rotated_second)
        else:
            tl.store(keys + target + half, rotated_first)
            tl.store(keys + target + DIM // 2 + half, rotated_second)


@triton.jit
def silu_and_multiply(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[rows, 2 * WIDTH] -> silu(first half) * second half [rows, WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_up + row * 2 * WIDTH + columns).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty))


@triton.jit
def paged_decode(
    q, keys, values, block_tables, lengths, partial, log_sums, scale, row_stride, max_blocks,
    GROUP: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query token a sequence against its pages; program = (sequence, KV head, split of the context).

    The GROUP query heads of a KV head fill the rows of one 16-row tile. Each split leaves a normalised
    partial output and the log of its sum; `combine` joins them in a fixed order.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    per_split = tl.cdiv(tl.cdiv(length, TILE), SPLITS) * TILE
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    rows = tl.arange(0, 16)
    dims = tl.arange(0, DIM)
    heads = kv_head * GROUP + rows
    query = tl.load(
        q + sequence * row_stride + heads[:, None] * DIM + dims[None, :],
        mask=rows[:, None] < GROUP,
        other=0.0,
    )
    highest = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    accumulated = tl.zeros([16, DIM], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for tile in range(start, end, TILE):
        tokens = tile + tl.arange(0, TILE)
        inside = tokens < end
        block = tl.load(block_tables + sequence * max_blocks + tokens // PAGE, mask=inside, other=0).to(
            tl.int64
        )
        address = (block * K_HEADS + kv_head) * (PAGE * DIM) + (tokens % PAGE) * DIM
        key = tl.load(keys + address[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        correction = tl.exp2(highest - new_highest)
        value = tl.load(values + address[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        total = total * correction + tl.sum(weights, 1)
        accumulated = accumulated * correction[:, None] + tl.dot(weights.to(value.dtype), value)
        highest = new_highest
    filled = tl.where(total > 0, total, 1.0)
    result = accumulated / filled[:, None]
    index = (sequence * K_HEADS * GROUP + heads) * SPLITS + split
    tl.store(
        partial + index[:, None] * DIM + dims[None, :],
        result.to(partial.dtype.element_ty),
        mask=rows[:, None] < GROUP,
    )
    tl.store(
        log_sums + index, tl.where(total > 0, highest + tl.log2(filled), float("-inf")), mask=rows < GROUP
    )


@triton.jit
def combine(partial, log_sums, out, DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    """Join the splits of one (sequence, head): softmax of their log-sums weighs the partial outputs."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, PADDED)
    dims = tl.arange(0, DIM)
    logs = tl.load(log_sums + row * SPLITS + splits, mask=splits < SPLITS, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    parts = tl.load(partial + (row * SPLITS + splits)[:, None] * DIM + dims[None, :],
                    mask=splits[:, None] < SPLITS, other=0.0).to(tl.float32)  # fmt: skip
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty))


@triton.jit
def stream_linear(
    x, weight, out, rows, K: tl.constexpr, N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[split] = x @ weight.T over this split's share of K: reads each weight once, for few rows."""
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(1)
    row = tl.arange(0, TILE_M)
    share: tl.constexpr = K // SPLITS
    ks = split * share + tl.arange(0, TILE_K)
    x_at = x + row[None, :] * K + ks[:, None]
    w_at = weight + columns[:, None].to(tl.int64) * K + ks[None, :]
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    for _ in range(0, share, TILE_K):
        w = tl.load(w_at, eviction_policy="evict_first")
        a = tl.load(x_at, mask=row[None, :] < rows, other=0.0)
        total = tl.dot(w, a, total)
        w_at += TILE_K
        x_at += TILE_K
    target = out + split.to(tl.int64) * rows * N + row[None, :] * N + columns[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=row[None, :] < rows)


@dataclass
class Part:
    rows: int
    name: str
    us_per_step: float
    floor_us: float
    spread_us: float


def time_graph(body: Callable[[], None], repeats: int = 20) -> tuple[float, float]:
    """Median and spread (max - min) in microseconds of one replay of a captured `body`."""
    times = replays_us(capture([body]), repeats)
    return statistics.median(times), max(times) - min(times)


class Layers:
    """Weights, pages and buffers for the largest number of rows."""

    def __init__(self, max_rows: int, dtype: torch.dtype) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=dtype) * 0.02

        self.qkv = [random(QKV, HIDDEN) for _ in range(LAYERS)]
        self.o = [random(HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self.gate_up = [random(2 * FFN, HIDDEN) for _ in range(LAYERS)]
        self.down = [random(HIDDEN, FFN) for _ in range(LAYERS)]
        self.norm = random(HIDDEN) + 1
        self.head = random(VOCAB, HIDDEN)
        pages = max_rows * (CONTEXT // BLOCK_TOKENS) + 1
        self.keys = [random(pages, KV_HEADS, BLOCK_TOKENS, HEAD_DIM) for _ in range(LAYERS)]
        self.values = [random(pages, KV_HEADS, BLOCK_TOKENS, HEAD_DIM) for _ in range(LAYERS)]
        angle = torch.arange(CONTEXT + 1, device="cuda")[:, None] * torch.rand(HEAD_DIM // 2, device="cuda")
        self.cos, self.sin = angle.cos(), angle.sin()


def splits_for(rows: int, tile: int) -> int:
    """Enough programs for two waves of 132 multiprocessors, no more splits than tiles."""
    wanted = triton.cdiv(2 * 132, rows * KV_HEADS)
    return max(1, min(wanted, CONTEXT // tile))


def step_parts(
    model: Layers, rows: int, dtype: torch.dtype, tile: int, stages: int
) -> dict[str, tuple[Callable[[int], None], int]]:
    """Name -> (launch for layer i, bytes that it must read). Buffers are shared by the layers."""
    device = "cuda"
    x = torch.randn(rows, HIDDEN, device=device, dtype=dtype)
    residual, normed = torch.randn_like(x), torch.empty_like(x)
    qkv = torch.randn(rows, QKV, device=device, dtype=dtype)
    attended = torch.empty(rows, HIDDEN, device=device, dtype=dtype)
    gate_up = torch.randn(rows, 2 * FFN, device=device, dtype=dtype)
    activated = torch.randn(rows, FFN, device=device, dtype=dtype)
    logits = torch.empty(rows, VOCAB, device=device, dtype=dtype)
    chosen = torch.empty(rows, device=device, dtype=torch.int64)
    positions = torch.full((rows,), CONTEXT - 1, device=device, dtype=torch.int64)
    pages_each = CONTEXT // BLOCK_TOKENS
    order = torch.randperm(rows * pages_each, device=device, dtype=torch.int32) + 1
    tables = order.view(rows, pages_each).contiguous()
    slots = tables[:, -1].to(torch.int64) * BLOCK_TOKENS + BLOCK_TOKENS - 1
    lengths = torch.full((rows,), CONTEXT, device=device, dtype=torch.int32)
    splits = splits_for(rows, tile)
    partial = torch.empty(rows * HEADS * splits, HEAD_DIM, device=device, dtype=torch.float32)
    log_sums = torch.empty(rows * HEADS * splits, device=device, dtype=torch.float32)

    def norm(_: int) -> None:
        add_rms_norm[(rows,)](x, residual, model.norm, normed, 1e-5, HIDDEN, num_warps=8)

    def rotary(i: int) -> None:
        rotary_and_store[(rows, HEADS + 2 * KV_HEADS)](
            qkv, model.cos, model.sin, positions, slots, model.keys[i], model.values[i],
            HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, num_warps=1)  # fmt: skip

    def attention(i: int) -> None:
        target = attended if splits == 1 else partial
        paged_decode[(rows, KV_HEADS, splits)](
            qkv, model.keys[i], model.values[i], tables, lengths, target, log_sums, HEAD_DIM**-0.5, QKV,
            pages_each, HEADS // KV_HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, tile, splits,
            num_warps=4, num_stages=stages)  # fmt: skip
        if splits > 1:
            combine[(rows * HEADS,)](partial, log_sums, attended, HEAD_DIM, splits,
                                     triton.next_power_of_2(splits), num_warps=4)  # fmt: skip

    def activation(_: int) -> None:
        silu_and_multiply[(rows, FFN // 2048)](gate_up, activated, FFN, 2048, num_warps=4)

    def linear(source: Tensor, weights: list[Tensor], out: Tensor) -> Callable[[int], None]:
        def launch(i: int) -> None:
            torch.mm(source, weights[i].t(), out=out)

        return launch

    def choose(_: int) -> None:
        torch.argmax(logits, -1, out=chosen)

    kv_bytes = rows * CONTEXT * KV_HEADS * HEAD_DIM * 2 * 2
    return {
        "norm 1": (norm, 0),
        "qkv": (linear(normed, model.qkv, qkv), QKV * HIDDEN * 2),
        "rotary + KV write": (rotary, 0),
        "attention": (attention, kv_bytes),
        "o": (linear(attended, model.o, x), HIDDEN * HIDDEN * 2),
        "norm 2": (norm, 0),
        "gate_up": (linear(normed, model.gate_up, gate_up), 2 * FFN * HIDDEN * 2),
        "SwiGLU": (activation, 0),
        "down": (linear(activated, model.down, x), FFN * HIDDEN * 2),
        "lm_head": (linear(normed, [model.head], logits), VOCAB * HIDDEN * 2),
        "argmax": (choose, 0),
    }


def check_attention(model: Layers, dtype: torch.dtype) -> float:
    """Relative error of the paged kernel against torch in float64, on ragged lengths; poisoned output."""
    rows, tile, splits = 3, 64, 4
    q = torch.randn(rows, QKV, device="cuda", dtype=dtype)
    lengths = torch.tensor([1, 77, CONTEXT], device="cuda", dtype=torch.int32)
    pages_each = CONTEXT // BLOCK_TOKENS
    tables = (torch.randperm(rows * pages_each, device="cuda", dtype=torch.int32) + 1).view(rows, pages_each)
    tables = tables.clamp(max=model.keys[0].shape[0] - 1).contiguous()
    partial = torch.full((rows * HEADS * splits, HEAD_DIM), float("nan"), device="cuda")
    logs = torch.full((rows * HEADS * splits,), float("nan"), device="cuda")
    out = torch.full((rows, HIDDEN), float("nan"), device="cuda", dtype=dtype)
    paged_decode[(rows, KV_HEADS, splits)](
        q, model.keys[0], model.values[0], tables, lengths, partial, logs, HEAD_DIM**-0.5, QKV, pages_each,
        HEADS // KV_HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, tile, splits, num_warps=4, num_stages=2)  # fmt: skip
    combine[(rows * HEADS,)](
        partial, logs, out, HEAD_DIM, splits, triton.next_power_of_2(splits), num_warps=4
    )
    error = 0.0
    for i, length in enumerate(lengths.tolist()):
        k = model.keys[0][tables[i].long()].transpose(0, 1).reshape(KV_HEADS, CONTEXT, HEAD_DIM)[:, :length]
        v = model.values[0][tables[i].long()].transpose(0, 1).reshape(KV_HEADS, CONTEXT, HEAD_DIM)[:, :length]
        query = q[i, : HEADS * HEAD_DIM].view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM).double()
        scores = (query @ k.double().transpose(1, 2)) * HEAD_DIM**-0.5
        want = (scores.softmax(-1) @ v.double()).reshape(-1)
        error = max(error, float((out[i].double() - want).norm() / want.norm()))
    return error


def try_stream_linear(model: Layers, rows: int, dtype: torch.dtype, results: list[Part]) -> None:
    """cuBLAS's rival for few rows: the four linears with a few tile shapes, the best of each printed."""
    for name, weights, k, n in (
        ("qkv", model.qkv, HIDDEN, QKV), ("o", model.o, HIDDEN, HIDDEN),
        ("gate_up", model.gate_up, HIDDEN, 2 * FFN), ("down", model.down, FFN, HIDDEN),
    ):  # fmt: skip
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        best: tuple[float, str, float] | None = None
        for tile_n, tile_k, splits, warps, stages in (
            (64, 128, 1, 4, 4), (64, 128, 2, 4, 4), (64, 256, 1, 4, 3), (64, 256, 2, 4, 3), (64, 128, 4, 4, 4),
            (128, 128, 1, 8, 4), (128, 64, 2, 4, 6), (128, 128, 2, 8, 4), (64, 64, 2, 4, 8), (32, 256, 1, 2, 4),
        ):  # fmt: skip
            if k % (splits * tile_k):
                continue
            out = torch.full((splits, rows, n), float("nan"), device="cuda", dtype=torch.float32)

            def launch(i: int) -> None:
                stream_linear[(n // tile_n, splits)](
                    x, weights[i], out, rows, k, n, 16, tile_n, tile_k, splits, num_warps=warps, num_stages=stages)  # fmt: skip

            launch(0)
            want = F.linear(x.float(), weights[0].float())
            error = float((out.sum(0) - want).norm() / want.norm())
            label = f"{tile_n}x{tile_k} split {splits} warps {warps} stages {stages}"
            if not error < 5e-3:
                print(f"  stream_linear {name} {label}: WRONG, relative error {error:.2e}")
                continue
            us, spread = time_graph(lambda: [launch(i) for i in range(LAYERS)] and None)
            if best is None or us < best[0]:
                best = (us, label, spread)
        if best:
            print(f"  stream_linear {name:8s} M={rows}: {best[0] / LAYERS:7.2f} us  ({best[1]})")
            results.append(
                Part(
                    rows,
                    f"stream_linear {name} {best[1]}",
                    best[0],
                    n * k * 2 * LAYERS / READ_BYTES_PER_S * 1e6,
                    best[2],
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    dtype = torch.float16
    all_rows = [int(r) for r in arguments.rows.split(",")]
    model = Layers(max(*all_rows, 3), dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {dtype}")
    print(f"paged_decode against float64: relative error {check_attention(model, dtype):.2e}")
    results: list[Part] = []
    for rows in all_rows:
        best: tuple[float, int, int] | None = None
        for tile, stages in ((32, 3), (64, 2), (64, 3), (128, 2)):
            attention, _ = step_parts(model, rows, dtype, tile, stages)["attention"]
            us, _ = time_graph(lambda: [attention(i) for i in range(LAYERS)] and None)
            print(f"  attention M={rows} tile {tile} stages {stages}: {us / LAYERS:7.2f} us")
            if best is None or us < best[0]:
                best = (us, tile, stages)
        assert best is not None
        parts = step_parts(model, rows, dtype, best[1], best[2])
        per_layer = [launch for name, (launch, _) in parts.items() if name not in ("lm_head", "argmax")]

        def whole() -> None:
            for i in range(LAYERS):
                for launch in per_layer:
                    launch(i)
            parts["norm 1"][0](0)
            parts["lm_head"][0](0)
            parts["argmax"][0](0)

        for name, (launch, size) in parts.items():
            times = 1 if name in ("lm_head", "argmax") else LAYERS
            us, spread = time_graph(lambda: [launch(i) for i in range(times)] and None)
            results.append(Part(rows, name, us, size * times / READ_BYTES_PER_S * 1e6, spread))
        us, spread = time_graph(whole)
        floor = sum(p.floor_us for p in results if p.rows == rows)
        results.append(Part(rows, "whole step", us, floor, spread))
        print(
            f"M={rows}: whole step {us / 1e3:.3f} ms, floor {floor / 1e3:.3f} ms, {rows / us * 1e6:.0f} tok/s"
        )
        if rows <= 16:
            try_stream_linear(model, rows, dtype, results)
    print(f"{'M':>4} {'part':52} {'us/step':>9} {'us/layer':>9} {'floor':>9} {'spread':>7}")
    for p in results:
        print(
            f"{p.rows:4d} {p.name:52} {p.us_per_step:9.1f} {p.us_per_step / LAYERS:9.2f} {p.floor_us:9.1f} {p.spread_us:7.1f}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(p) for p in results], file, indent=1)


if __name__ == "__main__":
    main()
