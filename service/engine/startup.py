"""From an EngineConfig to an engine that can serve: device, precision, weights, KV cache, first steps.

child --EngineConfig--> start --Loading ...--> Serving (engine, model, EngineInfo)
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from service import device as devices
from service.engine.attention_check import check_decode_attention
from service.engine.cache_check import check_coded_cache
from service.engine.engine import Engine, Limits
from service.engine.graphs import batch_sizes
from service.engine.independence import check_independence
from service.engine.kernel_shapes import shapes_of
from service.engine.kernels_ahead import KernelsAhead
from service.engine.ledger import Ledger
from service.engine.likelihood import LikelihoodCheck
from service.engine.link import Throttle
from service.engine.self_check import check_linears, check_weights
from service.engine.shortage import MIB, told_shortage, weight_bytes
from service.engine.warm_up import warm_up
from service.errors import DeviceError, PrecisionError, SettingError
from service.kernels import cuda, native
from service.messages import EngineConfig, EngineInfo, Loading
from service.model.batch import BLOCK_TOKENS, PagedKV
from service.model.checkpoint import Checkpoint, TensorSource
from service.model.instance import ModelInstance, Progress
from service.model.random_weights import Draw, RandomWeights, save_random
from service.precision import TABLE, backend_of, load_backend
from service.precision.base import Backend

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # beside that of activations
DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | KV_DTYPES).items()}
CPU_KV_TOKENS = 16384  # where the user did not say; memory is the users' own there
PROGRESS_INTERVAL_S = 0.1


@dataclass
class Serving:
    engine: Engine
    model: ModelInstance
    kv: PagedKV
    ledger: Ledger
    info: EngineInfo


class Stages:
    """Progress on the way to ready: passes it on, seldom enough, and adds up the time of each stage."""

    def __init__(self, send: Callable[[Loading], None], started_at: float) -> None:
        self.seconds: dict[str, float] = {}
        self._send = send
        self._stage = "import"
        self._since = started_at
        self._throttle = Throttle(PROGRESS_INTERVAL_S)

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        self.close()
        if stage != self._stage or done == total or self._throttle.ready():
            self._send(Loading(stage, done, total, unit))
        self._stage = stage

    def close(self) -> None:
        """Gives the time that has passed to the stage it passed in."""
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


def start(
    config: EngineConfig,
    send: Callable[[Loading], None],
    started_at: float,
    used_before: int | None = None,
) -> Serving:
    """Loads what `config` names; `started_at` is the process's beginning on the monotonic clock,
    `used_before` what all processes had of a GPU's memory until then.

    Raises HalftoneError for whatever the user can mend.
    """
    stages = Stages(send, started_at)
    stages("device", 0, 1, "devices")
    device = devices.resolve(config.device)
    if device.type == "cpu":
        choose_kernels(config)
    check_kv_dtype(config, device)
    source, backend = open_model(config, config.precision, device, stages)
    if config.save and isinstance(source, RandomWeights):
        with told_shortage(device, "a tensor of the random weights"):
            save_random(source, Path(config.tokenizer or source.path), Path(config.save), stages)
    likelihood = LikelihoodCheck.of(source, Path(config.tokenizer or source.path))
    dtype = DTYPES.get(config.dtype) or backend.activation_dtype(device, source.dtype)
    max_batch_tokens, max_batch_requests, few_batch_tokens, crowd_batch_tokens = batch_limits(config, device)
    is_gpu = devices.runs_behind(device)
    ahead: KernelsAhead | None = None
    if is_gpu:
        cuda.keep_in(Path(config.cache_dir) if config.cache_dir else None)
        kv_dtype = KV_DTYPES.get(config.kv_dtype)
        shapes = shapes_of(source, backend, config, dtype, max_batch_requests, kv_dtype)
        ahead = KernelsAhead(shapes, batch_sizes(max_batch_requests))
    model = load(config, source, backend, device, stages, dtype)
    if ahead:
        stages("kernels", 0, 1, "kernels")
        num_kernels = ahead.wait()
        stages("kernels", num_kernels, num_kernels, "kernels")
    stages("check", 0, 1, "kernels")
    with told_shortage(device, "a check of the kernels"):
        check_linears(model)
        check_weights(model, source)
        check_coded_cache(model)
        check_decode_attention(model)
        if likelihood:
            likelihood(model)
    for layer, kernel in model.kernels().items():
        logger.info("`%s` is served by %s", layer, kernel)
    is_captured = is_gpu and config.cuda_graphs == "on" and model.is_capturable
    stages("warm", 0, 1, "steps")
    del source, likelihood  # pages of a mapped checkpoint would pass for memory of ours
    peak_load_bytes = devices.memory_peak_bytes(device)
    warm_tokens = crowd_batch_tokens if is_gpu else 2 * BLOCK_TOKENS
    warm, step_bytes = devices.extra_bytes(device, lambda: warm_up(model, warm_tokens, max_batch_requests))
    step_bytes = max(step_bytes - warm.runner.kept_bytes, 0)
    graph_bytes = 0
    if is_captured:
        with told_shortage(device, f"a decode step of {max_batch_requests} requests"):
            _, graph_bytes = devices.extra_bytes(device, warm.runner.rehearse)
    del warm
    if config.deterministic:
        with told_shortage(device, "a check of requests in company"):
            check_independence(model)
    kv = make_kv(config, model, graph_bytes)
    limits = Limits(
        context_tokens(config, model, kv),
        max_batch_tokens,
        max_batch_requests,
        model.config.vocab_size,
        few_batch_tokens,
        crowd_batch_tokens,
    )
    eos_token_ids = frozenset(model.config.eos_token_ids)
    engine = Engine(
        model,
        kv,
        limits,
        device,
        eos_token_ids,
        config.prefix_cache,
        depth=int(is_gpu),
        deterministic=config.deterministic,
    )
    stages("warm", 1, 1, "steps")
    if is_captured:
        engine.runner.capture(lambda done, total: stages("capture", done, total, "graphs"))
    stages.close()
    ledger = Ledger(model, kv, engine, step_bytes, used_before)
    info = engine_info(config, model, kv, engine, stages.seconds, ledger.parts(), peak_load_bytes)
    return Serving(engine, model, kv, ledger, info)


def choose_kernels(config: EngineConfig) -> None:
    """Before a layer is built: its form depends on who multiplies. SettingError where `native` cannot be."""
    native.choose(config.cpu_kernels)
    if config.cpu_kernels == "auto" and (reason := native.absence()):
        logger.warning("torch's CPU kernels serve: %s", reason)


def check_kv_dtype(config: EngineConfig, device: torch.device) -> None:
    """SettingError where this device has no instructions for it."""
    if config.kv_dtype == "fp8" and not devices.has_e4m3(device):
        raise SettingError(
            f"setting `kv_dtype` = `fp8`: `{devices.device_name(device)}` cannot convert E4M3; GPUs of "
            "compute capability 8.9 or newer can",
            hint="`--kv-dtype int8` takes as many bytes and runs here",
        )


def load_model(
    config: EngineConfig,
    precision: str,
    device: torch.device,
    progress: Progress,
    dtype: torch.dtype | None = None,
) -> ModelInstance:
    """The configured checkpoint in this precision."""
    return load(config, *open_model(config, precision, device, progress), device, progress, dtype)


def open_source(config: EngineConfig, device: torch.device) -> TensorSource:
    """Where the tensors of the configured model come from; none is read."""
    if config.load_format == "random":
        draw = Draw(config.load_seed, config.random_outliers, config.random_std)
        return RandomWeights(Path(config.model_path), device, draw)
    return Checkpoint(config.model_path)


def open_model(
    config: EngineConfig, precision: str, device: torch.device, progress: Progress
) -> tuple[TensorSource, Backend]:
    """-> where the tensors come from, and what builds layers of them.

    A calibrated mode is quantized into the cache first; random weights are drawn as that mode packs them.
    """
    source = open_source(config, device)
    backend = choose_backend(precision, source, device)
    if backend.quantizer and source.quantization is None:
        from service.quantize import packing, prepare  # calibration is heavy and most starts do without

        if isinstance(source, RandomWeights):
            return source.quantized(packing(source.config, backend)), backend
        told = f"the 16-bit weights that `{backend.canonical}` is made from"
        with told_shortage(device, told, lambda: source.num_parameters * source.dtype.itemsize):
            path = prepare(source.path, backend, config, progress)
        source = Checkpoint(path)
    return source, backend


def load(
    config: EngineConfig,
    source: TensorSource,
    backend: Backend,
    device: torch.device,
    progress: Progress,
    dtype: torch.dtype | None,
) -> ModelInstance:
    dtype = dtype or backend.activation_dtype(device, source.dtype)
    told = f"the weights in `{backend.canonical}`"
    with told_shortage(device, told, lambda: weight_bytes(source, backend, dtype, config.head)):
        return ModelInstance.load(
            source,
            backend,
            device,
            dtype,
            head=config.head,
            max_context_tokens=config.max_context_tokens,
            deterministic=config.deterministic,
            kv_dtype=KV_DTYPES.get(config.kv_dtype),
            tokenizer=Path(config.tokenizer) if config.tokenizer else None,
            progress=progress,
        )


def choose_backend(precision: str, checkpoint: TensorSource, device: torch.device) -> Backend:
    """`auto` is what the checkpoint is: its quantization, else its 16-bit type, which a CPU has as bf16."""
    if precision != "auto":
        return load_backend(precision)
    if checkpoint.quantization is not None:
        if backend := backend_of(checkpoint.quantization):
            return backend
        method = checkpoint.quantization.get("quant_method", "unknown")
        raise PrecisionError(
            f"checkpoint `{checkpoint.path}` is quantized by `{method}`, which no precision reads; "
            f"there are {', '.join(TABLE)}",
            hint="serve the 16-bit checkpoint it was made from",
        )
    is_half = device.type == "cuda" and checkpoint.dtype == torch.float16
    return load_backend("fp16" if is_half else "bf16")


def batch_limits(config: EngineConfig, device: torch.device) -> tuple[int, int, int, int]:
    """-> tokens and requests of one step, and its tokens while few decode and while a crowd waits.

    Each request that decodes needs a token of the budget; a budget that was set holds for all of them.
    """
    defaults = devices.batch_defaults(device)
    tokens = config.max_batch_tokens or max(defaults.max_batch_tokens, config.max_batch_requests)
    requests = config.max_batch_requests or min(defaults.max_batch_requests, tokens)
    if requests > tokens:
        raise SettingError(
            f"setting `max_batch_requests` = `{requests}` is more than `max_batch_tokens` = `{tokens}`",
            hint="each request that decodes takes one token of a step: raise `max_batch_tokens`",
        )
    if config.max_batch_tokens:
        return tokens, requests, tokens, tokens
    return tokens, requests, int(tokens * defaults.few_share), tokens * defaults.crowd_factor


def num_kv_blocks(config: EngineConfig, model: ModelInstance, graph_bytes: int) -> int:
    """Blocks that requests can hold, by `kv_tokens` or by the memory that is free now, less the graphs'."""
    free = devices.memory_free_bytes(model.device) - graph_bytes
    block_bytes = model.kv_block_bytes
    if config.kv_tokens:
        wanted = -(-config.kv_tokens // BLOCK_TOKENS)
        if wanted * block_bytes > free:
            raise DeviceError(
                f"setting `kv_tokens` = `{config.kv_tokens}` needs {wanted * block_bytes // MIB} MiB on "
                f"`{model.device}`, {free // MIB} MiB are free",
                hint=f"at most {free // block_bytes * BLOCK_TOKENS} tokens fit now",
            )
        return wanted
    blocks = int(free * config.kv_memory_fraction) // block_bytes
    if model.device.type != "cuda":
        blocks = min(blocks, CPU_KV_TOKENS // BLOCK_TOKENS)
    if blocks < 2:
        raise DeviceError(
            f"no memory is left for the KV cache on `{model.device}`: {free // MIB} MiB are free, "
            f"{BLOCK_TOKENS} tokens need {block_bytes / MIB:.1f} MiB",
            hint="free memory, or choose a smaller model or precision",
        )
    return blocks


def make_kv(config: EngineConfig, model: ModelInstance, graph_bytes: int) -> PagedKV:
    """The cache that requests share, and block 0 beside it."""
    num_blocks = num_kv_blocks(config, model, graph_bytes)
    told = f"a KV cache of {num_blocks * BLOCK_TOKENS} tokens in {DTYPE_NAMES[model.kv_dtype]}"
    with told_shortage(model.device, told, lambda: (num_blocks + 1) * model.kv_block_bytes):
        kv = model.new_kv(num_blocks + 1)
        for tensor in kv.tensors:
            tensor.zero_()  # makes a CPU's pages resident now, so that memory is what the ledger says
    return kv


def context_tokens(config: EngineConfig, model: ModelInstance, kv: PagedKV) -> int:
    """Longest prompt and answer: what was asked, what the model allows, what the cache can hold."""
    room = (kv.num_blocks - 1) * BLOCK_TOKENS
    if not config.max_context_tokens:
        return min(model.config.max_context_tokens, room)
    limit, reason = min((model.config.max_context_tokens, "the model allows"), (room, "the KV cache holds"))
    if config.max_context_tokens > limit:
        raise SettingError(
            f"setting `max_context_tokens` = `{config.max_context_tokens}`: {reason} {limit}",
            hint=f"at most {limit}" + (", or raise `kv_tokens`" if limit == room else ""),
        )
    return config.max_context_tokens


def engine_info(
    config: EngineConfig,
    model: ModelInstance,
    kv: PagedKV,
    engine: Engine,
    load_seconds: dict[str, float],
    memory_bytes: dict[str, int],
    peak_load_bytes: int,
) -> EngineInfo:
    """`peak_load_bytes`: until the first steps."""
    limits = engine.limits
    return EngineInfo(
        model_path=str(model.path),
        architecture=model.config.architecture,
        precision=model.backend.canonical,
        dtype=DTYPE_NAMES[model.dtype],
        kv_dtype=DTYPE_NAMES[model.kv_dtype],
        device=str(model.device),
        device_name=devices.device_name(model.device),
        torch_version=str(torch.__version__),
        num_parameters=model.num_parameters,
        vocab_size=model.config.vocab_size,
        max_context_tokens=limits.max_context_tokens,
        kv_tokens=(kv.num_blocks - 1) * BLOCK_TOKENS,
        kv_block_tokens=BLOCK_TOKENS,
        max_batch_tokens=limits.max_batch_tokens,
        max_batch_requests=limits.max_batch_requests,
        eos_token_ids=sorted(engine.eos_token_ids),
        kernels=model.kernels(),
        memory_bytes=memory_bytes,
        weight_bytes=model.weight_bytes,
        load_seconds=load_seconds,
        peak_load_bytes=max(peak_load_bytes, devices.memory_peak_bytes(model.device)),
        calibration=calibration_of(model),
        random_weights=model.random_weights,
        deterministic=engine.deterministic,
        device_uuid=devices.device_uuid(model.device),
        device_bytes=devices.memory_total_bytes(model.device),
    )


def calibration_of(model: ModelInstance) -> dict[str, str]:
    """What a calibrated checkpoint says it was made with; empty for the others."""
    if not model.backend.quantizer:
        return {}
    from service.quantize import calibration_info

    return calibration_info(model.path)
