"""Perplexity as served beside the same codes dequantized: do kernels of a precision cost any quality?

    python -m tests.benchmarks.dequantized_quality [MODEL] [--precisions int8,fp8,nf4,awq,int3] [--windows 32]

Each mode is started as a server's engine starts it, and scores windows of text by prefill and, token by token
through the steps that serve, by decode: eight sequences at once all windows, one alone the first few. Beside
each stand the same tokens by prefill of the same codes in plain torch (tests/dequantized_model): `apart` is
their difference, paired token by token, with its standard error over windows. `weights alone` leaves
activations of int8 and fp8 in 16 bits, which tells what their codes cost.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch

from service import device as devices
from service.config import load_settings
from service.engine.dtypes import DTYPE_NAMES, DTYPES
from service.engine.forced_decode import ForcedDecode
from service.engine.sources import open_model
from service.engine.startup import Serving, start
from service.engine.window_scores import paired
from service.errors import HalftoneError
from service.messages import EngineConfig
from service.model.batch import BLOCK_TOKENS, sequence_batch
from service.model.hub import resolve
from service.model.instance import ModelInstance
from service.precision.spec import split_list
from service.quality.divergence import negative_log_likelihood
from service.quality.protocols import Limits, WordPieces, cut
from service.quality.texts import evaluation_text
from tests.dequantized_model import dequantized

LANES = 8
BOUND = 0.2  # percent
HEADER = (
    f"{'mode':20} {'way':9} {'tokens':>7} {'served':>9} {'dequantized':>11} {'apart, %':>16} "
    f"{f'in {BOUND} %':>10} {'weights alone':>13} {'apart, %':>16}"
)

Windows = Sequence[list[int]]
Nats = list[list[float]]  # window, scored token


class Stages:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - began

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())


@torch.inference_mode()
def by_prefill(model: ModelInstance, windows: Windows) -> Nats:
    """Each window in one forward pass of its own."""
    num_blocks = -(-max(map(len, windows)) // BLOCK_TOKENS)
    kv, blocks = model.new_kv(num_blocks + 1), list(range(1, num_blocks + 1))
    nats: Nats = []
    for window in windows:
        batch = sequence_batch(window[:-1], blocks, model.device)
        logits = model.forward(replace(batch, logit_rows=batch.positions), kv)
        nats.append(negative_log_likelihood(logits, torch.tensor(window[1:], device=model.device)).tolist())
    return nats


@torch.inference_mode()
def by_decode(serving: Serving, windows: Windows, num_lanes: int) -> Nats:
    """Windows of one length, `num_lanes` at once, each token a step; the engine must be idle."""
    cache, nats = serving.engine.cache, []
    for first in range(0, len(windows), num_lanes):
        group = windows[first : first + num_lanes]
        num_blocks = -(-len(group[0]) // BLOCK_TOKENS)
        held = cache.allocate((), num_blocks * len(group))
        assert held is not None, "the cache was made for that many"
        decode = ForcedDecode(
            serving, group, [held[lane * num_blocks :][:num_blocks] for lane in range(len(group))]
        )
        targets = torch.tensor([window[1:] for window in group], device=serving.model.device)
        steps = [
            negative_log_likelihood(decode.logits(len(group), position), targets[:, position]).tolist()
            for position in range(targets.shape[1])
        ]
        cache.release(held)
        nats += [list(lane) for lane in zip(*steps, strict=True)]
    return nats


def perplexity(nats: Nats) -> float:
    values = list(chain.from_iterable(nats))
    return math.exp(math.fsum(values) / len(values))


def apart(ours: Nats, base: Nats) -> tuple[float, float]:
    """Percent by which the perplexity of `ours` is above that of the same windows in `base`, and its standard
    error."""
    pairs = paired(ours, base[: len(ours)])
    ratio = math.exp(pairs.mean)
    return 100 * (ratio - 1), 100 * ratio * pairs.standard_error


def verdict(percent: float, error: float) -> str:
    """`no` only of what two standard errors do not explain, `yes` only where the error is no larger than the
    bound."""
    if abs(percent) - 2 * error > BOUND:
        return "no"
    return "yes" if max(abs(percent), error) <= BOUND else "undecided"


def told(percent: float, error: float) -> str:
    return f"{percent:+.3f} ± {error:.3f}"


def row(mode: str, way: str, ours: Nats, base: Nats, alone: Nats | None) -> str:
    percent, error = apart(ours, base)
    text = (
        f"{mode:20} {way:9} {sum(map(len, ours)):7} {perplexity(ours):9.4f} "
        f"{perplexity(base[: len(ours)]):11.4f} {told(percent, error):>16} {verdict(percent, error):>10}"
    )
    if alone is None:
        return text
    return f"{text} {perplexity(alone[: len(ours)]):13.4f} {told(*apart(ours, alone)):>16}"


def compare(config: EngineConfig, windows: Windows, num_single: int, dtype: torch.dtype | None) -> None:
    """Prints a mode's rows; `dtype`: of the dequantized model's activations, None: the served one's."""
    stages = Stages()
    device = devices.resolve(config.device)
    with stages("open"):  # a calibrated mode is quantized here
        source, _ = open_model(config, config.precision, device, lambda *_: None)
    with stages("start"):
        serving = start(config, lambda _: None, time.monotonic())
    model = serving.model
    served: dict[str, Nats] = {}
    with stages("prefill"):
        served["prefill"] = by_prefill(model, windows)
    for num_lanes, decoded in ((1, windows[:num_single]), (LANES, windows)):
        with stages(f"decode {num_lanes}"):
            served[f"decode {num_lanes}"] = by_decode(serving, decoded, num_lanes)
    with stages("dequantized"):
        base = by_prefill(dequantized(model, source, dtype), windows)
    alone = None
    if model.backend.activation != "16bit":
        with stages("weights alone"):
            weights = dequantized(model, source, dtype, codes_activations=False)
            alone = by_prefill(weights, windows)
    for way, nats in served.items():
        print(row(model.backend.canonical, way, nats, base, alone))
    print(f"  activations {DTYPE_NAMES[model.dtype]}; {model.kernels()['qkv_proj']}; seconds: {stages}")
    load_seconds = ", ".join(f"{name} {seconds:.1f}" for name, seconds in serving.info.load_seconds.items())
    print(f"  of start: {load_seconds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="folder, hub id or `demo`")
    parser.add_argument("--precisions", default="int8,fp8,nf4,awq,int3")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=513, help="one is not scored")
    parser.add_argument("--single", type=int, default=8, help="windows that are decoded alone, 1 or more")
    parser.add_argument("--text", default="", help="file, or text of the hub; default: half B of Python's")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16"), default="auto", help="of activations")
    parser.add_argument(
        "--dequantized-dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="of the dequantized model's activations; auto: those of the served one",
    )  # fmt: skip
    arguments = parser.parse_args()
    cache_dir = load_settings().cache_dir
    folder = resolve(arguments.model, "main", cache_dir, lambda *_: None)
    text = evaluation_text(arguments.text)
    limits = Limits(sys.maxsize, arguments.windows, arguments.window_tokens)
    windows = cut("halftone", text, WordPieces.load(folder, []), limits).windows
    device = devices.device_name(devices.resolve(arguments.device))
    print(f"{device}; torch {torch.__version__}; {folder.name}; text {text.provenance}")
    print(f"{len(windows)} windows of {arguments.window_tokens} tokens\n{HEADER}", flush=True)
    failed = False
    for precision in split_list(arguments.precisions):
        config = EngineConfig(
            model_path=str(folder),
            precision=precision,
            device=arguments.device,
            dtype=arguments.dtype,
            max_batch_tokens=1024,
            max_batch_requests=LANES,
            kv_tokens=(LANES + 1) * -(-arguments.window_tokens // BLOCK_TOKENS) * BLOCK_TOKENS,
            cache_dir=str(cache_dir),
        )
        try:
            compare(config, windows, arguments.single, DTYPES.get(arguments.dequantized_dtype))
        except HalftoneError as error:
            print(f"{precision}: {error}", flush=True)
            failed = True
        devices.release_cached(devices.resolve(arguments.device))
    sys.exit(failed)


if __name__ == "__main__":
    main()
