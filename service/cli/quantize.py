"""`halftone quantize`: 16-bit weights and text -> a folder with the quantized checkpoint."""

from pathlib import Path

from rich.console import Console

from service import device as devices
from service import logs
from service.cli.display import Display
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision
from service.config import Settings
from service.disk import folder_bytes, megabytes, told_disk_errors
from service.engine.shortage import told_quantizing
from service.model.random_weights import Draw, RandomWeights
from service.quantize import check_free, own_tokenizer, quantize_to
from service.quantize.spent import Spent


def quantize(settings: Settings, precision: str, out: Path) -> None:
    """Raises HalftoneError; `out` then does not exist."""
    logs.configure(settings.log_level, settings.log_format)
    check_precision(precision)
    check_calibration(settings.calibration, [precision])
    if settings.tokenizer and not settings.is_random:
        raise own_tokenizer(settings.tokenizer)
    check_free(out)  # before anything is fetched
    device = devices.resolve(settings.device)
    with Display() as display:
        settings, path = find_model(settings, display, needs_text=True)
        source: Path | RandomWeights = path
        if settings.is_random:
            draw = Draw(settings.load_seed, settings.random_outliers, settings.random_std)
            source = RandomWeights(path, device, draw)
        tokenizer = settings.tokenizer_folder(path)
        with told_disk_errors(out), told_quantizing(device, precision):
            spent = quantize_to(
                source, precision, out, settings.calibration, display, settings.device, tokenizer
            )
    before = source.num_bytes if isinstance(source, RandomWeights) else folder_bytes(source)
    kind = " of random weights" if settings.is_random else ""
    lines = [
        f"{out}: {megabytes(folder_bytes(out))}, from {megabytes(before)}{kind}",
        told(spent),
        f"serve it with: halftone serve {out}",
    ]
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)


def told(spent: Spent) -> str:
    """`62 s: hash 9.1, text 0.3, read 4.2, ...; at most 5.9 GB of memory on NVIDIA H100 80GB HBM3`."""
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in spent.seconds.items())
    peak, name = megabytes(spent.peak_bytes), devices.device_name(spent.device)
    return f"{sum(spent.seconds.values()):.0f} s: {parts}; at most {peak} of memory on {name}"
