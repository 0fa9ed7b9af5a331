"""One decoder for the Llama family's shape, driven by ModelConfig: StepBatch and PagedKV -> logits.

add and norm -> q, k, v -> rotary, K and V into the cache -> paged attention -> o; add and norm -> gate, up ->
silu -> down. Each of these is one kernel, and the residual stream travels beside what is still to be added to
it, so that no addition stands alone. Linears are built by a precision backend, one layer for each group that
shares an input. What is the same for every layer of a step is computed once, in `Step`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from service.errors import PrecisionError
from service.kernels import decode_attention
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.coded_attention import coded_attention
from service.kernels.dense_linear import pack_weight
from service.kernels.gated_silu import gated_silu
from service.kernels.int8_rows import Live
from service.kernels.paged_attention import (
    AttentionPlan,
    decode_plan,
    mixed_plan,
    paged_attention,
    plan_attention,
)
from service.kernels.rotary_kv import rotary_kv
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch
from service.model.config import ModelConfig
from service.model.head import Embedding, FullHead, Int8Head
from service.model.layout import layer_groups
from service.model.recorded import Recordings
from service.model.rotary import rotary_table
from service.precision.base import Backend, LinearGroup, QuantLinear, Read

Observe = Callable[[str, Tensor], None]  # (a linear's path, its input [T, in_features])


@dataclass(frozen=True)
class Step:
    """What all layers of one step share."""

    batch: StepBatch
    kv: PagedKV
    cos: Tensor  # float32 [positions, head_dim], the whole table
    sin: Tensor
    attention: AttentionPlan
    decode: decode_attention.Variant | None  # does rotary and attention of decodes at once, if anything
    out: Tensor | None = None  # [T, heads, head_dim], for attention in a step with padding


def decode_shape(config: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype) -> decode_attention.Shape:
    """Of a model's decodes, for the kernel that does their rotary embedding and attention at once."""
    heads = config.head_dim, config.num_heads, config.num_kv_heads
    return decode_attention.Shape(*heads, dtype, kv_dtype, is_normed=config.qk_norm)


class DecoderLayer(nn.Module):
    """The residual stream and what is to be added to it, [T, hidden] each -> the same two."""

    input_norm: Tensor  # [hidden]
    post_attention_norm: Tensor  # [hidden]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    qkv_proj: QuantLinear
    o_proj: QuantLinear
    gate_up_proj: QuantLinear
    down_proj: QuantLinear

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Backend,
        read: Read,
        device: torch.device,
        dtype: torch.dtype,
        deterministic: bool,
        live: Live,
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.live = live
        self.deterministic = deterministic
        self.window = config.windows[index]
        self.rotary = config.rotary[index]
        prefix = f"model.layers.{index}"

        def norm(name: str) -> Tensor:
            return read(f"{prefix}.{name}.weight").to(device, dtype, copy=True)

        self.register_buffer("input_norm", norm("input_layernorm"))
        self.register_buffer("post_attention_norm", norm("post_attention_layernorm"))
        self.register_buffer("q_norm", norm("self_attn.q_norm") if config.qk_norm else None)
        self.register_buffer("k_norm", norm("self_attn.k_norm") if config.qk_norm else None)
        groups = layer_groups(config, index)
        self.paths = {name: tuple(part.path for part in parts) for name, parts in groups.items()}
        for name, parts in groups.items():
            group = LinearGroup(name, parts, device, dtype, deterministic, live)
            self.add_module(name, backend.build(group, read))
        # called as functions: a module's own call, and finding it, take as long as a row's kernel
        self._qkv, self._o = self.qkv_proj.normed, self.o_proj.forward
        self._gate_up, self._down = self.gate_up_proj.normed, self.down_proj.gated
        self._gated, self._down_alone = self.gate_up_proj.normed_gated, self.down_proj.forward

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        step: Step,
        observe: Observe | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`wanted`: int64 [R], the rows that somebody reads, where nobody reads the others; R rows go on."""
        eps = self.config.norm_eps
        if observe:
            self._show(observe, "qkv_proj", add_rms_norm(hidden, delta, self.input_norm, eps)[1])
        hidden, x = self._qkv(hidden, delta, self.input_norm, eps)
        x = self.attend(x, step)
        if wanted is not None:
            hidden, x = hidden.index_select(0, wanted), x.index_select(0, wanted)
            self.live.slots = step.batch.logit_slots
            if not len(wanted):
                return hidden, None
        if observe:
            self._show(observe, "o_proj", x)
        delta = self._o(x)
        if observe:
            self._show(observe, "gate_up_proj", add_rms_norm(hidden, delta, self.post_attention_norm, eps)[1])
        elif made := self._gated(hidden, delta, self.post_attention_norm, eps):
            return made[0], self._down_alone(made[1])
        hidden, x = self._gate_up(hidden, delta, self.post_attention_norm, eps)
        if observe:
            self._show(observe, "down_proj", gated_silu(x, self.deterministic))
        return hidden, self._down(x)

    def attend(self, qkv: Tensor, step: Step) -> Tensor:
        """Packed q, k, v [T, (heads + 2 kv_heads) * head_dim] -> [T, heads * head_dim]."""
        config, plan, kv = self.config, step.attention, step.kv
        width = config.num_heads * config.head_dim
        if step.decode is None:
            return self._attended(self._rotated(qkv, step), step, plan, step.out).view(-1, width)
        count, prompts = plan.num_decode, None
        if count < plan.num_sequences:
            plan, prompts = plan.apart
        out = step.out
        if out is None:
            out = qkv.new_empty(len(qkv), config.num_heads, config.head_dim)
        # of a captured step all rows, before the decode, which then writes K and V of its own once more
        q = None if prompts is None else self._rotated(qkv, step, prompts.first_row)
        cos, sin = (step.cos, step.sin) if self.rotary else (None, None)
        decode_attention.decode_attention(
            step.decode, qkv[:count], cos, sin, self.q_norm, self.k_norm, config.norm_eps,
            kv.keys[self.index], kv.values[self.index], plan, config.attention_scale, self.window,
            scales=kv.scales[self.index], out=out[:count],
        )  # fmt: skip
        if prompts is not None and q is not None:
            # of a captured step after the decode, which writes zeros where nobody decodes
            self._attended(q, step, prompts, out[prompts.first_row :])
        return out.view(-1, width)

    def _rotated(self, qkv: Tensor, step: Step, first: int = 0) -> Tensor:
        """-> q of the rows from `first` on, [rows, heads, head_dim]; their K and V are in the cache."""
        kv, positions, slots = step.kv, step.batch.positions, step.batch.slots
        if first:
            qkv, positions, slots = qkv[first:], positions[first:], slots[first:]
        cos, sin = (step.cos, step.sin) if self.rotary else (None, None)
        return rotary_kv(
            qkv, cos, sin, positions, slots, self.q_norm, self.k_norm, self.config.norm_eps,
            kv.keys[self.index], kv.values[self.index], kv.scales[self.index],
        )  # fmt: skip

    def _attended(self, q: Tensor, step: Step, plan: AttentionPlan, out: Tensor | None) -> Tensor:
        """-> [rows, heads, head_dim], in `out` if it is given."""
        kv, config = step.kv, self.config
        keys, values, scales = kv.keys[self.index], kv.values[self.index], kv.scales[self.index]
        scale, window = config.attention_scale, self.window
        if scales is None:
            return paged_attention(q, keys, values, plan, scale, window, out=out)
        return coded_attention(q, keys, values, scales, plan, scale, window, out=out)

    def _show(self, observe: Observe, group: str, x: Tensor) -> None:
        for path in self.paths[group]:
            observe(path, x)


class Decoder(nn.Module):
    """Token ids -> logits."""

    embedding: Embedding
    final_norm: Tensor  # [hidden]
    cos: Tensor  # float32 [max_context_tokens, head_dim]
    sin: Tensor
    head: FullHead | Int8Head

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        read: Read,
        device: torch.device,
        dtype: torch.dtype,
        *,
        head: str = "16bit",
        max_context_tokens: int = 0,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: a row's logits depend on its own sequence alone, bit for bit; PrecisionError where
        a layer cannot do that."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.deterministic = deterministic
        self.live = Live(first_slot=BLOCK_TOKENS)  # block 0 takes what padding writes
        weight = read("model.embed_tokens.weight").to(device, dtype, copy=True)
        self.embedding = Embedding(weight, is_head=config.tied_head and head == "16bit")
        self.layers = nn.ModuleList()
        for index in range(config.num_layers):
            layer = DecoderLayer(config, index, backend, read, device, dtype, deterministic, self.live)
            if deterministic:
                refuse_variance(backend.canonical, {name: getattr(layer, name) for name in layer.paths})
            self.layers.append(layer)
        self.register_buffer("final_norm", read("model.norm.weight").to(device, dtype, copy=True))
        if not config.tied_head:
            weight = read("lm_head.weight").to(device, dtype, copy=True)
        if head == "int8":
            self.head = Int8Head(weight)
        else:
            weight = self.embedding.weight if config.tied_head else pack_weight(weight)
            self.head = FullHead(weight, deterministic=deterministic)
        if deterministic:
            refuse_variance(backend.canonical, {"lm_head": self.head})
        positions = max_context_tokens or config.max_context_tokens
        cos, sin = rotary_table(config.rope, config.head_dim, positions, device)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.eval().requires_grad_(False)
        self.recordings = Recordings()

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv: PagedKV, observe: Observe | None = None) -> Tensor:
        """-> logits [R, vocab], any float type, a row for each of `batch.logit_rows`.

        `observe` is called with each linear's path and input; parts of a group are given the same tensor.
        """
        hidden = self.embed(batch.token_ids)
        if observe is None and (x := self.recordings.decode(self._decode, hidden, batch, kv)) is not None:
            return self.head(x)
        step = self.prepare(batch, kv)
        if observe is None and len(batch.logit_rows) < len(hidden):
            # of a prompt's other rows the last layer owes the cache K and V, and nobody anything else
            hidden, delta = self.all_layers(hidden, step, wanted=batch.logit_rows)
            return self.head(self._final(hidden, delta))
        hidden, delta = self.all_layers(hidden, step, observe)
        return self.logits(hidden, delta, batch.logit_rows)

    def all_layers(
        self,
        hidden: Tensor,
        step: Step,
        observe: Observe | None = None,
        before_layer: Callable[[int], None] | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, hidden] -> the residual stream and what is to be added to it, of the rows `wanted` if given."""
        delta: Tensor | None = None
        self.live.slots = step.batch.slots
        last = len(self.layers) - 1
        try:
            for index, layer in enumerate(self.layers):
                if before_layer:
                    before_layer(index)
                hidden, delta = layer(hidden, delta, step, observe, wanted if index == last else None)
        finally:
            self.live.slots = None
        return hidden, delta

    def _decode(
        self, hidden: Tensor, batch: StepBatch, kv: PagedKV, before_layer: Callable[[int], None]
    ) -> Tensor:
        """What is recorded: [T, hidden] -> [T, hidden], normed for lm_head."""
        return self._final(*self.all_layers(hidden, self.prepare(batch, kv), None, before_layer))

    def _final(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        """-> [T, hidden], normed for lm_head."""
        return add_rms_norm(hidden, delta, self.final_norm, self.config.norm_eps)[1]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden]."""
        hidden: Tensor = self.embedding(token_ids)
        return hidden

    def logits(self, hidden: Tensor, delta: Tensor | None, rows: Tensor) -> Tensor:
        """The last layer's outcome and int64 [R] -> [R, vocab], any float type."""
        if len(rows) < len(hidden):  # else they are all
            hidden = hidden.index_select(0, rows)
            delta = None if delta is None else delta.index_select(0, rows)
        return self.head(self._final(hidden, delta))

    def prepare(self, batch: StepBatch, kv: PagedKV) -> Step:
        """What the layers of this step share; a layer alone is `decoder.layers[i](hidden, delta, step)`."""
        config = self.config
        shape = decode_shape(config, self.dtype, kv.keys[0].dtype)
        step = plan_step(batch, kv, self.cos, self.sin, self.deterministic, shape)
        if batch.tiles is None:
            return step
        # rows of padding are written by nobody, and what they hold must be numbers: one tensor for all layers
        out = self.embedding.weight.new_zeros(
            len(batch.positions), config.num_heads, config.head_dim, dtype=self.dtype
        )
        return replace(step, out=out)


def plan_step(
    batch: StepBatch,
    kv: PagedKV,
    cos: Tensor,
    sin: Tensor,
    deterministic: bool = False,
    shape: decode_attention.Shape | None = None,
) -> Step:
    """A batch with what its layers share; `cos` and `sin`: the rotary table, [positions, head_dim].

    `shape`: of decodes, which one kernel may then serve.
    """
    if batch.lengths is None or batch.starts is None or batch.context_lengths:
        plan = plan_attention(
            batch.block_tables,
            batch.query_starts,
            batch.context_lengths,
            batch.num_decode,
            batch.lengths,
            batch.starts,
            deterministic=deterministic,
        )
    elif batch.tiles:
        plan = mixed_plan(
            batch.block_tables, batch.lengths, batch.starts, batch.num_decode, batch.tiles, deterministic
        )
    else:
        plan = decode_plan(batch.block_tables, batch.lengths, batch.starts, deterministic=deterministic)
    return Step(batch, kv, cos, sin, plan, decode_attention.serving(shape, plan) if shape else None)


def refuse_variance(precision: str, layers: Mapping[str, QuantLinear | FullHead | Int8Head]) -> None:
    """PrecisionError if a row's result may depend on the rows beside it in one of these."""
    for name, layer in layers.items():
        if not layer.row_invariant:
            raise PrecisionError(
                f"setting `deterministic` with precision `{precision}`: `{name}` is served by "
                f"`{layer.kernel}`, whose results depend on how many rows it is given",
                hint="on a GPU fp32, bf16, fp16, int8 and awq can be deterministic, on a CPU fp32 and, with "
                "native kernels, bf16, int8, fp8, nf4 and awq; each with `--head 16bit`",
            )
