"""What a comparison will do, fixed before it starts: modes, schedule, load, texts, and whether a folder may
hold it.

cli --modes, options--> Plan --job.run_compare--> turns, phases
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from service import __version__
from service.compare.files import make_folder, read_back, write_whole
from service.compare.modes import again, reference_of
from service.compare.options import CompareOptions
from service.compare.report import Mode, Report, Turn
from service.config import Settings
from service.errors import SettingError, SystemProblem

RUN_FILE = "run.json"
RATES_FILE = "rates.json"
REPORT_FILE = "report.json"
MODES_FOLDER = "modes"
SEEDS = 100  # of one repeat's levels
# what a later run in the same folder may ask differently: more of the same, and another judgement
MAY_CHANGE = ("repeats", "max_repeats", "minutes", "max_perplexity_rise")


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """The open loops' rates, settled once and kept beside the run."""

    capacity_per_s: float  # requests/s that the reference answered with the most streams
    rates_per_s: list[float]


@dataclass(frozen=True)
class Phase:
    """One run of the load generator."""

    id: str
    concurrency: int  # 0: open loop
    rate_per_s: float  # 0: closed loop
    num_requests: int
    num_warmup: int
    seed: int  # another in each: a prompt that came before would be in the prefix cache


@dataclass(frozen=True)
class Plan:
    """A checked request for a comparison."""

    modes: tuple[Mode, ...]
    reference: Mode
    options: CompareOptions
    settings: Settings
    metrics_host: str  # Prometheus may be on another machine, though the API is for this process alone
    model_path: Path
    checkpoints: Mapping[str, Path]  # name of a mode -> folder of its own checkpoint
    identity: dict[str, Any] = field(compare=False)

    @classmethod
    def make(
        cls,
        settings: Settings,
        model_path: Path,
        modes: Sequence[Mode],
        options: CompareOptions,
        *,
        reference: str = "",
        checkpoints: Mapping[str, Path] | None = None,
    ) -> "Plan":
        """Raises PrecisionError for no mode to compare against, SettingError for a file that cannot be
        read."""
        checkpoints = checkpoints or {}
        # a server that only this process asks: any free port, no key, one set of pages for every mode
        quiet = settings.model_copy(
            update={
                "host": "127.0.0.1",
                "port": 0,
                "api_key": "",
                "kv_tokens": settings.kv_tokens or options.kv_tokens,
            }
        )
        base = reference_of(modes, reference)
        identity = {
            "version": __version__,
            "modes": [mode.name for mode in modes],
            "reference": base.name,
            "options": {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE},
            "engine": {
                key: value
                for key, value in msgspec.to_builtins(quiet.engine_config(model_path)).items()
                if key not in ("precision", "cache_dir")
            },
            "weights": [weights_stamp(path) for path in (model_path, *checkpoints.values())],
            "texts": {
                name: file_stamp(name, option)
                for option, name in (("--prompts", options.prompts), ("--text", options.text))
                if name
            },
        }
        return cls(tuple(modes), base, options, quiet, settings.host, model_path, dict(checkpoints), identity)

    @property
    def null(self) -> Mode:
        """The reference against itself, as one mode more."""
        return again(self.reference)

    @property
    def everyone(self) -> tuple[Mode, ...]:
        """Modes in the order asked, and the null comparison's."""
        return (*self.modes, self.null)

    def turns(self, repeat: int) -> list[tuple[Turn, Mode]]:
        """One engine for each mode, in an order of this repeat's own: what drifts meets no mode always
        first."""
        order = list(self.everyone)
        random.Random(f"{self.options.seed}:schedule:{repeat}").shuffle(order)
        first = repeat * len(order)
        return [
            (Turn(order=first + place, repeat=repeat, mode=mode.name), mode)
            for place, mode in enumerate(order)
        ]

    def settings_of(self, mode: Mode) -> Settings:
        """What a mode's engine is started with; a checkpoint of its own is read by the model's tokenizer."""
        changes = {"precision": mode.precision, "kv_dtype": mode.kv_dtype}
        if mode.checkpoint:
            changes["tokenizer"] = str(self.settings.tokenizer_folder(self.model_path))
        return self.settings.model_copy(update=changes)

    def path_of(self, mode: Mode) -> Path:
        return self.checkpoints.get(mode.name, self.model_path)

    @property
    def closed_phases(self) -> list[Phase]:
        """Those of a first look at what the reference can answer, with prompts that no repeat asks."""
        return [phase for phase in self.phases(-1, None) if phase.concurrency]

    def settle(self, capacity_per_s: float) -> Rates:
        """Requests/s of the open levels, to three figures, lowest first."""
        rates = {
            float(f"{level.rate_per_s or level.share * capacity_per_s:.3g}")
            for level in self.options.levels
            if not level.is_closed
        }
        return Rates(capacity_per_s=capacity_per_s, rates_per_s=sorted(rates))

    def phases(self, repeat: int, rates: Rates | None) -> list[Phase]:
        """A turn's load: streams first, then rates. Prompts and arrivals are the repeat's, whatever the
        mode."""
        options = self.options
        levels = [(level.concurrency, 0.0) for level in options.levels if level.is_closed]
        levels += [(0, rate) for rate in (rates.rates_per_s if rates else ())]
        phases = []
        for place, (concurrency, rate_per_s) in enumerate(levels):
            num_requests = options.num_requests(concurrency, rate_per_s)
            phases.append(
                Phase(
                    id=f"closed-{concurrency}" if concurrency else f"open-{rate_per_s:g}",
                    concurrency=concurrency,
                    rate_per_s=rate_per_s,
                    num_requests=num_requests,
                    num_warmup=options.num_warmup(concurrency, num_requests),
                    seed=((options.seed + 1) * 1000 + repeat) * SEEDS + place,
                )
            )
        return phases

    @property
    def throughput_level(self) -> str:
        """Id of the closed level with the most streams."""
        return f"closed-{max(level.concurrency for level in self.options.levels)}"

    @staticmethod
    def latency_level(rates: Rates) -> str:
        """Id of the middle rate: users are there, and no queue yet."""
        return f"open-{rates.rates_per_s[(len(rates.rates_per_s) - 1) // 2]:g}"

    def turn_file(self, turn: Turn, phase: Phase | None = None) -> str:
        """Where a turn's result is, or one phase's requests."""
        place = next(n for n, mode in enumerate(self.everyone, 1) if mode.name == turn.mode)
        end = f"-{phase.id}" if phase else ""
        return f"{MODES_FOLDER}/{place}-{slug(turn.mode)}-{turn.repeat + 1}{end}.json"


def slug(precision: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=]+", "_", precision)


def weights_stamp(model_path: Path) -> dict[str, str | list[int]]:
    """Name -> what tells a checkpoint's file from another: of weights size and time, which is cheap; of the
    rest the bytes, for a preset that was installed anew has another time."""
    found: dict[str, str | list[int]] = {}
    for path in sorted(model_path.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
        elif path.suffix == ".json":
            found[path.name] = digest(path)
    return found


def digest(path: Path) -> str:
    """SHA-256 of its bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_stamp(name: str, option: str) -> str:
    """`digest`; SettingError that names `option` where there is nothing to read."""
    try:
        return digest(Path(name))
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
    if written.is_file():
        report = read_back(written, Report)
        measured = min((row.num_repeats for row in report.rows), default=0)
        if report.complete and measured >= plan.options.repeats:
            raise SystemProblem(
                f"`--out {out}` holds a finished run of these settings, with {measured} repeats",
                hint=f"read `{out / 'report.html'}`, ask for more `--repeats`, or name a new folder",
            )
    make_folder(out / MODES_FOLDER)
    write_whole(run_file, msgspec.json.format(msgspec.json.encode(identity)))
