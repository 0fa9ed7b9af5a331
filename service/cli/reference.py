"""docs/settings.md and docs/metrics.md, written from the code; tests fail where file and code differ."""

from service.cli.flags import bounds, default_text, kind
from service.config import Settings
from service.metrics import TWINS, catalogue
from service.metrics.vllm import STATUS_CLASSES, Twin

SETTINGS_HEAD = """\
# Settings

Each setting is a flag of `halftone serve` (`--max-batch-tokens`), a variable (`HALFTONE_MAX_BATCH_TOKENS`)
and a line in a TOML file (`max_batch_tokens = 512`): `halftone.toml` in the working directory, or the file
that HALFTONE_CONFIG names. A flag beats the variable, the variable beats the file. A name that does not
exist is an error, wherever it stands.

| setting | values | default | meaning |
|---|---|---|---|
"""
COMPAT_HEAD = """
## vLLM's names

`--metrics-compat vllm` exports these beside our own, for vLLM's dashboards, KServe's autoscaling and llm-d's
router. They carry `model_name`, `engine` and `precision`; a histogram has our buckets.

| vLLM | ours | labels beside |
|---|---|---|
"""
METRICS_HEAD = """\
# Metrics

`GET /metrics`, Prometheus' text format. Every series carries `model` and `precision`, so that two modes can
be laid side by side; further labels are named below. Bounds of latencies grow by 1.25 from 1 ms, and what a
client feels (first token, inter-token, per token, end to end) has two more in each such step: where all steps
take one time, a median over its buckets is within 4 %.

Counters and histograms are those of the time in which their precision was served: a server that changes its
precision goes on with another set, and comes back to the first where it was. Gauges are of now, so that a
precision which is not served has none.

A scrape reads the GPU's energy and power in a thread, so that no stream waits for the driver. Where that does
not answer in half a second the page goes without power, and its joules follow with the next answer.

What serves cannot be timed by op: a GPU replays a decode step as one graph, in which a kernel begins before
the one ahead of it has ended, a CPU as one call. `halftone_kernel_seconds` is therefore of a start with
`--time-kernels`: each op alone, all layers' behind each other, 256 tokens of context behind each row. For the
demo model that takes 0.5 to 1.2 s on one core; the ops of one row summed to 15.6, 7.2 and 16.5 ms in bf16,
nf4 and int8, where the step took 15.6, 9.0 and 17.4 (one run on a busy machine). On an H100
sums and steps of a 1B shape are within 5 % of each other (performance.md).

| metric | type | unit | further labels | meaning |
|---|---|---|---|---|
"""
COMMON_LABELS = ("model", "precision")


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        limits = bounds(field)
        values = f"{kind(field)}, {limits}" if limits else kind(field)
        default = f"`{default_text(field)}`" if default_text(field) else "empty"
        rows.append(row(f"`{name}`", values, default, field.description or ""))
    return SETTINGS_HEAD + "".join(rows)


def metrics_page() -> str:
    rows = []
    for family in catalogue():
        labels = ", ".join(f"`{label}`" for label in family.labels if label not in COMMON_LABELS)
        rows.append(row(f"`{family.name}`", family.type, family.unit, labels, family.help))
    twins = [row(f"`{twin.name}`", twin_source(twin), twin_labels(twin)) for twin in TWINS]
    cache = row("`vllm:cache_config_info`", "`halftone_kv_cache_tokens`, `halftone_kv_block_tokens`",
                "`block_size`, `num_gpu_blocks`")  # fmt: skip
    return METRICS_HEAD + "".join(rows) + COMPAT_HEAD + "".join(twins) + cache


def twin_source(twin: Twin) -> str:
    if not twin.values or twin.values is STATUS_CLASSES:
        return f"`{twin.source}`"
    return f"`{twin.source}`: {' + '.join(twin.values)}"


def twin_labels(twin: Twin) -> str:
    fixed = [f'`{name}="{value}"`' for name, value in twin.fixed]
    return ", ".join([*(f"`{name}`" for name in twin.names if name), *fixed])


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


PAGES = {"settings": settings_page, "metrics": metrics_page}
