"""Before anybody is served: does an 8-bit KV cache give back what was written?

startup --model--> check_coded_cache, or DeviceError

Random K and V go through the kernels that write and read, and what comes out is compared with attention over
the values in float32. That sees a kernel that is wrong on this device, driver or compiler.
"""

import torch
import torch.nn.functional as F

from service.errors import DeviceError
from service.kernels.coded_attention import coded_attention
from service.kernels.kv_codes import is_coded
from service.kernels.paged_attention import plan_attention
from service.kernels.rotary_kv import reference as rotary_reference
from service.kernels.rotary_kv import rotary_kv
from service.model.batch import BLOCK_TOKENS, PagedKV
from service.model.instance import ModelInstance

# Relative error (root mean square) of y: codes leave 0.9 % and 3.7 %, a wrong scale, place or half of a head
# 30 % and more.
BOUNDS = {torch.int8: 0.03, torch.float8_e4m3fn: 0.1}
TOKENS = 70  # no multiple of a page or tile


@torch.inference_mode()
def check_coded_cache(model: ModelInstance) -> None:
    """A prompt, and its last token as a decode, over random K and V. Nothing for a cache without codes.

    Raises DeviceError that names the error. Norms are of ones and scores divided as usual: large ones would
    make more of a code's rounding than of a fault.
    """
    dtype, device, config = model.kv_dtype, model.device, model.config
    if not is_coded(dtype):
        return
    layer, tokens, scale = model.layers()[0], TOKENS, config.head_dim**-0.5
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, width, generator=generator).to(device, model.dtype)
    positions = torch.arange(tokens, device=device) % len(model.decoder.cos)
    slots = torch.arange(tokens, device=device) + BLOCK_TOKENS
    cos, sin = (model.decoder.cos, model.decoder.sin) if layer.rotary else (None, None)
    norm = None if layer.q_norm is None else torch.ones_like(layer.q_norm)
    arguments = (qkv, cos, sin, positions, slots, norm, norm, config.norm_eps)

    blocks = torch.arange(1, -(-tokens // BLOCK_TOKENS) + 1, dtype=torch.int32, device=device)[None]
    shape = (1, blocks.numel() + 1, config.num_kv_heads, config.head_dim)
    plain, coded = PagedKV(*shape, model.dtype, device), PagedKV(*shape, dtype, device)
    q = rotary_reference.rotary_kv(*arguments, plain.keys[0], plain.values[0])
    keys, values = (
        cache.transpose(1, 2).flatten(0, 1)[slots].transpose(0, 1).float()
        for cache in (plain.keys[0], plain.values[0])
    )
    queries = q.transpose(0, 1)[None].float()
    wanted = F.scaled_dot_product_attention(
        queries, keys[None], values[None], is_causal=True, scale=scale, enable_gqa=True
    )[0].transpose(0, 1)

    scales = coded.scales[0]
    assert scales is not None
    caches = coded.keys[0], coded.values[0], scales
    q = rotary_kv(*arguments, *caches)
    for name, num_rows in (("prompt", tokens), ("decode", 1)):
        plan = plan_attention(
            blocks, [0, num_rows], [tokens], int(num_rows == 1), deterministic=model.decoder.deterministic
        )
        got = coded_attention(q[-num_rows:].contiguous(), *caches, plan, scale).float()
        want = wanted[-num_rows:]
        error = float((got - want).norm() / want.norm())
        if not error <= BOUNDS[dtype]:
            kernels = model.kernels()
            raise DeviceError(
                f"kernels `{kernels['rotary_kv']}` and `{kernels['attention']}` keep a {name}'s K and V "
                f"wrongly in 8 bits on `{device}`: {error:.1%} off, at most {BOUNDS[dtype]:.0%} "
                "is rounding",
                hint="serve with `--kv-dtype auto`, and report what `halftone doctor` says",
            )
