"""Calibrated precisions as steps from one checkpoint to another: 16-bit folder -> quantized folder.

"In flight" means `prepare`: quantize into the cache, then serve what is there. `quantize_to` is the same
step with a folder of the user's choice.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from service import device as devices
from service.errors import CheckpointError, PrecisionError, SettingError, SystemProblem
from service.messages import EngineConfig
from service.model.checkpoint import Checkpoint
from service.model.config import ModelConfig
from service.model.folders import MANIFEST, is_whole, make_whole
from service.precision import load_backend
from service.precision.base import Backend
from service.quality.texts import Text, calibration_text
from service.quantize.awq import Grid
from service.quantize.awq_checkpoint import (
    Progress,
    checkpoint_bytes,
    choose_grid,
    quantization_config,
    quantize_checkpoint,
)
from service.quantize.cache import cache_key, code_version, locked, source_sha256

QUANTIZER = "awq"  # the `Backend.quantizer` that this package has a step for


def prepare(checkpoint_path: Path, backend: Backend, config: EngineConfig, progress: Progress) -> Path:
    """Folder in `config.cache_dir` with this checkpoint in this precision, made on the first call.

    Its name has a hash of the weights, the calibration text, the options and the quantizer's code.
    Raises PrecisionError, CheckpointError, SettingError, or SystemProblem when the disk has no room.
    """
    if config.tokenizer:
        raise own_tokenizer(config.tokenizer)
    progress("calibrate", 0, 1, "steps")
    text = calibration_text(config.calibration)
    cache = Path(config.cache_dir)
    source = source_sha256(checkpoint_path, cache)
    key = cache_key(source, text.sha256, backend.canonical, code_version())
    folder = cache / "quantized" / f"{checkpoint_path.name}-{backend.name}-{key}"
    if not is_whole(folder):
        with locked(folder.parent / f"{folder.name}.lock"):
            if not is_whole(folder):  # another process may have made it while this one waited
                device = devices.resolve(config.device)
                _make(checkpoint_path, source, backend, folder, text, device, progress)
    return folder


def quantize_to(
    checkpoint_path: Path,
    precision: str,
    out: Path,
    calibration: str,
    progress: Progress,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> None:
    """Write the checkpoint in this precision to `out`; SystemProblem if something is there already.

    `calibration` is a text file; empty: half A of the interpreter's documentation.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemProblem(
            f"`{out}` is there already and not an empty folder", hint="choose another folder with `--out`"
        )
    backend, text = load_backend(precision), calibration_text(calibration)
    source = source_sha256(checkpoint_path)
    _make(checkpoint_path, source, backend, out, text, devices.resolve(device), progress)


def packing(config: ModelConfig, backend: Backend) -> dict[str, Any]:
    """`quantization_config` of this model in a calibrated mode, whatever its weights are."""
    return quantization_config(grid_of(config, backend))


def grid_of(config: ModelConfig, backend: Backend) -> Grid:
    options = backend.options.model_dump()
    return choose_grid(config, options["bits"], options["group"])


def own_tokenizer(given: str) -> SettingError:
    return SettingError(
        f"setting `tokenizer` = `{given}`: calibration reads the checkpoint's own tokenizer",
        hint="put tokenizer.json into the checkpoint's folder, or choose a mode that is not calibrated",
    )


def calibration_info(checkpoint_path: Path) -> dict[str, str]:
    """text, sha256, tokens, windows, and python for the documentation; empty for others' checkpoints."""
    try:
        manifest = json.loads((checkpoint_path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in manifest.get("calibration", {}).items()}


def _make(
    checkpoint_path: Path,
    source: str,
    backend: Backend,
    folder: Path,
    text: Text,
    device: torch.device,
    progress: Progress,
) -> None:
    """Quantize into `folder`, which appears when all of it is written."""
    if backend.quantizer != QUANTIZER:
        raise PrecisionError(
            f"precision `{backend.name}` has no checkpoint of its own; accepted is `{QUANTIZER}`",
            hint=f"serve the 16-bit checkpoint with `--precision {backend.name}`",
        )
    checkpoint = Checkpoint(checkpoint_path)
    if checkpoint.quantization is not None:
        method = checkpoint.quantization.get("quant_method", "unknown")
        raise PrecisionError(
            f"`{checkpoint_path}` is quantized by `{method}` already; a 16-bit checkpoint is needed",
            hint="quantize the checkpoint that it was made from",
        )
    if not (checkpoint_path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"`{checkpoint_path}` has no tokenizer.json, and `{backend.name}` is calibrated on text",
            hint="put the model's tokenizer.json there, or choose a mode that is not calibrated",
        )
    grid = grid_of(checkpoint.config, backend)
    origin = {
        "source": checkpoint_path.name,
        "source_sha256": source,
        "precision": backend.canonical,
        "code_sha256": code_version(),
    }
    make_whole(
        folder,
        checkpoint_bytes(checkpoint, grid),
        f"`{checkpoint_path.name}` in `{backend.canonical}`",
        lambda partial: quantize_checkpoint(checkpoint, partial, grid, text, device, origin, progress),
    )
