"""Perplexity of round-to-nearest and AWQ at equal bits and group size: the table in docs/quality.md.

    python -m tests.benchmarks.awq_quality MODEL_DIR TEXT --calibration FILE [--check]

WikiText's own files are tokenized (`word @-@ word`); `--wikitext` undoes that in both texts first.
"""

import argparse
import math
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version

from service.device import device_name
from service.model.checkpoint import Checkpoint
from service.model.decoder import DecoderLayer
from service.model.instance import GROUPS, ModelInstance
from service.precision import load_backend
from service.quality.texts import Text, calibration_text, read_text, refuse_overlap, token_windows
from service.quantize import quantize_to
from service.quantize.awq import Grid, round_weight
from service.quantize.awq_checkpoint import choose_grid
from service.quantize.calibration import windows_batch

WINDOW_TOKENS = 1024
COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word that holds column 0, 1, ... of its eight


def detokenized(content: str) -> str:
    """WikiText as it stands in its files -> prose."""
    content = re.sub(r" @([-.,])@ ", r"\1", content)
    content = re.sub(r" ([,.;:!?)])", r"\1", content).replace("( ", "(")
    content = content.replace(" 's", "'s").replace(" n't", "n't")
    return re.sub(r'" (.*?) "', r'"\1"', content)


@torch.inference_mode()
def perplexity(model: ModelInstance, windows: list[list[int]]) -> float:
    """Each window alone, by prefill; every token but a window's first is scored."""
    total, count = 0.0, 0
    for window in windows:
        batch, num_blocks = windows_batch([window], model.device)
        batch = replace(batch, logit_rows=torch.arange(len(window) - 1, device=model.device))
        logits = model.forward(batch, model.new_kv(num_blocks))
        total += float(F.cross_entropy(logits, batch.token_ids[1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def round_to_nearest(model: ModelInstance, grid: Grid) -> None:
    """Every linear of a 16-bit model -> its nearest values on the grid, in place."""
    for layer in model.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for name in GROUPS:
            weight = getattr(layer, name).weight
            weight.copy_(round_weight(weight.float(), None, grid).dequantize())


def independent_perplexity(folder: Path, windows: list[list[int]]) -> float:
    """The written checkpoint unpacked by a few lines of its own, in transformers' model, float32."""
    tensors = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    group_size = config.quantization_config["group_size"]
    del config.quantization_config
    weights = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name, words in tensors.items():
        if name.endswith(".qweight"):
            path = name.removesuffix(".qweight")
            shifts = torch.tensor([4 * nibble for nibble in COLUMNS])
            codes = (words.unsqueeze(-1) >> shifts & 15).flatten(1)
            zeros = (tensors[f"{path}.qzeros"].unsqueeze(-1) >> shifts & 15).flatten(1)
            scales = weights.pop(f"{path}.scales").repeat_interleave(group_size, 0)
            weights[f"{path}.weight"] = ((codes - zeros.repeat_interleave(group_size, 0)) * scales).t()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, "a tied head"
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(ids).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count)


def rows(
    model: Path, windows: list[list[int]], calibration: str, dtype: torch.dtype, check: bool
) -> Iterator[tuple[str, float]]:
    """(name of the row, perplexity), as they are measured."""
    full = load_backend({torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    device = torch.device("cpu")

    def unquantized() -> ModelInstance:
        return ModelInstance.load(model, full, device, max_context_tokens=WINDOW_TOKENS)

    yield full.name, perplexity(unquantized(), windows)
    for bits in (4, 3):
        grid = choose_grid(Checkpoint(model).config, bits, 0)
        rounded = unquantized()
        round_to_nearest(rounded, grid)
        yield f"RTN int{bits} g{grid.group_size}", perplexity(rounded, windows)
        precision = "awq" if bits == 4 else "awq:bits=3"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "awq"
            quantize_to(model, precision, out, calibration, lambda *_: None, "cpu")
            served = ModelInstance.load(
                out, load_backend(precision), device, dtype, max_context_tokens=WINDOW_TOKENS
            )
            yield f"AWQ int{bits} g{grid.group_size}", perplexity(served, windows)
            if check:
                yield f"AWQ int{bits}, transformers float32", independent_perplexity(out, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument(
        "--calibration", default="", help="text file; default: half A of Python's documentation"
    )
    parser.add_argument("--wikitext", action="store_true", help="both files are in WikiText's tokenized form")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text, from its beginning")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of activations")
    parser.add_argument("--check", action="store_true", help="also unpack into transformers, float32")
    arguments = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    text, calibration = read_text(arguments.text, "text"), calibration_text(arguments.calibration)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.wikitext:
            text = Text(text.name, detokenized(text.content))
            if arguments.calibration:
                calibration = Text(calibration.name, detokenized(calibration.content))
                arguments.calibration = str(Path(folder) / calibration.name)
                Path(arguments.calibration).write_text(calibration.content, encoding="utf-8")
        refuse_overlap(calibration, text)
        tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        windows = token_windows(text, tokenizer, WINDOW_TOKENS)[: arguments.tokens // WINDOW_TOKENS]
        print(
            f"{device_name(torch.device('cpu'))}; Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers_version}; {arguments.dtype}"
        )
        print(f"text {text.provenance}, {len(windows)} windows of {WINDOW_TOKENS} tokens")
        print(f"calibration {calibration.provenance}", flush=True)
        measured = rows(arguments.model, windows, arguments.calibration, dtype, arguments.check)
        for name, value in measured:
            print(f"{name:32} {value:8.3f}", flush=True)


if __name__ == "__main__":
    main()
