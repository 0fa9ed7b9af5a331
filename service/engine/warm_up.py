"""First steps before anybody waits for one: layers and allocators do their once-only work, kernels are built.

startup --model--> warm_up --> an engine over a small cache of its own
"""

from itertools import count

import torch

from service import device as devices
from service.engine.engine import Engine, Limits
from service.engine.shortage import MIB, shortage
from service.errors import PrecisionError
from service.kernels.coded_attention import workspace_bytes
from service.kernels.kv_codes import is_coded
from service.messages import NO_MEMORY, Sampling, Submit
from service.model.batch import BLOCK_TOKENS
from service.model.decoder import DecoderLayer
from service.model.head import FullHead, Int8Head
from service.model.instance import ModelInstance
from service.precision.base import QuantLinear

# prompts that arrive one step apart, so that parts of prompts meet decoding rows: tokens, sampling
MEETING = (
    (1, Sampling(6, temperature=0, ignore_eos=True)),
    (40, Sampling(5, ignore_eos=True)),
    (200, Sampling(4, top_k=5, min_tokens=3, logprobs=2)),
    (9, Sampling(4, frequency_penalty=0.5, ignore_eos=True)),
    (70, Sampling(1, prompt_logprobs=1, ignore_eos=True)),
)

# cuBLAS has tiles for each multiple of eight rows; for many rows large ones do, in the end the same for all
FINE_ROWS, MANY_ROWS, COARSE_ROWS, MOST_ROWS = 8, 1024, 128, 4096


@torch.inference_mode()
def warm_up(model: ModelInstance, num_tokens: int, num_requests: int) -> Engine:
    """A largest step of one prompt and one decode step; on a GPU, whose kernels are built at their first use,
    also steps of each kind.

    Raises PrecisionError where the model fails on them, DeviceError where memory does.
    """
    num_tokens = max(2, min(num_tokens, model.decoder.cos.shape[0] - 1))
    kv = model.new_kv(num_tokens // BLOCK_TOKENS + 2)
    limits = Limits(num_tokens + 1, num_tokens, min(num_requests, num_tokens), model.config.vocab_size)
    engine = Engine(model, kv, limits, model.device, deterministic=model.decoder.deterministic)
    touch_workspace(model)
    ids = count()
    engine.add(Submit(next(ids), [0] * (num_tokens - 1), Sampling(2, top_p=0.5, ignore_eos=True)))
    run(engine, model)
    if devices.runs_behind(model.device):
        for length, sampling in MEETING:
            engine.add(Submit(next(ids), [0] * min(length, num_tokens - 1), sampling))
            run(engine, model, 1)
        run(engine, model)
    touch_kernels(model, num_tokens, num_requests)
    devices.synchronize(model.device)
    return engine


def touch_workspace(model: ModelInstance) -> None:
    """Attention over 8-bit codes may need more behind a long prefix than in a largest step without one."""
    if is_coded(model.kv_dtype):
        config = model.config
        num_bytes = workspace_bytes(config.num_kv_heads, config.head_dim, model.dtype, model.device)
        torch.empty(num_bytes, dtype=torch.uint8, device=model.device)


@torch.inference_mode()
def touch_kernels(model: ModelInstance, num_tokens: int, num_requests: int) -> None:
    """Launches a library's kernels for other numbers of rows too.

    At the first launch of each its code is loaded, and for that the whole device is waited: a pause of some
    50 ms in the middle of other requests' answers.
    """
    layer = model.decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    served: list[tuple[QuantLinear | FullHead | Int8Head, int, int]] = [
        (model.decoder.head, model.config.hidden_size, num_requests)
    ]
    for group in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj):
        served.append((group, group.group.in_features, num_tokens))
    for linear, in_features, most_rows in served:
        if linear.chosen_by_rows:
            x = torch.zeros(most_rows, in_features, dtype=model.dtype, device=model.device)
            fine = range(FINE_ROWS, min(most_rows, MANY_ROWS + 1), FINE_ROWS)
            coarse = range(MANY_ROWS + COARSE_ROWS, min(most_rows, MOST_ROWS), COARSE_ROWS)
            for num_rows in (*fine, *coarse, most_rows):
                linear(x[:num_rows])


def run(engine: Engine, model: ModelInstance, max_steps: int = 1 << 20) -> None:
    """Steps while there is work."""
    while engine.has_work and max_steps:
        max_steps -= 1
        for output in engine.step().outputs:
            if output.error == NO_MEMORY:
                told = f"a step of {engine.limits.max_batch_tokens} tokens"
                raise shortage(model.device, f"{told} beside {model.weight_bytes // MIB} MiB of weights")
            if output.error:
                raise PrecisionError(
                    f"precision `{model.backend.canonical}` fails on its first tokens: {output.error}",
                    hint="try another `--precision` or `--dtype`, and look at the log above",
                )
