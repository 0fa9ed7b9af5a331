"""What a comparison found, as types: the source of report.json, its schema, and every other form of it.

assemble --Rows, Verdict--> Report --> report.json, .html, .md, .csv, terminal

Times are seconds, sizes bytes, KL nats per token. Figures of speed are in figures.py. The schema in
report.schema.json is made from these types and shipped; a test holds the two together.
"""

import importlib.resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from service import ledger
from service.compare.figures import CONFIDENCE, Interval, Level, described
from service.compare.statistics import student_t

FORMAT = "halftone-report/2"
MAX_DISAGREEMENT = 0.002
EARLIER_STANDARD_ERRORS = 2.0  # beyond which a report that does not tell its windows took one for decided


class Mode(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared: a precision, where its weights are from, and what its KV cache holds."""

    name: Annotated[str, described("Unique in the report: `nf4`, `nf4 + kv int8`, `awq=ORG/MODEL-AWQ`")]
    precision: Annotated[str, described("`name[:option=value,...]`; empty: another server, that tells none")]
    checkpoint: Annotated[str, described("Its own, a folder or hub id; empty: the compared model's")] = ""
    kv_dtype: Annotated[str, described("As asked: auto, int8, fp8")] = "auto"
    server: Annotated[str, described("URL of a server that runs already, of which speed alone is known")] = ""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    weight_bytes: Annotated[int, described("Codes, scales, and what stays 16-bit; after the first forward")]
    kv_bytes: Annotated[int, described("The KV pool, of `kv_tokens` tokens in every row")]
    kv_tokens: int
    kv_bytes_per_token: float
    peak_load_bytes: Annotated[int, described("Highest memory of the engine process until it was ready")]
    peak_bytes: Annotated[int, described("Highest memory of the engine process under load")]
    peak_without_kv_bytes: Annotated[int, described("The same less the KV pool")]
    parts: Annotated[dict[str, int], described("The engine's ledger by part")]


class Apart(msgspec.Struct, frozen=True, kw_only=True):
    """A decode mode against prefill, paired token by token."""

    change: Annotated[float, described("decode / prefill - 1, of the perplexities")]
    standard_error: Annotated[
        float, described("Of `change`: what one window holds moves together, and what one token is predicted")
    ]
    num_windows: Annotated[int, described("0: an earlier report, which did not tell")] = 0

    @property
    def exceeds(self) -> bool:
        """Further apart than one model computed twice may be."""
        return abs(self.change) > MAX_DISAGREEMENT

    @property
    def is_decided(self) -> bool:
        """Further from 0 than chance takes it one time in twenty (Student's t over so few windows)."""
        most = student_t(max(self.num_windows - 1, 1)) if self.num_windows else EARLIER_STANDARD_ERRORS
        return abs(self.change) > most * self.standard_error

    @property
    def is_flagged(self) -> bool:
        return self.exceeds and self.is_decided


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """One set of tokens scored three ways by the served weights."""

    tokens: int
    prefill: Annotated[float, described("Perplexity, whole windows at once")]
    decode1: Annotated[float, described("Perplexity, teacher-forced through the paged cache, one sequence")]
    decode8: Annotated[float, described("The same with eight sequences a step")]
    decode1_apart: Apart
    decode8_apart: Apart
    disagreement: Annotated[float, described("Largest |decode / prefill - 1|")]
    agrees: Annotated[
        bool,
        described(
            f"False: a change is beyond {MAX_DISAGREEMENT}, and beyond its interval at {100 * CONFIDENCE:g} %"
        ),
    ]

    @property
    def apart(self) -> dict[str, Apart]:
        """By the name that people read."""
        return {"M=1": self.decode1_apart, "M=8": self.decode8_apart}


class Greedy(msgspec.Struct, frozen=True, kw_only=True):
    """Greedy answers to prompts of the load: how long the reference would have said the same."""

    num_prompts: int
    num_tokens: Annotated[int, described("Of each answer at most")]
    same_share: Annotated[float, described("Answers that do not differ as far as was looked")]
    same_standard_error: float
    median_agreed_tokens: Annotated[int, described("Before the first that differs; `num_tokens`: none does")]
    agreed_tokens: Annotated[list[int], described("The same by prompt")]


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    perplexity: Annotated[float, described("Over the evaluation windows, by prefill")]
    tokens: int
    kl_mean: Annotated[float, described("KL(reference || mode) over the full vocabulary, nats per token")]
    kl_tokens: int
    top1_agreement: Annotated[float, described("Share of positions where both find the same token likeliest")]
    agreement: Annotated[Agreement | None, described("Null: this mode's decode does not fit")] = None
    # intervals are over windows of text, taken as independent
    perplexity_ratio: Annotated[
        Interval | None, described("Mode / reference, token by token over the same windows; null: not paired")
    ] = None
    reference_perplexity: Annotated[float | None, described("The reference's over the same windows")] = None
    kl: Annotated[Interval | None, described("kl_mean with its interval")] = None
    kl_quantiles: Annotated[dict[str, float], described("p50, p90, p99, max over tokens, nats")] = (
        msgspec.field(default_factory=dict)
    )
    top1: Annotated[Interval | None, described("top1_agreement with its interval")] = None
    greedy: Annotated[
        Greedy | None, described("Of the reference: what rounding alone parts. Null: not measured")
    ] = None


class Purchase(msgspec.Struct, frozen=True, kw_only=True):
    """What a mode holds more than the reference in the memory of the reference's weights and KV cache."""

    freed_bytes: Annotated[int, described("Weight bytes of the reference less those of this mode")]
    kv_bytes_per_token: float
    more_kv_tokens: Annotated[
        int, described("Tokens of KV cache in that memory, less the reference's; negative: it costs room")
    ]
    request_tokens: Annotated[float, described("Prompt and answer of a request of this load, mean")]
    more_requests: Annotated[
        int, described("Requests open at the same time in that memory, less the reference's")
    ]


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """From spawning an engine to ready."""

    seconds: Annotated[Interval, described("Over the starts that were measured")]
    stages: Annotated[dict[str, float], described("Stage -> seconds, mean")]
    quantize_seconds: Annotated[
        float,
        described("Making the checkpoint of this mode, in an engine before the measured ones; 0: none made"),
    ] = 0.0


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Why a mode has no figures of speed: it does not fit the device."""

    needs_bytes: int
    has_bytes: int


class Knee(msgspec.Struct, frozen=True, kw_only=True):
    """The highest measured rate, from the lowest on, whose p95 TTFT stays within twice the unloaded one."""

    unloaded_ttft_p95_s: Annotated[float, described("With one stream")]
    rate_per_s: Annotated[float, described("0: the lowest rate is beyond it already")]
    low_rate_per_s: Annotated[float, described("Where the upper end of p95 TTFT's interval counts")]
    high_rate_per_s: Annotated[float, described("Where the lower end counts")]
    is_beyond: Annotated[bool, described("The highest rate measured stays within: the knee lies above it")]
    said: Annotated[str, described("In words")]


class Crossover(msgspec.Struct, frozen=True, kw_only=True):
    """From which concurrency on a mode's tokens/s stop, or start, being more than the reference's."""

    kind: Literal["always pays", "never pays", "stops paying", "starts paying", "undecided"]
    streams: Annotated[float | None, described("Where the ratio is 1, between two measured concurrencies")]
    low_streams: Annotated[int, described("Highest measured one before; 0: none")]
    high_streams: Annotated[int, described("Lowest measured one behind; 0: none")]
    said: Annotated[str, described("In words")]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One mode. Speed and bytes come from every repeat's engine, quality from the first one's."""

    mode: Mode
    status: Literal["ok", "failed", "does not fit"]
    error: Annotated[str, described("Why there are no figures of speed; empty for `ok`")] = ""
    fit: Annotated[Fit | None, described("Of `does not fit`")] = None
    num_repeats: Annotated[int, described("Measured whole")] = 0
    levels: list[Level] = msgspec.field(default_factory=list)
    knee: Annotated[Knee | None, described("Null: fewer than one rate and one stream measured")] = None
    crossover: Annotated[Crossover | None, described("Null for the reference")] = None
    is_on_front: Annotated[
        bool | None,
        described("No mode is surely faster with no more weight bytes and no more divergence; null: unknown"),
    ] = None
    memory: Annotated[Memory | None, described("Highest over the repeats; null: another server")] = None
    loading: Loading | None = None
    quality: Annotated[Quality | None, described("Null: not measured, or another server")] = None
    purchase: Annotated[Purchase | None, described("Against the reference; null for the reference")] = None
    dtype: Annotated[str, described("Of activations")] = ""
    kv_dtype: Annotated[str, described("Of the KV cache as served: as `dtype`, or int8, fp8")] = ""
    kernels: dict[str, str] = msgspec.field(default_factory=dict)
    calibration: dict[str, str] = msgspec.field(default_factory=dict)
    seconds: Annotated[float, described("That all of this row took to measure")] = 0.0

    @property
    def name(self) -> str:
        return self.mode.name

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def level(self, id: str) -> Level | None:
        return next((level for level in self.levels if level.id == id), None)

    def figure(self, name: str, level_id: str) -> Interval | None:
        """One figure at one level; None where it was not measured."""
        level = self.level(level_id)
        found: Interval | None = getattr(level.figures, name) if level else None
        return found

    def ratio(self, name: str, level_id: str) -> Interval | None:
        """The same against the reference."""
        level = self.level(level_id)
        found: Interval | None = getattr(level.ratios, name) if level and level.ratios else None
        return found


class NullComparison(msgspec.Struct, frozen=True, kw_only=True):
    """The reference against itself, measured as one mode more in the same schedule: the noise of this run."""

    row: Annotated[Row, described("Its ratios should hold 1")]
    num_figures: Annotated[int, described("Ratios with an interval")]
    num_beyond: Annotated[int, described("Of them, those whose interval excludes 1; chance alone: 5 %")]
    beyond: Annotated[list[str], described("Which, as `level figure`")]
    said: Annotated[str, described("In words")]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Which mode to deploy, in words, and how sure that is. What is not established is not said."""

    deploy: Annotated[str, described("Name of the mode; empty: nothing is established")]
    tied: Annotated[list[str], described("Modes that this run cannot tell apart at the top")]
    headline: Annotated[str, described("For this model, device, traffic and SLO: one sentence")]
    because: list[str]
    costs: list[str]
    sureness: Annotated[list[str], described("How sure, and what would have to be measured to be surer")]
    rejected: Annotated[dict[str, str], described("Mode -> why it is not the one")]
    rule: Annotated[str, described("How a mode is chosen, in words")]


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of the schedule: modes are interleaved, in another seeded order in each repeat."""

    order: int
    repeat: int
    mode: str


class Model(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    path: str
    architecture: str
    num_parameters: int
    random_weights: Annotated[
        dict[str, str], described("What the weights were drawn with; empty: trained")
    ] = msgspec.field(default_factory=dict)


class Device(msgspec.Struct, frozen=True, kw_only=True):
    kind: Annotated[str, described("cpu or cuda:N")]
    name: str
    threads: Annotated[int, described("CPU threads of the engine; 0: one per core")]


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """The text that quality is computed on, and the one that calibrated modes may see: they never overlap."""

    name: str
    sha256: str
    python: Annotated[str, described("Version whose documentation the text is; empty for a file")]
    calibration_name: str
    calibration_sha256: str
    num_windows: int
    window_tokens: int
    protocol: Annotated[str, described("Its name, and what exactly perplexity is of (docs/quality.md)")]
    tokenizer_sha256: Annotated[str, described("Of tokenizer.json; empty in older reports")] = ""


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to keep to count as good. Null: not asked for."""

    ttft_s: float | None = None
    itl_s: Annotated[float | None, described("The 95th percentile of the request's own gaps")] = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def said(self) -> str:
        """`TTFT <= 500 ms, ITL <= 30 ms`."""
        named = {"TTFT": self.ttft_s, "ITL": self.itl_s, "TPOT": self.tpot_s, "E2E": self.e2e_s}
        return ", ".join(
            f"{name} <= {1e3 * limit:g} ms" for name, limit in named.items() if limit is not None
        )


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    prompts: str
    prompts_sha256: str
    seed: int
    rate_rule: Annotated[str, described("Where the open loops' rates come from")]
    output_tokens: int
    kv_tokens: int
    num_repeats: Annotated[int, described("Asked for at least")]
    max_repeats: Annotated[int, described("Where those cannot resolve 5 %")]
    slo: Slo | None = None
    throughput_level: Annotated[str, described("Id of the closed level whose tokens/s stand in tables")]
    latency_level: Annotated[str, described("Id of the open level whose latencies stand in tables")]
    deterministic: Annotated[bool, described("Every engine ran with `--deterministic`")] = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: Annotated[str, described(FORMAT)]
    first_line: Annotated[str, described("Model, device, workload")]
    supports: Annotated[str, described("What these figures can support, and what not")]
    complete: Annotated[bool, described("False: some mode was not measured, or failed")]
    not_measured: Annotated[list[str], described("Modes asked for that lack repeats: the run was stopped")]
    reference: Annotated[str, described("Name of the mode that others are told against")]
    confidence: Annotated[float, described("Of every interval")] = CONFIDENCE
    model: Model
    device: Device
    workload: Workload
    text: Text
    rows: list[Row]
    null: Annotated[NullComparison | None, described("Null: not measured yet")] = None
    verdict: Annotated[Verdict | None, described("Null: the run is not complete")] = None
    schedule: list[Turn]
    environment: Annotated[dict[str, str], described("Versions, machine, commit")]
    started_at: Annotated[str, described("ISO 8601, UTC")]
    seconds: Annotated[float, described("That measuring took, all engines together")]

    @property
    def judges_quality(self) -> bool:
        """Do perplexity and divergence mean anything? Not for weights that nobody trained."""
        return not self.model.random_weights

    @property
    def reference_row(self) -> Row | None:
        """The row that others are told against; None where it failed or is still to come."""
        return next((row for row in self.rows if row.ok and row.name == self.reference), None)

    @property
    def kv_note(self) -> str:
        """What KL is against where the rows' KV caches hold 8-bit codes; empty where they do not."""
        base = self.reference_row
        if base is None or base.kv_dtype not in ("int8", "fp8"):
            return ""
        return (
            f"The KV cache of every row holds {base.kv_dtype}; KL is against {self.reference} with a cache "
            f"in {base.dtype}, so in the row of {self.reference} it is what the cache costs. Prompts read "
            "their own keys and values from the cache too: prefill sees that cost as decode does."
        )


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of report.json, as shipped beside this file."""
    made = msgspec.json.schema(Report)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": FORMAT, **made}


def shipped_schema() -> dict[str, Any]:
    text = importlib.resources.files("service.compare").joinpath("report.schema.json").read_bytes()
    loaded: dict[str, Any] = msgspec.json.decode(text)
    return loaded


def purchase(row: Row, reference: Row | None, request_tokens: float) -> Purchase | None:
    """What `row`'s saving buys against `reference`; None for the reference and where there is none."""
    if reference is None or reference.name == row.name or not (row.memory and reference.memory):
        return None
    mine, theirs = row.memory, reference.memory
    freed = theirs.weight_bytes - mine.weight_bytes
    room = freed + theirs.kv_tokens * theirs.kv_bytes_per_token
    tokens = ledger.kv_tokens_in(room, mine.kv_bytes_per_token)
    more_requests = (
        ledger.requests_in(tokens, request_tokens) - ledger.requests_in(theirs.kv_tokens, request_tokens)
        if request_tokens
        else 0
    )
    return Purchase(
        freed_bytes=freed,
        kv_bytes_per_token=mine.kv_bytes_per_token,
        more_kv_tokens=tokens - theirs.kv_tokens,
        request_tokens=request_tokens,
        more_requests=more_requests,
    )


if __name__ == "__main__":  # writes the schema anew, after a change of the types
    path = Path(__file__).with_name("report.schema.json")
    path.write_bytes(msgspec.json.format(msgspec.json.encode(schema())) + b"\n")
