"""`halftone eval`: one precision in its own engine -> perplexities, and divergence from a reference.

text --protocols--> windows --Evaluate--> engine --Evaluated--> Findings --> tables and JSON
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.prompts import DEFAULT_PROMPTS, Prompt, Prompts
from service import __version__, logs
from service.cli.display import Display, show_loading
from service.cli.model import find_model
from service.cli.serve import check_calibration, check_precision, create_app
from service.compare.words import NO_VERDICT
from service.config import Settings
from service.disk import megabytes, told_disk_errors
from service.errors import SettingError, SystemProblem
from service.front.engine_client import EvaluationMode
from service.front.host import Host, run_to_end
from service.front.text import TextCodec
from service.messages import EngineInfo
from service.model.hub import resolve
from service.quality.findings import Apart, Findings, Greedy, Perplexity, decode_of, perplexity_of
from service.quality.protocols import Limits, WordPieces, cut, parse_protocols
from service.quality.texts import Text, calibration_text, evaluation_text, refuse_overlap

KV_MEMORY_FRACTION = 0.5  # of free device memory at most: windows need little of it
DEFAULT_WINDOWS = 8  # of our own protocol; the others score the whole text


@dataclass(frozen=True)
class Asked:
    """What `halftone eval` is asked besides the model's settings."""

    reference: str = ""
    text: str = ""
    protocols: str = "halftone"
    windows: int = 0  # 0: as the protocol has it
    window_tokens: int = 513
    decode_tokens: int = 2048  # 0: prefill alone
    prompts: str = ""
    greedy_tokens: int = 64  # 0: no greedy answers
    reference_model: str = ""  # checkpoint of the reference; empty: the model's own


def evaluate(settings: Settings, asked: Asked, out: Path | None) -> None:
    """Prints tables, and writes the same as JSON to `out`. Raises HalftoneError."""
    logs.configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    for precision in filter(None, (settings.precision, asked.reference)):
        check_precision(precision)
    check_calibration(settings.calibration, [settings.precision])
    protocols = parse_protocols(asked.protocols)
    require_new(out)
    prompts = load_prompts(asked)
    text = evaluation_text(asked.text)
    refuse_overlap(calibration_text(settings.calibration), text)
    with Display() as display:
        settings, model_path = find_model(settings, display, needs_text=True)
        asked = replace(asked, reference_model=find_reference(settings, model_path, asked, display))
        found = run_to_end(run(settings, model_path, asked, protocols, text, prompts, display))
    console = Console(highlight=False)
    for table in tables_of(found):
        console.print(table)
    if out is not None:
        with told_disk_errors(out):
            out.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")


def find_reference(settings: Settings, model_path: Path, asked: Asked, display: Display) -> str:
    """Folder of `--reference-model`, empty where there is none. Raises SettingError for another tokenizer."""
    if not asked.reference_model:
        return ""
    if not asked.reference:
        raise SettingError(
            f"`--reference-model` = `{asked.reference_model}` is of no use without `--reference`",
            hint="add the precision it is to be computed in: `--reference bf16`",
        )
    path = resolve(asked.reference_model, "main", settings.cache_dir, display)
    folders = settings.tokenizer_folder(model_path), path
    hashes = {
        WordPieces.load(folder, []).sha256 for folder in folders if (folder / "tokenizer.json").is_file()
    }
    if len(hashes) > 1:
        raise SettingError(
            f"`{asked.reference_model}` has another tokenizer.json than `{settings.model}`",
            hint="name the checkpoint that the model was made from",
        )
    return str(path)


def require_new(out: Path | None) -> None:
    if out is not None and out.exists():
        raise SystemProblem(f"`--out {out}` exists", hint="name a new file")


def load_prompts(asked: Asked) -> Prompts | None:
    """Those of `--prompts`, or our own where there is a reference to compare answers with."""
    if not asked.reference or not asked.greedy_tokens:
        if asked.prompts:
            raise SettingError(
                f"`--prompts` = `{asked.prompts}` is of no use without greedy answers to compare",
                hint="add `--reference bf16` and leave `--greedy-tokens` above 0",
            )
        return None
    try:
        return Prompts.load(Path(asked.prompts) if asked.prompts else DEFAULT_PROMPTS)
    except OSError as error:
        raise SettingError(f"`--prompts` cannot be read: {error}", hint="name a JSON lines file") from None
    except ValueError as error:
        raise SettingError(f"`--prompts`: {error}", hint="one prompt on each line") from None


@contextlib.asynccontextmanager
async def own_engine(
    settings: Settings, model_path: Path, display: Display
) -> AsyncIterator[tuple[Host, EngineInfo]]:
    """A ready engine that nobody but this process talks to."""
    quiet = settings.model_copy(
        update={
            **{"host": "127.0.0.1", "port": 0, "metrics_port": 0, "api_key": ""},
            # a reference's embedding and head need room too
            "kv_memory_fraction": min(settings.kv_memory_fraction, KV_MEMORY_FRACTION),
        }
    )
    # until the engine is ready its failure is this command's own, and said once, at the end
    speak_again = logs.hold_back("service.front.supervisor")
    try:
        async with Host(quiet, model_path, create_app) as host:
            loading = asyncio.create_task(show_loading([host.client], display))
            try:
                info = await host.ready()
                speak_again()
                yield host, info
            finally:
                loading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loading
    finally:
        speak_again()


async def run(
    settings: Settings,
    model_path: Path,
    asked: Asked,
    protocols: list[str],
    text: Text,
    prompts: Prompts | None,
    display: Display,
) -> Findings:
    """One Evaluate for each protocol; the first also asks for decode and for greedy answers."""
    folder = settings.tokenizer_folder(model_path)
    async with own_engine(settings, model_path, display) as (host, info):
        pieces = WordPieces.load(folder, info.eos_token_ids)
        limits = Limits(info.max_context_tokens, asked.windows, asked.window_tokens)
        own = replace(limits, windows=asked.windows or DEFAULT_WINDOWS)
        cuts = {name: cut(name, text, pieces, own if name == "halftone" else limits) for name in protocols}
        perplexities: list[Perplexity] = []
        decode: dict[str, Apart] = {}
        greedy: Greedy | None = None
        for name, made in cuts.items():
            is_first = name == protocols[0]
            modes: list[EvaluationMode] = ["prefill"]
            modes += ["decode1", "decode8"] if is_first and asked.decode_tokens else []
            asks = tokenized(prompts, folder, settings) if is_first and prompts else []
            evaluated = await host.client.evaluate(
                made.windows,
                modes,
                decode_tokens=asked.decode_tokens,
                reference=asked.reference,
                reference_path=asked.reference_model,
                scored_from=made.scored_from,
                prompts=asks,
                greedy_tokens=asked.greedy_tokens,
                progress=lambda message: display("evaluate", message.done, message.total, "tokens"),
            )
            perplexities.append(perplexity_of(name, made, evaluated, asked.reference))
            decode |= decode_of(evaluated)
            if evaluated.greedy and prompts:
                greedy = Greedy(
                    prompts=prompts.source,
                    prompts_sha256=prompts.sha256,
                    max_tokens=asked.greedy_tokens,
                    generated=evaluated.greedy.generated,
                    agreed=evaluated.greedy.agreed,
                )
    return Findings(
        halftone=__version__,
        model_path=info.model_path,
        precision=info.precision,
        dtype=info.dtype,
        kv_dtype=info.kv_dtype,
        device=info.device_name,
        torch=info.torch_version,
        weight_bytes=info.weight_bytes,
        tokenizer_sha256=pieces.sha256,
        text=text.provenance,
        calibration=info.calibration,
        random_weights=info.random_weights,
        perplexities=perplexities,
        decode=decode,
        greedy=greedy,
    )


def tokenized(prompts: Prompts, folder: Path, settings: Settings) -> list[list[int]]:
    """As the API would: texts through the chat template where the checkpoint has one."""
    codec = TextCodec.load(folder, settings.chat_template)

    def ids(prompt: Prompt) -> list[int]:
        if not prompt.text:
            return list(prompt.token_ids)
        if codec.template is None:
            return codec.encode(prompt.text)
        return codec.encode_chat([{"role": "user", "content": prompt.text}])

    return [ids(prompt) for prompt in prompts.items]


def tables_of(found: Findings) -> list[Table]:
    """Perplexity and divergence with a column for each protocol, then what else was asked."""
    words = [f"{one.protocol}: {one.words}" for one in found.perplexities]
    stamp = (
        f"text {found.text['text']}, SHA-256 {found.text['sha256'][:12]}; tokenizer "
        f"{found.tokenizer_sha256[:12]}; ± one standard error over windows"
    )
    first = Table(
        title=f"{found.precision} on {found.device}, KV cache in {found.kv_dtype}; "
        f"weights {megabytes(found.weight_bytes)}",
        caption=NO_VERDICT if found.random_weights else "\n".join([*words, stamp]),
        caption_justify="left",
    )
    first.add_column("")
    for one in found.perplexities:
        first.add_column(one.protocol, justify="right")
    columns = [cells_of(one) for one in found.perplexities]
    for name in columns[0]:
        first.add_row(name, *(cells[name] for cells in columns))
    return [first, *more_tables(found)]


def cells_of(one: Perplexity) -> dict[str, str]:
    """Row of the table -> its text."""
    cells = {
        "perplexity": f"{one.perplexity:.3f} ± {one.standard_error:.3f}",
        "per": one.unit,
        "tokens scored": f"{one.scored_tokens:,}",
    }
    if far := one.divergence:
        cells |= {
            f"beside {far.reference}": f"{far.change:+.2%} ± {far.change_standard_error:.2%}",
            "KL, nats/token": f"{far.kl_nats_per_token:.5f} ± {far.kl_standard_error:.5f}",
            "KL, 99 % of tokens": f"{far.kl_quantiles['p99']:.3f}",
            "same likeliest token": f"{far.top1_agreement:.2%} ± {far.top1_standard_error:.2%}",
        }
    return cells


def more_tables(found: Findings) -> list[Table]:
    tables = []
    if found.decode:
        table = Table(title="Teacher-forced decode through the paged cache, beside prefill")
        for name in ("sequences at once", "perplexity", "tokens"):
            table.add_column(name, justify="right")
        for mode, apart in found.decode.items():
            change = f"{apart.change:+.3%} ± {apart.standard_error:.3%}"
            table.add_row(mode.removeprefix("decode"), change, f"{apart.tokens:,}")
        tables.append(table)
    if greedy := found.greedy:
        table = Table(title=f"Greedy answers beside the reference's, prompts of {greedy.prompts}")
        for name in ("prompts", "answers that part", "tokens until then, median", "of at most"):
            table.add_column(name, justify="right")
        cells = (len(greedy.agreed), greedy.num_apart, f"{greedy.median_agreed:g}", greedy.max_tokens)
        table.add_row(*map(str, cells))
        tables.append(table)
    return tables
