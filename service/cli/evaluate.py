"""`halftone eval`: one precision in its own engine -> perplexity, and divergence from a reference.

text --windows--> Evaluate --engine--> Evaluated --> table and JSON
"""

import asyncio
import contextlib
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service import __version__, logs
from service.cli.display import Display, show_loading
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision, create_app
from service.compare.assemble import NO_VERDICT
from service.compare.windows import EvaluationText
from service.config import Settings
from service.disk import megabytes, told_disk_errors
from service.errors import SystemProblem
from service.front.host import Host, run_to_end
from service.messages import EngineInfo, Evaluated


def evaluate(
    settings: Settings, reference: str, text: str, num_windows: int, window_tokens: int, out: Path | None
) -> None:
    """Prints a table, and writes the same as JSON to `out`. Raises HalftoneError."""
    logs.configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    for precision in filter(None, (settings.precision, reference)):
        check_precision(precision)
    check_calibration(settings.calibration, [settings.precision])
    if out is not None and out.exists():
        raise SystemProblem(f"`--out {out}` exists", hint="name a new file")
    with Display() as display:
        settings, model_path = find_model(settings, display, needs_text=True)
        folder = settings.tokenizer_folder(model_path)
        windows = EvaluationText.prepare(text, settings.calibration, folder, num_windows, window_tokens)
        # nobody but this process talks to the engine
        quiet = settings.model_copy(update={"host": "127.0.0.1", "port": 0, "metrics_port": 0})
        info, evaluated = run_to_end(run(quiet, model_path, windows, reference, display))
    result = result_of(info, evaluated, windows, reference)
    Console(highlight=False).print(table_of(result))
    if out is not None:
        with told_disk_errors(out):
            out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


async def run(
    settings: Settings, model_path: Path, windows: EvaluationText, reference: str, display: Display
) -> tuple[EngineInfo, Evaluated]:
    # until the engine is ready its failure is this command's own, and said once, at the end
    speak_again = logs.hold_back("service.front.supervisor")
    try:
        async with Host(settings, model_path, create_app) as host:
            loading = asyncio.create_task(show_loading(host.client, display))
            try:
                info = await host.ready()
                speak_again()
                evaluated = await host.client.evaluate(
                    windows.windows,
                    ["prefill"],
                    reference=reference,
                    progress=lambda message: display("evaluate", message.done, message.total, "tokens"),
                )
            finally:
                loading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loading
    finally:
        speak_again()
    return info, evaluated


def result_of(
    info: EngineInfo, evaluated: Evaluated, windows: EvaluationText, reference: str
) -> dict[str, Any]:
    """Figures with everything needed to repeat them."""
    divergence = {
        "reference": reference,
        "kl_nats_per_token": evaluated.kl_mean,
        "kl_tokens": evaluated.kl_tokens,
        "top1_agreement": evaluated.top1_agreement,
    }
    return {
        "halftone": __version__,
        "model_path": info.model_path,
        "precision": info.precision,
        "kv_dtype": info.kv_dtype,
        "device": info.device_name,
        "torch": info.torch_version,
        "weight_bytes": info.weight_bytes,
        "perplexity": math.exp(evaluated.nll["prefill"] / evaluated.tokens["prefill"]),
        "scored_tokens": evaluated.tokens["prefill"],
        **(divergence if reference else {}),
        "protocol": windows.protocol,
        "text": windows.text.provenance,
        "calibration": info.calibration,
        "random_weights": info.random_weights,
    }


def table_of(result: dict[str, Any]) -> Table:
    caption = NO_VERDICT if result["random_weights"] else result["protocol"]
    title = f"{result['precision']} on {result['device']}, KV cache in {result['kv_dtype']}"
    table = Table(title=title, caption=caption)
    table.add_column("weights", justify="right")
    table.add_column("perplexity", justify="right")
    row = [megabytes(result["weight_bytes"]), f"{result['perplexity']:.3f}"]
    if "reference" in result:
        table.add_column(f"KL against {result['reference']}, nats/token", justify="right")
        table.add_column("same likeliest token", justify="right")
        row += [f"{result['kl_nats_per_token']:.5f}", f"{result['top1_agreement']:.2%}"]
    table.add_column("tokens scored", justify="right")
    table.add_row(*row, f"{result['scored_tokens']:,}")
    return table
