"""What a comparison found, as types: the source of report.json, its schema, and every other form of it.

mode.measure() --Row--> Report --> report.json, .html, .md, .csv, terminal

Times are seconds, sizes bytes, KL nats per token. The schema in report.schema.json is made from these types
and shipped; a test holds the two together.
"""

import importlib.resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

FORMAT = "halftone-report/1"
MAX_DISAGREEMENT = 0.002
MIN_STANDARD_ERRORS = 2.0


def described(text: str) -> Meta:
    return Meta(description=text)


class Latency(msgspec.Struct, frozen=True):
    """Seconds. With fewer than 100 values p99 is close to the slowest of them."""

    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of load: the same seeded requests in every row."""

    id: Annotated[str, described("`closed-N`: N streams that each wait for their answer; `open`: Poisson")]
    concurrency: Annotated[int, described("Streams of a closed loop, 0 for the open one")]
    rate_per_s: Annotated[float, described("Requests/s of the open loop, 0 for a closed one")]
    num_requests: int
    num_warmup: int
    output_tokens: Annotated[int, described("Length asked of every answer")]
    num_ok: int
    num_errors: int
    num_short: Annotated[int, described("Answers with fewer tokens than asked")]
    errors: dict[str, int]
    window_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_s: Annotated[Latency | None, described("First token - time the request was due")]
    itl_s: Annotated[Latency | None, described("Gaps between tokens, all requests pooled")]
    tpot_s: Annotated[Latency | None, described("(E2E - TTFT) / (tokens - 1) of each request")]
    e2e_s: Latency | None
    itl_curve_s: Annotated[list[float], described("Quantiles 0, 2, 4, ... 100 % of the gaps")]
    client_cpu_share: Annotated[float, described("Of one core, taken by the load generator itself")]
    client_lag_p99_s: Annotated[float, described("How late the load generator woke up")]
    raw: Annotated[str, described("File beside this one with every request's timestamps")]


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
    standard_error: Annotated[float, described("Of `change`, over windows: tokens of one move together")]

    @property
    def exceeds(self) -> bool:
        """Further apart than one model computed twice may be."""
        return abs(self.change) > MAX_DISAGREEMENT

    @property
    def is_decided(self) -> bool:
        """Further from 0 than chance takes it one time in twenty."""
        return abs(self.change) > MIN_STANDARD_ERRORS * self.standard_error

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
            f"False: a change is beyond {MAX_DISAGREEMENT} and beyond {MIN_STANDARD_ERRORS:g} standard errors"
        ),
    ]

    @property
    def apart(self) -> dict[str, Apart]:
        """By the name that people read."""
        return {"M=1": self.decode1_apart, "M=8": self.decode8_apart}


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    perplexity: Annotated[float, described("Over the evaluation windows, by prefill")]
    tokens: int
    kl_mean: Annotated[float, described("KL(reference || mode) over the full vocabulary, nats per token")]
    kl_tokens: int
    top1_agreement: Annotated[float, described("Share of positions where both find the same token likeliest")]
    agreement: Agreement


class Purchase(msgspec.Struct, frozen=True, kw_only=True):
    """What the bytes that a mode frees against the reference would buy at an equal memory budget."""

    freed_bytes: Annotated[int, described("Weight bytes of the reference less those of this mode")]
    kv_bytes_per_token: float
    more_kv_tokens: Annotated[int, described("freed_bytes / kv_bytes_per_token; negative: it costs room")]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One precision. Speed, bytes and quality come from the same engine process, so from the same weights."""

    precision: Annotated[str, described("Canonical: `name[:option=value,...]`")]
    status: Literal["ok", "failed"]
    error: Annotated[str, described("Why there are no figures; empty for `ok`")] = ""
    ttft: Annotated[Latency | None, described("Of the open loop, seconds")] = None
    itl: Annotated[Latency | None, described("Of the open loop, seconds")] = None
    tpot: Annotated[Latency | None, described("Of the open loop, seconds")] = None
    tokens_per_s: Annotated[float | None, described("Output tokens/s of the widest closed loop")] = None
    memory: Memory | None = None
    perplexity: Annotated[float | None, described("quality.perplexity")] = None
    kl: Annotated[float | None, described("quality.kl_mean")] = None
    quality: Quality | None = None
    purchase: Annotated[Purchase | None, described("Against the reference; none for the reference")] = None
    load_seconds: Annotated[dict[str, float], described("Stage of loading -> seconds")] = msgspec.field(
        default_factory=dict
    )
    quantize_seconds: Annotated[
        float,
        described("Making the checkpoint of this mode, in an engine before the measured one; 0: none made"),
    ] = 0.0
    loads: list[Load] = msgspec.field(default_factory=list)
    dtype: Annotated[str, described("Of activations")] = ""
    kv_dtype: Annotated[str, described("Of the KV cache: as `dtype`, or int8, fp8")] = ""
    kernels: dict[str, str] = msgspec.field(default_factory=dict)
    calibration: dict[str, str] = msgspec.field(default_factory=dict)
    seconds: Annotated[float, described("That this row took to measure")] = 0.0

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def seconds_to_load(self) -> float:
        return sum(self.load_seconds.values())


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
    protocol: str


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    prompts: str
    prompts_sha256: str
    seed: int
    rate_per_s: Annotated[float, described("Of the open loop; chosen once, the same in every row")]
    rate_rule: Annotated[str, described("Where the rate comes from")]
    output_tokens: int
    kv_tokens: int
    deterministic: Annotated[bool, described("Every engine ran with `--deterministic`")] = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: Annotated[str, described(FORMAT)]
    first_line: Annotated[str, described("Model, device, workload")]
    supports: Annotated[str, described("What these figures can support, and what not")]
    complete: Annotated[bool, described("False: some mode was not measured, or failed")]
    not_measured: Annotated[list[str], described("Modes asked for that have no row: the run was stopped")]
    reference: str
    model: Model
    device: Device
    workload: Workload
    text: Text
    rows: list[Row]
    environment: Annotated[dict[str, str], described("Versions, machine, commit")]
    started_at: Annotated[str, described("ISO 8601, UTC")]
    seconds: Annotated[float, described("Sum over the rows")]

    @property
    def judges_quality(self) -> bool:
        """Do perplexity and divergence mean anything? Not for weights that nobody trained."""
        return not self.model.random_weights

    @property
    def reference_row(self) -> Row | None:
        """The row that others are told against; None where it failed or is still to come."""
        return next((row for row in self.rows if row.ok and row.precision == self.reference), None)

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


def purchase(row: Row, reference: Row | None) -> Purchase | None:
    """What `row`'s saving buys against `reference`; None for the reference and where there is none."""
    if reference is None or reference.precision == row.precision or not (row.memory and reference.memory):
        return None
    freed = reference.memory.weight_bytes - row.memory.weight_bytes
    per_token = row.memory.kv_bytes_per_token
    return Purchase(freed_bytes=freed, kv_bytes_per_token=per_token, more_kv_tokens=int(freed / per_token))


if __name__ == "__main__":  # writes the schema anew, after a change of the types
    path = Path(__file__).with_name("report.schema.json")
    path.write_bytes(msgspec.json.format(msgspec.json.encode(schema())) + b"\n")
