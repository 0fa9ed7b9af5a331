"""The figures in docs/quality.md: named protocols and divergence beside transformers, on a real checkpoint.

    python -m tests.benchmarks.protocol_check MODEL_DIR TEXT [--windows 4] [--context 2048]

TEXT is a split of WikiText. Perplexities in fp32 by each protocol, a few windows or documents each; then the
divergence of nf4 from fp32 with fp32 activations, by our engine and by brute force: transformers' model with
the weights that the codes mean, every probability of the vocabulary, sums in float64.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from service.device import device_name
from service.engine.evaluate import Evaluation
from service.engine.startup import Serving, start
from service.messages import EngineConfig, Evaluate, Evaluated
from service.model.instance import GROUPS
from service.quality.protocols import Limits, WordPieces, cut
from service.quality.texts import Text, read_text
from tests.e2e.reference_models import load_reference, reference_logits
from tests.quality.transformers_protocols import gptq, llama_perplexity, lm_eval_word


def served(folder: Path, precision: str, context: int) -> tuple[Serving, EngineConfig]:
    config = EngineConfig(
        model_path=str(folder),
        precision=precision,
        dtype="fp32",
        device="cpu",
        kv_tokens=context + 16,
        max_context_tokens=context,
    )
    return start(config, lambda _: None, time.monotonic()), config


def evaluate(serving: tuple[Serving, EngineConfig], asked: Evaluate) -> Evaluated:
    sent: list[Evaluated] = []
    Evaluation(asked, *serving, sent.append).run()
    assert not sent[-1].error, sent[-1].error
    return sent[-1]


def compare_protocols(folder: Path, text: Text, most: int, context: int) -> None:
    peer, tokenizer = load_reference(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    serving = served(folder, "fp32", context)
    pieces = WordPieces.load(folder, serving[0].info.eos_token_ids)
    print(f"{'protocol':16} {'halftone':>10} {'transformers':>13} {'apart':>10}", flush=True)
    for name, compute, size in (
        ("gptq-2048", gptq, 2048),
        ("llama.cpp-512", llama_perplexity, 512),
        ("lm-eval-word", lm_eval_word, context),
    ):
        made = cut(name, text, pieces, Limits(context, most))
        got = evaluate(serving, Evaluate(1, made.windows, ["prefill"], scored_from=made.scored_from))
        ours = math.exp(got.nll["prefill"] / made.num_units)
        theirs = compute(peer, tokenizer, text.content, size, most)
        print(f"{name:16} {ours:10.5f} {theirs:13.5f} {ours / theirs - 1:+10.5%}   {made.words}", flush=True)


def compare_divergence(folder: Path, text: Text, most: int, context: int) -> None:
    serving = served(folder, "nf4", context)
    pieces = WordPieces.load(folder, serving[0].info.eos_token_ids)
    windows = cut("halftone", text, pieces, Limits(context, most, 257)).windows
    got = evaluate(serving, Evaluate(1, windows, ["prefill"], reference="fp32"))
    reference, dense = (load_reference(folder, torch.float32) for _ in range(2))
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for layer in serving[0].model.layers():
            for name in GROUPS:
                linear = getattr(layer, name)
                for part, spec in enumerate(linear.group.parts):
                    parameters[f"{spec.path}.weight"].copy_(linear.dense(part))
    total, agreeing, count = 0.0, 0, 0
    for window in windows:
        p, q = (reference_logits(model, window)[:-1].double().softmax(-1) for model in (reference, dense))
        total += float((p * (p / q).log()).sum())
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    print(f"{'divergence':16} {got.kl_mean:10.7f} {total / count:13.7f} {got.kl_mean - total / count:+10.1e}")
    print(
        f"{'same token':16} {got.top1_agreement:10.4%} {agreeing / count:13.4%}   {count} tokens", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="or documents, of each protocol")
    parser.add_argument("--context", type=int, default=2048, help="tokens; longer documents are cut")
    arguments = parser.parse_args()
    text = read_text(arguments.text, "text")
    print(
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"text {text.provenance}", flush=True)
    compare_protocols(arguments.model, text, arguments.windows, arguments.context)
    compare_divergence(arguments.model, text, arguments.windows, arguments.context)


if __name__ == "__main__":
    main()
