"""MODEL as the user writes it -> local folder: `demo`, a folder, `preset:NAME`, or a hub id by its rules.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold as everywhere; only safetensors are ever fetched.
"""

import fnmatch
import io
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.config import PRESET_PREFIX
from service.disk import require_free, told_disk_errors
from service.errors import CheckpointError, SettingError, SystemProblem
from service.model.demo import Progress, ensure_demo

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

PRESETS = Path(__file__).parent / "presets"
WEIGHTS = "*.safetensors"
WANTED = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")
# the same weights again in other shapes and places
UNWANTED = ("original/*", "onnx/*", "consolidated*", "*/*.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(
    model: str, revision: str, cache: Path, progress: Progress, *, needs_weights: bool = True
) -> Path:
    """Folder with config.json and, where they are needed, safetensors.

    Raises CheckpointError, SystemProblem or SettingError, each with its fix.
    """
    folder = Path(model).expanduser()
    is_preset = model.startswith(PRESET_PREFIX)
    if revision != "main" and (model == "demo" or is_preset or folder.is_dir()):
        raise SettingError(
            f"setting `revision` = `{revision}` is of no use to `{model}`, which is no hub id",
            hint="leave it out, or name a model of the hub: ORG/NAME",
        )
    if model == "demo":
        return ensure_demo(cache, progress)
    if is_preset:
        return preset(model, needs_weights)
    if folder.is_dir():
        if needs_weights:
            require_formats(
                model, {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
            )
        return folder.resolve()
    if is_path(model):
        raise CheckpointError(
            f"model folder `{model}` does not exist",
            hint="give a folder with config.json and *.safetensors, a hub id such as ORG/NAME, or `demo`",
        )
    return from_hub(model, revision, progress, (WEIGHTS, *WANTED) if needs_weights else WANTED)


def is_path(model: str) -> bool:
    """Is it a place on this machine, there or not, rather than a hub id?"""
    folder = Path(model).expanduser()
    return folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or folder.exists()


def preset(model: str, needs_weights: bool) -> Path:
    """Folder with the config.json of a shape that comes with this package."""
    names = sorted(path.name for path in PRESETS.iterdir() if path.is_dir())
    name = model.removeprefix(PRESET_PREFIX)
    if name not in names:
        raise CheckpointError(
            f"preset `{name}` does not exist; there are {', '.join(names)}",
            hint="for another shape, name a folder with its config.json and add `--load-format random`",
        )
    if needs_weights:
        raise CheckpointError(
            f"`{model}` is a shape without weights",
            hint="leave `--load-format` out to serve it with random ones, or name a checkpoint",
        )
    return PRESETS / name


def resolve_tokenizer(tokenizer: str, cache: Path, progress: Progress) -> Path:
    """`demo`, a folder with tokenizer.json, or that file -> the folder. Raises SettingError."""
    if tokenizer == "demo":
        return ensure_demo(cache, progress)
    path = Path(tokenizer).expanduser()
    folder = path.parent if path.name == "tokenizer.json" else path
    if not (folder / "tokenizer.json").is_file():
        raise SettingError(
            f"setting `tokenizer` = `{tokenizer}`: there is no tokenizer.json",
            hint="name a folder that holds one, the file itself, or `demo`",
        )
    return folder.resolve()


def require_formats(model: str, files: Collection[str]) -> None:
    """CheckpointError unless `files` hold a configuration and safetensors weights."""
    if any(fnmatch.fnmatch(name, "*.safetensors") and "/" not in name for name in files):
        if "config.json" in files:
            return
        raise CheckpointError(
            f"model `{model}` has weights but no config.json",
            hint="give the folder that `save_pretrained` wrote, not a part of it",
        )
    if any(fnmatch.fnmatch(name, "*.gguf") for name in files):
        raise CheckpointError(
            f"model `{model}` has only GGUF weights; Halftone reads safetensors",
            hint="look for the repository that the GGUF files were made from",
        )
    if any(fnmatch.fnmatch(name, pattern) for name in files for pattern in PICKLED):
        raise CheckpointError(
            f"model `{model}` has only pickled weights (.bin), which can run code when they are read",
            hint="convert them once, where you trust them: "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER), then serve FOLDER",
        )
    raise CheckpointError(
        f"model `{model}` has no *.safetensors weights",
        hint="give a folder with config.json and *.safetensors, a hub id such as ORG/NAME, or `demo`",
    )


def from_hub(model: str, revision: str, progress: Progress, wanted: Sequence[str]) -> Path:
    """Snapshot folder in the hub's own cache; what is there already is not fetched again."""
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    with told_hub_errors(model, revision), told_disk_errors(cache):
        listed = list_files(model, revision)
        if listed and WEIGHTS in wanted:
            require_formats(model, {file.filename for file in listed})
        missing = [file for file in listed if file.will_download and is_wanted(file.filename, wanted)]
        needed = sum(file.file_size or 0 for file in missing)
        require_free(cache, needed, f"model `{model}`")
        if needed:
            progress("download", 0, needed, "bytes")
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(UNWANTED),
            tqdm_class=reporting_bar(progress, needed),
        )
    if WEIGHTS in wanted:
        require_formats(model, set(os.listdir(path)))
    return Path(path)


def list_files(model: str, revision: str) -> "list[DryRunFileInfo]":
    """What the hub holds; empty where it cannot be asked (then the cache may still have the model)."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    if constants.HF_HUB_OFFLINE:
        return []
    try:
        return snapshot_download(
            model, revision=revision, dry_run=True, tqdm_class=reporting_bar(lambda *_: None, 0)
        )
    except DryRunError:
        return []


def is_wanted(name: str, wanted: Sequence[str] = (WEIGHTS, *WANTED)) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return matches(wanted) and not matches(UNWANTED)


def reporting_bar(progress: Progress, total: int) -> Any:
    """A tqdm class that draws nothing and reports bytes to `progress` instead."""
    from tqdm import tqdm

    class ReportingBar(tqdm):  # type: ignore[misc]  # untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self.unit == "B" and total:
                progress("download", min(int(self.n), total), total, "bytes")
            return drawn

    return ReportingBar


@contextmanager
def told_hub_errors(model: str, revision: str) -> Iterator[None]:
    """The hub library's exceptions -> one line each, with the fix."""
    from huggingface_hub import errors

    where = f"https://huggingface.co/{model}"
    try:
        yield
    except errors.HFValidationError:
        raise CheckpointError(
            f"`{model}` is neither a folder nor a hub id",
            hint="a hub id reads ORG/NAME; a folder must exist; `demo` needs neither",
        ) from None
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"hub model `{model}` is gated and your account has no access",
            hint=f"accept its terms at {where}, then set HF_TOKEN (or run `hf auth login`)",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"hub model `{model}` does not exist, or it is private",
            hint="check the spelling of ORG/NAME; for a private model set HF_TOKEN (or run `hf auth login`)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"hub model `{model}` has no revision `{revision}`",
            hint=f"its branches and tags: {where}/tree/main",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise SystemProblem(
            f"hub model `{model}` is not in the cache, and {reason}",
            hint="unset HF_HUB_OFFLINE, or serve `demo` or a local folder"
            if offline
            else "check the network (HTTPS_PROXY, HF_ENDPOINT), or serve `demo` or a local folder",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise CheckpointError(
                f"the hub refuses your token for `{model}`", hint="set HF_TOKEN to a valid one, or unset it"
            ) from error
        raise SystemProblem(
            f"the hub answered {status} for `{model}`",
            hint="try again in a moment; see https://status.huggingface.co",
        ) from error
