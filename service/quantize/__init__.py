"""Calibrated precisions as steps from one checkpoint to another: 16-bit folder -> quantized folder.

"In flight" means `prepare`: quantize into the cache, then serve what is there. `quantize_to` is the same
step with a folder of the user's choice.
"""

import json
from pathlib import Path
from typing import Any, Literal

from service import device as devices
from service.errors import CheckpointError, PrecisionError, SettingError, SystemProblem
from service.messages import EngineConfig
from service.model.checkpoint import Checkpoint, TensorSource
from service.model.config import ModelConfig
from service.model.folders import MANIFEST, is_whole, make_whole
from service.model.random_weights import RandomWeights
from service.precision import load_backend
from service.precision.base import Backend
from service.quality.texts import calibration_text
from service.quantize.awq import Grid
from service.quantize.awq_checkpoint import (
    Calibration,
    Progress,
    checkpoint_bytes,
    choose_grid,
    quantization_config,
    quantize_checkpoint,
)
from service.quantize.cache import cache_key, code_version, locked, source_sha256
from service.quantize.spent import Spent

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
                spent = Spent(devices.resolve(config.device))
                calibration = Calibration(text, checkpoint_path)
                _make(Checkpoint(checkpoint_path), source, backend, folder, calibration, progress, spent)
    return folder


def check_free(out: Path) -> None:
    """Raises SystemProblem if something is at `out` already that a checkpoint would overwrite."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemProblem(
            f"`{out}` is there already and not an empty folder", hint="choose another folder with `--out`"
        )


def quantize_to(
    source: Path | RandomWeights,
    precision: str,
    out: Path,
    calibration: str,
    progress: Progress,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    tokenizer: Path | None = None,
) -> Spent:
    """Write a checkpoint's folder, or drawn weights, in this precision to `out`.

    `calibration` is a text file; empty: half A of the interpreter's documentation. `tokenizer` is the folder
    of one that is not the source's. Raises as `prepare`, and SystemProblem if something is at `out` already.
    """
    check_free(out)
    backend, text = load_backend(precision), calibration_text(calibration)
    if backend.quantizer != QUANTIZER:  # before the weights are read for their hash
        raise PrecisionError(
            f"precision `{backend.name}` has no checkpoint of its own; accepted is `{QUANTIZER}`",
            hint=f"serve the 16-bit checkpoint with `--precision {backend.name}`",
        )
    spent = Spent(devices.resolve(device))
    sha256 = ""  # no file's hash: the manifest says what weights were drawn with
    weights: Path | TensorSource = source
    if isinstance(weights, Path):
        with spent.on("hash"):
            sha256 = source_sha256(weights)
        weights = Checkpoint(weights)
    _make(weights, sha256, backend, out, Calibration(text, tokenizer or weights.path), progress, spent)
    return spent


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
    source: TensorSource,
    sha256: str,
    backend: Backend,
    folder: Path,
    calibration: Calibration,
    progress: Progress,
    spent: Spent,
) -> None:
    """Quantize into `folder`, which appears when all of it is written. `sha256`: of the source's files."""
    if source.quantization is not None:
        method = source.quantization.get("quant_method", "unknown")
        raise PrecisionError(
            f"`{source.path}` is quantized by `{method}` already; a 16-bit checkpoint is needed",
            hint="quantize the checkpoint that it was made from",
        )
    if not (calibration.tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(
            f"`{source.path}` has no tokenizer.json, and `{backend.name}` is calibrated on text",
            hint="put the model's tokenizer.json there, or choose a mode that is not calibrated",
        )
    grid = grid_of(source.config, backend)
    origin = {
        "source": source.path.name,
        **({"source_sha256": sha256} if sha256 else {}),
        "precision": backend.canonical,
        "code_sha256": code_version(),
    }
    make_whole(
        folder,
        checkpoint_bytes(source, grid),
        f"`{source.path.name}` in `{backend.canonical}`",
        lambda partial: quantize_checkpoint(source, partial, grid, calibration, origin, progress, spent),
    )
