"""Before anybody is served: does the kernel that decodes in one launch compute attention?

startup --model--> check_decode_attention, or DeviceError

Random K and V, or their codes, sequences of one token to several pages, and as many of them as choose each
variant. What comes out is compared with attention in float32 over what the cache means, and what is written
with rotary_kv's definition. That sees a kernel that is wrong on this device, driver or compiler.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from service.errors import DeviceError
from service.kernels.decode_attention import Row, decode_attention
from service.kernels.kv_codes import dequantized, quantized
from service.kernels.paged_attention import decode_plan
from service.kernels.rotary_kv import coded, reference
from service.model.batch import BLOCK_TOKENS, PagedKV
from service.model.instance import ModelInstance

# Relative error (root mean square): 16 bits leave 0.4 %, a wrong page or half of a head 30 % and more.
BOUND = 0.02
LENGTHS = (70, 1, 16, 17, 200, 33)  # of sequence after sequence


@torch.inference_mode()
def check_decode_attention(model: ModelInstance) -> None:
    """Every variant that may serve; nothing where none does. Raises DeviceError that names the error."""
    rows, last = model.decodes(), 0
    for row in rows:
        for name, error in errors(model, row, last + 1).items():
            if not error <= BOUND:  # NaN too
                raise DeviceError(
                    f"kernel `{row.variant.name}` computes a decode's {name} wrongly on `{model.device}`: "
                    f"{error:.1%} off with {last + 1} sequences, at most {BOUND:.0%} is rounding",
                    hint="serve with `--deterministic`, which uses other kernels, and report what "
                    "`halftone doctor` says",
                )
        last = row.max_sequences or 0


def errors(model: ModelInstance, row: Row, sequences: int) -> dict[str, float]:
    """Relative errors of y, K and V. Norms are of ones and scores divided as usual: large ones would make
    more of rounding than of a fault."""
    config, device, layer = model.config, model.device, model.layers()[0]
    positions_known = len(model.decoder.cos)
    lengths = [min(LENGTHS[i % len(LENGTHS)], positions_known) for i in range(sequences)]
    pages = [-(-length // BLOCK_TOKENS) for length in lengths]
    kv = PagedKV(1, sum(pages) + 1, config.num_kv_heads, config.head_dim, model.kv_dtype, device)
    keys, values, scales = kv.keys[0], kv.values[0], kv.scales[0]
    generator = torch.Generator().manual_seed(0)
    for part, cache in enumerate((keys, values)):
        made = torch.randn(cache.shape, generator=generator)
        if scales is not None:
            made, scales[..., part] = quantized(made, cache.dtype)
        cache.copy_(made)
    blocks = (torch.randperm(sum(pages), generator=generator) + 1).to(device, torch.int32)
    tables = torch.zeros(sequences, max(pages), dtype=torch.int32, device=device)
    for sequence, mine in enumerate(blocks.split(pages)):
        tables[sequence, : len(mine)] = mine
    told = torch.tensor(lengths, device=device)
    step = decode_plan(tables, told.int())
    positions = told - 1
    slots = tables.long().gather(1, positions[:, None] // BLOCK_TOKENS)[:, 0] * BLOCK_TOKENS
    slots += positions % BLOCK_TOKENS
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    qkv = torch.randn(sequences, width, generator=generator).to(device, model.dtype)
    cos, sin = (model.decoder.cos, model.decoder.sin) if layer.rotary else (None, None)
    norm = None if layer.q_norm is None else torch.ones_like(layer.q_norm)
    scale, window = config.head_dim**-0.5, layer.window

    arguments = qkv, cos, sin, positions, slots, norm, norm, config.norm_eps
    wanted = [cache.clone() for cache in kv.tensors]
    q = (reference if scales is None else coded).rotary_kv(*arguments, *wanted)
    # what is read before the wait for the predecessor was written before the definition was computed
    got = decode_attention(
        row.variant, qkv, cos, sin, norm, norm, config.norm_eps, keys, values, step, scale, window,
        scales=scales,
    )  # fmt: skip
    wanted_keys, wanted_values = meant(*wanted)
    want = torch.empty_like(got, dtype=torch.float32)
    for sequence, length in enumerate(lengths):
        mine = tables[sequence, : pages[sequence]].long()
        seen = slice(max(0, length - window) if window else 0, length)
        k, v = (
            cache[mine].transpose(0, 1).flatten(1, 2)[None, :, seen] for cache in (wanted_keys, wanted_values)
        )
        query = q[sequence][None, :, None].float()
        want[sequence] = F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)[0, :, 0]
    found_keys, found_values = meant(keys, values, scales)
    found = {
        "attention": (got.float(), want),
        "K": (found_keys, wanted_keys),
        "V": (found_values, wanted_values),
    }
    return {name: float((one - other).norm() / other.norm()) for name, (one, other) in found.items()}


def meant(keys: Tensor, values: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A cache of values or of codes in float32."""
    if scales is None:
        return keys.float(), values.float()
    return dequantized(keys, scales[..., 0]), dequantized(values, scales[..., 1])
