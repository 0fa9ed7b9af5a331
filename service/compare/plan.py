"""What a comparison will do, fixed before it starts: modes, load, texts, and whether a folder may hold it.

cli --options--> Plan --job.run_compare--> rows
"""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from service import __version__
from service.compare.files import make_folder, read_back, write_whole
from service.compare.report import Report
from service.config import Settings
from service.errors import PrecisionError, SettingError, SystemProblem
from service.precision import TABLE
from service.precision.spec import PrecisionSpec

REFERENCES = ("fp32", "bf16", "fp16")
RUN_FILE = "run.json"
REPORT_FILE = "report.json"
MODES_FOLDER = "modes"


@dataclass(frozen=True)
class CompareOptions:
    """How much is measured. The defaults fit `make compare` on two cores."""

    concurrencies: tuple[int, ...] = (1, 4)
    rate_per_s: float = 0.0  # 0: half of what the first mode reaches at the widest concurrency
    requests_per_stream: int = 4
    num_open_requests: int = 12
    warmup_per_stream: int = 1
    output_tokens: int = 32
    num_windows: int = 8  # at least 8: that many sequences decode together
    window_tokens: int = 513  # scored: one less a window
    agreement_tokens: int = 2048  # scored by prefill, by decode at M=1 and at M=8
    seed: int = 0
    kv_tokens: int = 8192  # where the settings leave it to the device's memory
    prompts: str = ""  # JSONL; empty: loadtest's own
    text: str = ""  # UTF-8 file; empty: half B of the interpreter's documentation


@dataclass(frozen=True)
class Phase:
    """One run of the load generator."""

    id: str
    concurrency: int  # 0: open loop
    num_requests: int
    num_warmup: int
    seed: int  # another in each phase: a prompt that came before would be in the prefix cache

    @property
    def label(self) -> str:
        if not self.concurrency:
            return "open loop"
        return f"{self.concurrency} stream{'s' if self.concurrency > 1 else ''}"


@dataclass(frozen=True)
class Plan:
    """A checked request for a comparison."""

    precisions: tuple[str, ...]
    reference: str
    options: CompareOptions
    settings: Settings
    metrics_host: str  # Prometheus may be on another machine, though the API is for this process alone
    model_path: Path
    identity: dict[str, Any] = field(compare=False)

    @classmethod
    def make(
        cls, settings: Settings, model_path: Path, precisions: list[str], options: CompareOptions
    ) -> "Plan":
        """Raises PrecisionError for an unknown or repeated mode, or none to compare against, SettingError for
        a file that cannot be read."""
        names = []
        for text in precisions:
            spec = PrecisionSpec.parse(text)
            if spec.name not in TABLE:
                raise PrecisionError(
                    f"precision `{spec.name}` does not exist; accepted are {', '.join(TABLE)}",
                    hint="write `--precisions bf16,int8,nf4,awq`",
                )
            if precisions.count(text) > 1:
                raise PrecisionError(
                    f"precision `{text}` is named twice", hint="each mode is one row: name it once"
                )
            names.append(spec.name)
        places = [place for place, name in enumerate(names) if name in REFERENCES]
        if not places:
            raise PrecisionError(
                f"`{','.join(precisions)}` has no mode to compare against",
                hint=f"add one of {', '.join(REFERENCES)}: divergence is measured against the first of them",
            )
        # a server that only this process asks: any free port, no key, one set of pages for every mode
        quiet = settings.model_copy(
            update={
                "host": "127.0.0.1",
                "port": 0,
                "api_key": "",
                "kv_tokens": settings.kv_tokens or options.kv_tokens,
            }
        )
        plan_identity = {
            "version": __version__,
            "precisions": precisions,
            "options": asdict(options),
            "engine": {
                key: value
                for key, value in msgspec.to_builtins(quiet.engine_config(model_path)).items()
                if key not in ("precision", "cache_dir")
            },
            "weights": weights_stamp(model_path),
            "texts": {
                name: file_stamp(name, option)
                for option, name in (("--prompts", options.prompts), ("--text", options.text))
                if name
            },
        }
        return cls(
            tuple(precisions), precisions[places[0]], options, quiet, settings.host, model_path, plan_identity
        )

    @property
    def phases(self) -> list[Phase]:
        """Closed loops first, the widest last; then the open loop, whose rate may follow from it."""
        options = self.options
        widths = sorted(options.concurrencies)
        phases = [
            Phase(
                f"closed-{width}",
                width,
                width * options.requests_per_stream,
                width * options.warmup_per_stream,
                1000 * options.seed + place,
            )
            for place, width in enumerate(widths)
        ]
        # warm-up of an open loop is its first arrivals, so that what counts finds others on the way
        warmup = max(1, options.num_open_requests // 8)
        open_seed = 1000 * options.seed + len(widths)
        return [*phases, Phase("open", 0, options.num_open_requests, warmup, open_seed)]

    def row_file(self, place: int) -> str:
        return f"{MODES_FOLDER}/{place + 1}-{slug(self.precisions[place])}.json"

    def load_file(self, place: int, phase: Phase) -> str:
        return f"{MODES_FOLDER}/{place + 1}-{slug(self.precisions[place])}-{phase.id}.json"


def slug(precision: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=]+", "_", precision)


def weights_stamp(model_path: Path) -> dict[str, list[int]]:
    """Name -> size and time of each file of the checkpoint: cheap, and changes when the weights do."""
    files = sorted(path for path in model_path.iterdir() if path.suffix in (".safetensors", ".json"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def file_stamp(name: str, option: str) -> str:
    """SHA-256 of a file's bytes; SettingError that names `option` where it has none to read."""
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError as error:
        raise SettingError(
            f"`{option} {name}` cannot be read: {(error.strerror or 'unknown reason').lower()}",
            hint=f"name a file that exists, or leave `{option}` out for the built-in one",
        ) from None


def claim(out: Path, plan: Plan) -> None:
    """Make `out` the folder of this run, or find the same run in it, begun and not ended.

    Raises SystemProblem where it holds anything else.
    """
    run_file = out / RUN_FILE
    identity = msgspec.json.decode(msgspec.json.encode(plan.identity))
    if out.is_file():
        raise SystemProblem(f"`--out {out}` is a file", hint="name a folder that is new or empty")
    if run_file.is_file():
        found = read_back(run_file, dict[str, Any])
        different = sorted(key for key in identity if found.get(key) != identity[key])
        if different:
            raise SystemProblem(
                f"`--out {out}` holds another run: its {', '.join(different)} differ from what is asked now",
                hint="name a new folder, or run with the settings of that run to resume it",
            )
    elif out.is_dir() and any(out.iterdir()):
        raise SystemProblem(
            f"`--out {out}` is not empty, and holds no run of compare",
            hint="name a folder that is new or empty",
        )
    written = out / REPORT_FILE
    if written.is_file() and read_back(written, Report).complete:
        raise SystemProblem(
            f"`--out {out}` holds a finished run of these settings",
            hint=f"read `{out / 'report.html'}`, or name a new folder to measure again",
        )
    make_folder(out / MODES_FOLDER)
    write_whole(run_file, msgspec.json.format(msgspec.json.encode(identity)))
