"""`halftone quantize`: a 16-bit checkpoint and text -> a folder with the quantized checkpoint."""

from pathlib import Path

from rich.console import Console

from service import logs
from service.cli.display import Display
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision
from service.config import Settings
from service.disk import folder_bytes, megabytes, told_disk_errors
from service.errors import SettingError
from service.quantize import own_tokenizer, quantize_to


def quantize(settings: Settings, precision: str, out: Path) -> None:
    """Raises HalftoneError; `out` then does not exist."""
    logs.configure(settings.log_level, settings.log_format)
    check_precision(precision)
    check_calibration(settings.calibration, [precision])
    with Display() as display:
        if settings.is_random:
            raise SettingError(
                f"`{settings.model}` has random weights, which there is nothing to calibrate on",
                hint="`halftone serve --load-format random --precision awq --save DIR` draws AWQ weights",
            )
        settings, source = find_model(settings, display)
        if settings.tokenizer:
            raise own_tokenizer(settings.tokenizer)
        with told_disk_errors(out):
            quantize_to(source, precision, out, settings.calibration, display, settings.device)
    before, after = megabytes(folder_bytes(source)), megabytes(folder_bytes(out))
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {after}, from {before}\nserve it with: halftone serve {out}", markup=False
    )
