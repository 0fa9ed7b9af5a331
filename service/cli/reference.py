"""docs/settings.md and docs/metrics.md, written from the code; tests fail where file and code differ."""

from service.cli.flags import bounds, default_text, kind
from service.config import Settings
from service.metrics import catalogue

SETTINGS_HEAD = """\
# Settings

Each setting is a flag of `halftone serve` (`--max-batch-tokens`), a variable (`HALFTONE_MAX_BATCH_TOKENS`)
and a line in a TOML file (`max_batch_tokens = 512`): `halftone.toml` in the working directory, or the file
that HALFTONE_CONFIG names. A flag beats the variable, the variable beats the file. A name that does not
exist is an error, wherever it stands.

| setting | values | default | meaning |
|---|---|---|---|
"""
METRICS_HEAD = """\
# Metrics

`GET /metrics`, Prometheus' text format. Every series carries `model` and `precision`, so that two modes can
be laid side by side; further labels are named below. Buckets of latencies grow by 1.25, fine enough to tell
a mode of 3.5 ms a token from one of 6.5 ms.

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
    return METRICS_HEAD + "".join(rows)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


PAGES = {"settings": settings_page, "metrics": metrics_page}
