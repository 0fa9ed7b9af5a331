"""MODEL and the settings around it -> local folders, once none of the settings would be ignored.

serve, compare, eval, quantize --Settings--> find_model() --Settings with folders--> engine, front
"""

from pathlib import Path

from service.cli.display import Display
from service.config import NO_TOKENIZER, Settings
from service.errors import SettingError
from service.model.hub import resolve, resolve_tokenizer

RANDOM_ONLY = (
    "load_seed",
    "random_outliers",
    "random_std",
    "save",
)  # settings that trained weights have no use for


def find_model(
    settings: Settings, display: Display, *, may_save: bool = False, needs_text: bool = False
) -> tuple[Settings, Path]:
    """-> settings whose `tokenizer` and `save` are absolute folders, and the model's folder.

    Random weights that nobody gave a tokenizer have `none`. Raises SettingError for settings that would be
    ignored and for no tokenizer where text is needed, else as `resolve`.
    """
    for name in RANDOM_ONLY:
        if getattr(settings, name) and not settings.is_random:
            raise SettingError(
                f"setting `{name}` = `{getattr(settings, name)}` is of no use to weights that are read",
                hint="add `--load-format random`, or leave it out",
            )
    if settings.save and not may_save:
        raise SettingError(
            f"setting `save` = `{settings.save}` is of no use here",
            hint="`halftone serve` writes checkpoints",
        )
    path = resolve(
        settings.model,
        settings.revision,
        settings.cache_dir,
        display,
        needs_weights=not settings.is_random,
    )
    found = {}
    if not settings.tokenizer and settings.is_random and not (path / "tokenizer.json").is_file():
        found["tokenizer"] = NO_TOKENIZER
    elif settings.tokenizer not in ("", NO_TOKENIZER):
        found["tokenizer"] = str(resolve_tokenizer(settings.tokenizer, settings.cache_dir, display))
    if needs_text and found.get("tokenizer", settings.tokenizer) == NO_TOKENIZER:
        raise SettingError(
            f"`{settings.model}` has no tokenizer, and this command works on text",
            hint="add `--tokenizer FOLDER`, or `--tokenizer demo`",
        )
    if settings.save:
        found["save"] = str(Path(settings.save).expanduser().absolute())
    return settings.model_copy(update=found), path
