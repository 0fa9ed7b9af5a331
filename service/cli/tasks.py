"""`halftone eval --tasks`: lm-evaluation-harness through our engine and our endpoint, which have to agree.

settings, tasks --> own engine --harness/run--> Scores by way --> table, JSON, or how the two differ
"""

from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from service import __version__, logs
from service.cli.display import Display
from service.cli.evaluate import own_engine, require_new
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision
from service.config import Settings
from service.disk import told_disk_errors
from service.errors import HalftoneError, SettingError
from service.front.host import run_to_end
from service.harness.run import WAYS, Scores, TaskRun, Through, Way, disagreements, require_harness, run_tasks
from service.messages import EngineInfo

BATCH = 16  # prompts at once where company changes no bit
COLUMNS = {"engine": "through the engine", "http": "over HTTP"}


def evaluate_tasks(settings: Settings, asked: TaskRun, through: Through, out: Path | None) -> None:
    """Prints a table, writes it as JSON to `out`. Raises HalftoneError, also where the two ways differ."""
    logs.configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    check_precision(settings.precision)
    check_calibration(settings.calibration, [settings.precision])
    harness = require_harness()
    if asked.include and not Path(asked.include).is_dir():
        raise SettingError(f"`--task-path` = `{asked.include}` is no folder", hint="name one with task YAMLs")
    require_new(out)
    if settings.deterministic:
        asked = msgspec.structs.replace(asked, batch=BATCH)
    else:
        # one prompt at a time and none behind a cached one: then company moves no bit in any precision
        settings = settings.model_copy(update={"prefix_cache": False})
    with Display() as display:
        settings, model_path = find_model(settings, display, needs_text=True)
        info, scores = run_to_end(run(settings, model_path, asked, WAYS[through], display))
    Console(highlight=False).print(table_of(info, scores))
    if out is not None:
        with told_disk_errors(out):
            out.write_bytes(
                msgspec.json.format(msgspec.json.encode(result_of(info, scores, harness))) + b"\n"
            )
    if len(scores) == 2 and (told := disagreements(scores["engine"], scores["http"])):
        raise HalftoneError(
            "the engine and its HTTP endpoint gave different answers: " + "; ".join(told),
            hint="the same engine was asked twice, so this is a fault of ours: please report it",
            code="ways_disagree",
        )


async def run(
    settings: Settings, model_path: Path, asked: TaskRun, ways: tuple[Way, ...], display: Display
) -> tuple[EngineInfo, dict[Way, Scores]]:
    async with own_engine(settings, model_path, display) as (host, info):
        display.close()  # the harness draws bars of its own
        return info, await run_tasks(host, settings.tokenizer_folder(model_path), asked, ways)


def result_of(info: EngineInfo, scores: dict[Way, Scores], harness: str) -> dict[str, Any]:
    """Figures with everything needed to repeat them."""
    first = next(iter(scores.values()))
    return {
        "halftone": __version__,
        "lm_eval": harness,
        "model_path": info.model_path,
        "precision": info.precision,
        "dtype": info.dtype,
        "kv_dtype": info.kv_dtype,
        "device": info.device_name,
        "torch": info.torch_version,
        "deterministic": info.deterministic,
        "results": {way: found.results for way, found in scores.items()},
        "agree": not disagreements(*scores.values()) if len(scores) == 2 else None,
        "task_versions": first.versions,
        "num_fewshot": first.num_fewshot,
        "num_documents": first.num_documents,
        "document_hashes": first.document_hashes,
    }


def table_of(info: EngineInfo, scores: dict[Way, Scores]) -> Table:
    """A row for each metric of each task; ± is the harness's standard error, over documents."""
    first = next(iter(scores.values()))
    table = Table(title=f"{info.precision} on {info.device_name}, KV cache in {info.kv_dtype}")
    for name in ("task", "documents", "metric"):
        table.add_column(name)
    for way in scores:
        table.add_column(COLUMNS[way], justify="right")
    table.add_column("±", justify="right")
    for task, metrics in first.results.items():
        for name in metrics:
            metric, comma, variant = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr{comma}{variant}")
            cells = [f"{found.results[task][name]:.4f}" for found in scores.values()]
            spread = "" if error is None else f"{error:.4f}"
            table.add_row(task, f"{first.num_documents.get(task, 0):,}", metric, *cells, spread)
    if len(scores) == 2:
        apart = disagreements(*scores.values())
        table.caption = "the two differ" if apart else "the two agree in every answer, to the last digit"
    return table
