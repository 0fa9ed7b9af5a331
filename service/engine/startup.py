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
from service.engine.canary import check_canary
from service.engine.dtypes import DTYPE_NAMES, DTYPES, KV_DTYPES
from service.engine.engine import Engine, Limits
from service.engine.graphs import batch_sizes
from service.engine.independence import check_independence
from service.engine.kernel_shapes import shapes_of
from service.engine.kernel_times import kernel_seconds
from service.engine.kernels_ahead import KernelsAhead
from service.engine.kv_room import context_tokens, make_kv
from service.engine.ledger import Ledger
from service.engine.likelihood import LikelihoodCheck
from service.engine.link import Throttle
from service.engine.self_check import check_linears, check_weights
from service.engine.shortage import told_shortage, weight_bytes
from service.engine.sources import open_model
from service.engine.warm_up import warm_up
from service.errors import SettingError
from service.kernels import cuda, native
from service.messages import EngineConfig, EngineInfo, Loading
from service.model.batch import BLOCK_TOKENS, PagedKV
from service.model.checkpoint import TensorSource
from service.model.instance import ModelInstance, Progress
from service.model.random_weights import RandomWeights, save_random
from service.precision.base import Backend

logger = logging.getLogger(__name__)

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
    max_batch_tokens, max_batch_requests, few_batch_tokens, crowd_batch_tokens = batch_limits(
        config, device, backend
    )
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
        canary = check_canary(model, config, stages) if config.canary else {}
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
    times = kernel_seconds(model, kv, max_batch_requests) if config.time_kernels else {}
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
    info.canary = canary
    info.kernel_seconds = times
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


def batch_limits(config: EngineConfig, device: torch.device, backend: Backend) -> tuple[int, int, int, int]:
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
    few_share = defaults.few_share_decoded if backend.decodes_weights else defaults.few_share
    if backend.activation != "16bit":
        few_share = 1.0
    return tokens, requests, int(tokens * few_share), tokens * defaults.crowd_factor


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
