"""The figures in docs/correctness.md: what the server computes beside transformers and bitsandbytes.

    python -m tests.benchmarks.quality_check MODEL_DIR TEXT [--precisions ...] [--tokens ...]
    python -m tests.benchmarks.quality_check MODEL_DIR TEXT --decode [--precisions ...]
    python -m tests.benchmarks.quality_check MODEL_DIR TEXT --neighbours [--precisions ...]

Without a flag the same windows are scored by our engine's child and by transformers' model, in which
bitsandbytes' own linears quantize the 16-bit checkpoint. `--decode`: our engine scores the same tokens by
prefill and by teacher-forced decode of one and of eight sequences. `--neighbours`: how many greedy tokens
differ between eight prompts alone and together.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import bitsandbytes
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer

from service.device import device_name
from service.engine.startup import start
from service.messages import EngineConfig
from service.quality.texts import Text, read_text, token_windows
from tests.benchmarks.awq_quality import detokenized
from tests.e2e.demo_server import serving
from tests.e2e.neighbours import answer_all, answer_each, differing, prompts_from
from tests.e2e.reference_models import LINEARS, load_reference, reference_logits

DECODE_WINDOWS = 8
DECODE_TOKENS = 2_048
NEIGHBOUR_TOKENS = 32


def reference_perplexity(folder: Path, precision: str, windows: list[list[int]]) -> float:
    """Each window alone, in one forward pass; logits in float32, sums in float64."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = load_reference(folder, dtype, LINEARS[precision])
    total, count = 0.0, 0
    for window in windows:
        logits = reference_logits(model, window)[:-1]
        losses = F.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        total += float(losses.double().sum())
        count += len(losses)
    return math.exp(total / count)


def served_perplexity(folder: Path, precision: str, windows: list[list[int]]) -> float:
    """The same through a real engine child, by Evaluate."""
    size = len(windows[0])
    with serving(folder, precision=precision, kv_tokens=2 * size) as server:
        got = server.evaluate(windows, ["prefill"])
    assert got.tokens["prefill"] == sum(len(window) - 1 for window in windows)
    return math.exp(got.nll["prefill"] / got.tokens["prefill"])


def compare(folder: Path, precisions: list[str], windows: list[list[int]]) -> None:
    print(f"{'precision':24} {'halftone':>10} {'reference':>10} {'apart':>9}", flush=True)
    for precision in precisions:
        started = time.monotonic()
        ours = served_perplexity(folder, precision, windows)
        theirs = reference_perplexity(folder, precision, windows)
        seconds = time.monotonic() - started
        print(
            f"{precision:24} {ours:10.4f} {theirs:10.4f} {ours / theirs - 1:+9.4%}   ({seconds:.0f} s)",
            flush=True,
        )


def compare_decode(folder: Path, precisions: list[str], windows: list[list[int]]) -> None:
    modes = ["prefill", "decode1", "decode8"]
    print(f"{'precision':24} {' '.join(f'{mode:>10}' for mode in modes)}  apart from prefill", flush=True)
    for precision in precisions:
        with serving(folder, precision=precision) as server:
            got = server.evaluate(windows, modes, decode_tokens=DECODE_TOKENS)
        assert len(set(got.tokens.values())) == 1, "every mode scores the same tokens"
        value = {mode: math.exp(got.nll[mode] / got.tokens[mode]) for mode in modes}
        apart = " ".join(f"{value[mode] / value['prefill'] - 1:+.4%}" for mode in modes[1:])
        print(f"{precision:24} {' '.join(f'{value[mode]:10.4f}' for mode in modes)}  {apart}", flush=True)


def compare_neighbours(folder: Path, precisions: list[str], text: list[int]) -> None:
    print(f"{'precision':24} {'answers':>10} {'tokens':>10}", flush=True)
    prompts = prompts_from(text)
    for precision in precisions:
        config = EngineConfig(
            model_path=str(folder),
            precision=precision,
            device="cpu",
            max_batch_tokens=1_024,
            prefix_cache=False,
        )
        serving = start(config, lambda _: None, time.monotonic())
        together = answer_all(serving, prompts, NEIGHBOUR_TOKENS)
        alone = answer_each(serving, prompts, NEIGHBOUR_TOKENS)
        answers, tokens = differing(together, alone)
        print(f"{precision:24} {answers:>5} of {len(prompts)} {tokens:10.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="a split of WikiText in its tokenized form")
    parser.add_argument("--precisions", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text, from its beginning")
    parser.add_argument("--window", type=int, default=1_024, help="tokens scored on their own")
    parser.add_argument("--decode", action="store_true", help="compare prefill with decode instead")
    parser.add_argument("--neighbours", action="store_true", help="compare alone with together instead")
    arguments = parser.parse_args()
    text = read_text(arguments.text, "text")
    text = Text(text.name, detokenized(text.content))
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    size = DECODE_TOKENS // DECODE_WINDOWS + 1 if arguments.decode else arguments.window
    count = DECODE_WINDOWS if arguments.decode else arguments.tokens // size
    windows = token_windows(text, tokenizer, size)[:count]
    print(
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
    )
    print(f"text {text.provenance}; {len(windows)} windows of {size} tokens", flush=True)
    if arguments.neighbours:
        precisions = arguments.precisions or [*LINEARS]
        compare_neighbours(arguments.model, precisions, [token for window in windows for token in window])
    elif arguments.decode:
        compare_decode(arguments.model, arguments.precisions or [*LINEARS, "awq"], windows)
    else:
        compare(arguments.model, arguments.precisions or list(LINEARS), windows)


if __name__ == "__main__":
    main()
