"""The kernels of a start, Triton's and those in CUDA C++, compiled on all cores while the weights load.

startup --Shapes--> KernelsAhead --steps on meta tensors--> kernels/*/triton --launch--> Triton's caches
                                 '--variants of a plan--> kernels/*_linear --> kernels/cuda

A launch on meta tensors only compiles. So a start's steps are walked through here without weights: prompts,
and a decode step of each size that is captured. Of kernels in CUDA C++ all are compiled that a table has for
the model's linears. What is missing here is compiled when it is first launched, alone and while everything
waits; a test holds these steps against those of a whole start.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from service.cores import physical_cores
from service.engine.decode_step import sampling_rows
from service.engine.kernel_shapes import Shapes
from service.engine.penalties import MAX_BIASES
from service.engine.state import NUM_WORDS
from service.kernels import decode_attention, dense_linear, gated_linear, w4_linear, w8_linear
from service.kernels.int8_rows import Live, Marks, OutlierRule
from service.kernels.kv_codes import is_coded
from service.kernels.shape_logits import NEUTRAL
from service.kernels.w8_linear.variants import MAX_INPUTS
from service.model.batch import BLOCK_TOKENS
from service.model.instance import GROUPS
from service.model.layout import layer_groups

logger = logging.getLogger(__name__)

META = torch.device("meta")
PROMPT_TOKENS = 64  # of the steps with prompts; their kernels are compiled for any number
LONG_TOKENS = 4096  # of a context whose attention takes larger tiles
MANY_TOKENS = 8192  # where the kernels of a deterministic linear are those for many rows
NUM_BLOCKS = 2  # of a layer's cache, likewise
EIGHT_BIT_TOKENS = (1, 16, 32, 64, 256, 257)  # of steps with prompts that 8-bit linears tell apart


class KernelsAhead:
    """Begins to compile when it is made; `wait` returns when all of it is done."""

    def __init__(self, shapes: Shapes, sizes: Iterable[int]) -> None:
        self._begun = ThreadPoolExecutor(1, "kernels ahead")
        self._done = self._begun.submit(lambda: compile_all(lambda: walk(shapes, sizes), cuda_loads(shapes)))

    def wait(self) -> int:
        """-> how many there were. A fault of these steps stops nobody: what they miss comes later."""
        try:
            return self._done.result()
        except Exception:
            logger.warning("kernels are compiled one by one: all at once has failed", exc_info=True)
            return 0
        finally:
            self._begun.shutdown()


def compile_all(walk: Callable[[], None], loads: Sequence[Callable[[], object]] = ()) -> int:
    """Compiles what `walk` launches on meta tensors, a kernel a thread, and brings it onto the device.

    `loads` do the same for a kernel each that is not Triton's.
    """
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(physical_cores(), "compile") as pool:
        loading = [pool.submit(load) for load in loads]
        with AsyncCompileMode(pool) as mode:
            walk()
            compiling = list(mode.future_kernels.values())
        for _ in pool.map(load_on_device, [kernel.result() for kernel in compiling]):
            pass
        for future in loading:
            future.result()
    return len(compiling) + len(loading)


def cuda_loads(shapes: Shapes) -> list[Callable[[], object]]:
    """What compiles and loads each variant of our kernels in CUDA C++ that a layer of this model may call."""
    four_bit = [shape for shape in map(shapes.w4, GROUPS) if shape]
    w4 = {row.variant for shape in four_bit for row in w4_linear.plan(shape)}
    eight_bit = [shape for shape in map(shapes.w8, GROUPS) if shape]
    w8 = {row.variant.program: row.variant for each in eight_bit for row in w8_linear.plan(each)}
    dense = {row.variant for linear in shapes.dense_linears() for row in shapes.dense(*linear)}
    gated = shapes.gated()
    return [
        *(partial(w4_linear.load, variant) for variant in sorted(w4, key=lambda each: each.name)),
        *(partial(w8_linear.load, variant) for variant in sorted(w8.values(), key=lambda each: each.name)),
        *(partial(dense_linear.load, variant) for variant in sorted(dense, key=lambda each: each.name)),
        *([partial(gated_linear.load, gated)] if gated else []),
        *(partial(decode_attention.load, row.variant) for row in shapes.decodes()),
    ]


def load_on_device(compiled: Any) -> None:
    """Its launcher is built by a C compiler and its code loaded: both outside of Python's lock."""
    assert compiled.run is not None


def walk(shapes: Shapes, sizes: Iterable[int]) -> None:
    """Every kernel of a start's steps is launched once or more, on meta tensors."""
    steps = Steps(shapes)
    if shapes.linears == "int3":
        steps.weights()
    steps.prompts(PROMPT_TOKENS)
    steps.prompts(PROMPT_TOKENS, behind=LONG_TOKENS)
    if steps.scales is not None and not shapes.deterministic:
        steps.prompts_in_place()
    if shapes.deterministic:
        steps.prompts(MANY_TOKENS)
    if shapes.int8 or shapes.linears == "fp8":
        for num_tokens in EIGHT_BIT_TOKENS:
            steps.prompts(num_tokens)
            steps.checks(num_tokens)
    for num_rows in sizes:
        steps.decode(num_rows)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


class Steps:
    """The kernels of a step in the order of decoder and sampler, for one layer of each kind."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        config = shapes.config
        self.rotary = sorted(set(config.rotary))
        self.max_blocks = -(-shapes.max_context_tokens // BLOCK_TOKENS)
        cache = (NUM_BLOCKS, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
        self.keys = self.values = empty(*cache, dtype=shapes.kv_dtype)
        self.scales: Tensor | None = None
        if is_coded(shapes.kv_dtype):
            self.scales = empty(*cache[:-1], 2, dtype=torch.bfloat16)
        self.table = empty(1, config.head_dim, dtype=torch.float32)  # cos and sin
        self.norm = self.activations(config.hidden_size)
        self.head_norm = self.activations(config.head_dim) if config.qk_norm else None

    def weights(self) -> None:
        """What int3 makes of them while they load; most checkpoints have the type of activations."""
        from service.kernels.int3_round.triton import round_groups

        round_groups(self.activations(1, self.shapes.group_size), self.shapes.group_size)

    def prompts(self, num_tokens: int, behind: int = 0) -> None:
        """`behind`: tokens that are in the cache already, if a context may be as long."""
        from service.kernels.paged_attention.plan import plan_attention

        tables = empty(1, self.max_blocks, dtype=torch.int32)
        length = min(num_tokens + behind, self.max_blocks * BLOCK_TOKENS)
        deterministic = self.shapes.deterministic
        plan = plan_attention(tables, [0, num_tokens], [length], 0, deterministic=deterministic)
        self.layers(num_tokens, plan)

    def prompts_in_place(self) -> None:
        """Attention of prompts that see too much of a coded cache for its pages to be copied."""
        from service.kernels.coded_attention.triton import coded_attention
        from service.kernels.paged_attention.plan import COPIED_TOKENS, plan_attention

        assert self.scales is not None
        context_tokens = self.max_blocks * BLOCK_TOKENS
        num_prompts = COPIED_TOKENS // context_tokens + 1
        tables = empty(num_prompts, self.max_blocks, dtype=torch.int32)
        plan = plan_attention(tables, [*range(num_prompts + 1)], [context_tokens] * num_prompts, 0)
        config = self.shapes.config
        q = self.activations(num_prompts, config.num_heads, config.head_dim)
        coded_attention(q, self.keys, self.values, self.scales, plan, config.attention_scale)

    def decode(self, num_rows: int) -> None:
        from service.kernels.paged_attention.plan import decode_plan
        from service.kernels.row_state.triton import read_rows, write_rows

        state_rows = self.shapes.max_requests + 1
        fields = empty(state_rows, NUM_WORDS, dtype=torch.int32)
        tables = empty(state_rows, self.max_blocks, dtype=torch.int32)
        rows = empty(num_rows, dtype=torch.int32)
        _, _, _, lengths, blocks = read_rows(fields, tables, rows, BLOCK_TOKENS)
        starts = empty(num_rows + 1, dtype=torch.int32)  # which counts on a GPU: see `drawn`
        plan = decode_plan(blocks, lengths, starts, deterministic=self.shapes.deterministic)
        self.layers(num_rows, plan)
        logits = self.head(num_rows)
        drawn = self.drawn(logits.float(), fields, rows)
        for token_ids in (self.greedy(logits), *drawn):
            write_rows(fields, rows, token_ids, self.shapes.max_requests)

    def layers(self, num_tokens: int, plan: Any) -> None:
        from service.kernels.coded_attention.triton import coded_attention
        from service.kernels.paged_attention.triton import paged_attention
        from service.kernels.rotary_kv.triton import rotary_kv

        config = self.shapes.config
        hidden = self.activations(num_tokens, config.hidden_size)
        numbers = empty(num_tokens, dtype=torch.int64)  # positions, slots
        delta: Tensor | None = None
        for is_rotary in self.rotary:
            hidden, qkv = self.normed("qkv_proj", hidden, delta)
            table = self.table if is_rotary else None
            q = rotary_kv(
                qkv, table, table, numbers, numbers, self.head_norm, self.head_norm,
                config.norm_eps, self.keys, self.values, self.scales,
            )  # fmt: skip
            caches, scale = (self.keys, self.values), config.attention_scale
            if self.scales is None:
                attended = paged_attention(q, *caches, plan, scale)
            else:
                attended = coded_attention(q, *caches, self.scales, plan, scale)
            x = self.linear("o_proj", attended.view(num_tokens, -1))
            hidden, gate_up = self.normed("gate_up_proj", hidden, x)
            delta = self.gated("down_proj", gate_up)
        self.norm_alone(hidden, delta)

    def norm_alone(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        from service.kernels.add_rms_norm.triton import add_rms_norm

        return add_rms_norm(hidden, delta, self.norm, self.shapes.config.norm_eps)

    def normed(
        self, name: str, hidden: Tensor, delta: Tensor | None, *, is_first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`is_first`: of a forward pass, as is one without a delta."""
        if self.makes_rows(name):
            from service.kernels.int8_linear.triton import normed_linear

            told = self.int8(name, len(hidden), is_first=is_first or delta is None)
            return normed_linear(hidden, delta, self.norm, self.shapes.config.norm_eps, *told)
        if self.shapes.linears == "fp8":
            from service.kernels.fp8_linear.triton import quantize_normed

            hidden, rows = quantize_normed(hidden, delta, self.norm, self.shapes.config.norm_eps)
            return hidden, self.fp8(name, hidden, *rows)
        hidden, x = self.norm_alone(hidden, delta)
        return hidden, self.linear(name, x)

    def gated(self, name: str, gate_up: Tensor) -> Tensor:
        if self.makes_rows(name):
            from service.kernels.int8_linear.triton import gated_linear

            return gated_linear(gate_up, *self.int8(name, len(gate_up)))
        if self.shapes.linears == "fp8":
            from service.kernels.fp8_linear.triton import quantize_gated

            return self.fp8(name, gate_up, *quantize_gated(gate_up))
        from service.kernels.gated_silu.triton import gated_silu

        return self.linear(name, gated_silu(gate_up))

    def makes_rows(self, name: str) -> bool:
        int8 = self.shapes.int8
        return int8 is not None and int8.by_row and name not in int8.skipped

    def checks(self, num_rows: int) -> None:
        """The linears alone, and the first behind a norm, as engine/self_check launches them."""
        for name, parts in layer_groups(self.shapes.config, 0).items():
            self.linear(name, self.activations(num_rows, parts[0].in_features))
        hidden, delta = (self.activations(num_rows, self.shapes.config.hidden_size) for _ in range(2))
        self.normed("qkv_proj", hidden, delta, is_first=True)

    def linear(self, name: str, x: Tensor) -> Tensor:
        parts = layer_groups(self.shapes.config, 0)[name]
        out_features = sum(part.out_features for part in parts)
        if self.shapes.linears in ("awq", "int3") and self.shapes.w4(name) is None:
            return self.awq(x, out_features) if self.shapes.linears == "awq" else self.int3(x, out_features)
        is_biased = any(part.bias for part in parts)
        if self.shapes.linears == "dense":
            return self.dense(x, out_features, is_biased=is_biased)
        if self.shapes.linears == "fp8":
            from service.kernels.fp8_linear.triton import quantize_rows

            return self.fp8(name, x, *quantize_rows(x))
        if self.shapes.int8 and name not in self.shapes.int8.skipped:
            from service.kernels.int8_linear.triton import int8_linear

            return int8_linear(x, *self.int8(name, len(x), is_first=name == "qkv_proj"))
        if self.shapes.int8:
            return self.dense(x, out_features, is_biased=is_biased)
        return self.activations(len(x), out_features)

    def dense(self, x: Tensor, out_features: int, *, is_biased: bool = False) -> Tensor:
        from service.kernels.dense_linear import triton

        weight = self.activations(out_features, x.shape[1])
        bias = self.activations(out_features) if is_biased else None
        if self.shapes.deterministic:
            from service.kernels.fixed_linear.triton import fixed_linear

            return fixed_linear(x, weight, bias)
        if len(x) > triton.most_rows(weight) or self.shapes.dense(out_features, x.shape[1]):
            return self.activations(len(x), out_features)
        return triton.stream_linear(x, weight, bias)

    def awq(self, x: Tensor, out_features: int) -> Tensor:
        from service.kernels.awq_linear.triton import awq_linear

        in_features = x.shape[1]
        num_groups = in_features // self.shapes.group_size
        return awq_linear(
            x,
            empty(in_features, out_features // 8, dtype=torch.int32),
            empty(num_groups, out_features // 8, dtype=torch.int32),
            empty(num_groups, out_features, dtype=torch.float16),
            deterministic=self.shapes.deterministic,
        )

    def int3(self, x: Tensor, out_features: int) -> Tensor:
        from service.kernels.int3_linear.triton import int3_linear

        num_groups = x.shape[1] // self.shapes.group_size
        return int3_linear(
            x,
            empty(x.shape[1] // 32, 3, out_features, dtype=torch.int32),
            empty(num_groups, out_features // 2, dtype=torch.uint8),
            empty(num_groups, out_features, dtype=torch.float16),
        )

    def fp8(self, name: str, x: Tensor, rows: Tensor, row_scales: Tensor) -> Tensor:
        from service.kernels.fp8_linear.plan import FEW_ROWS
        from service.kernels.fp8_linear.triton import few_rows

        parts = layer_groups(self.shapes.config, 0)[name]
        out_features = sum(part.out_features for part in parts)
        if len(rows) > FEW_ROWS or w8_linear.row_for(self.shapes.tiles(name), len(rows)):
            return self.activations(len(rows), out_features)
        codes = empty(out_features, rows.shape[1], dtype=torch.float8_e4m3fn)
        scales = empty(out_features, dtype=torch.float32)
        bias = self.activations(out_features) if any(part.bias for part in parts) else None
        return few_rows(x, rows, row_scales, codes, scales, bias)

    def int8(
        self, name: str, num_rows: int, *, is_first: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, OutlierRule, Live, w8_linear.Tiles | None]:
        """What int8's linears take beside x; `is_first`: of a forward pass."""
        kind = self.shapes.int8
        assert kind is not None
        parts = layer_groups(self.shapes.config, 0)[name]
        out_features = sum(part.out_features for part in parts)
        is_biased = any(part.bias for part in parts)
        counts, slots = empty(2, dtype=torch.int64), empty(num_rows, dtype=torch.int64)
        codes = empty(out_features, parts[0].in_features, dtype=torch.int8)
        scales = empty(out_features, dtype=torch.float32)
        bias = self.activations(out_features) if is_biased else None
        rule = OutlierRule(kind.threshold, kind.by_row, counts)
        tiles = self.tiles(num_rows, out_features, is_first=is_first) if self.shapes.w8(name) else None
        return codes, scales, bias, rule, Live(slots, BLOCK_TOKENS), tiles

    def tiles(self, num_rows: int, out_features: int, *, is_first: bool) -> w8_linear.Tiles:
        """Not their kernel, the one that marks columns for it: the first of a pass clears two bitmaps."""
        bitmap, spent = (empty(count * MAX_INPUTS // 32, dtype=torch.int32) for count in (1, 1 + is_first))
        return w8_linear.Tiles(Marks(bitmap, spent), lambda _: self.activations(num_rows, out_features))

    def head(self, num_rows: int) -> Tensor:
        x, vocab_size = (
            self.activations(num_rows, self.shapes.config.hidden_size),
            self.shapes.config.vocab_size,
        )
        if self.shapes.dense_head:
            return self.dense(x, vocab_size)
        return empty(num_rows, vocab_size, dtype=torch.float32)

    def greedy(self, logits: Tensor) -> Tensor:
        from service.kernels.greedy.triton import greedy

        return greedy(logits)

    def drawn(self, logits: Tensor, fields: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """From float32 logits with penalties: without filters, and with."""
        from service.kernels.sample.triton import sample
        from service.kernels.sample_likely.triton import sample_likely
        from service.kernels.shape_logits.triton import count_tokens, shape_logits

        state_rows = len(fields)
        occurrences = empty(state_rows, logits.shape[1], dtype=torch.int32)
        factors = empty(state_rows, len(NEUTRAL), dtype=torch.float32)
        bias_ids = empty(state_rows, MAX_BIASES, dtype=torch.int64)
        biases = empty(state_rows, MAX_BIASES, dtype=torch.float32)
        shape_logits(logits, rows, occurrences, factors, bias_ids, biases)
        # arithmetic on meta tensors would have torch import its compiler, two seconds of it
        read = sampling_rows(fields, rows, empty(len(rows), dtype=torch.int64), "full")
        keys = (read.temperature, read.seeds, read.positions, read.sample_indices)
        token_ids = sample(logits, *keys)
        count_tokens(occurrences, rows, factors, token_ids)
        return token_ids, sample_likely(logits, *keys, read.top_k, read.top_p, read.min_p)

    def activations(self, *shape: int) -> Tensor:
        return empty(*shape, dtype=self.shapes.dtype)
