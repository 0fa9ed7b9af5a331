"""Report -> Markdown, CSV, and what a terminal shows."""

import csv
import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from service.compare.forms.comma import levels_csv, modes_csv
from service.compare.forms.notes import explanations, warnings
from service.compare.forms.tables import markdown, print_report
from service.compare.report import Apart, Report
from tests.compare.made_up import KV_BYTES_PER_TOKEN, MODES, TEN, failed, made_up, too_large

replace = msgspec.structs.replace


@pytest.fixture
def three() -> Report:
    report = made_up(MODES[:3])
    rows = [*report.rows, failed("awq|x", "`<script>` has no kernel\n  hint: none"), too_large("fp32")]
    return replace(report, rows=rows, complete=False, verdict=None)


def shown(report: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    print_report(report, Path("/out"), console)
    return console.export_text()


def lines_of(written: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(written)))


def test_markdown_has_a_cell_for_every_column(three: Report) -> None:
    lines = [line.replace("\\|", "") for line in markdown(three).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {14}
    assert len(lines) == 2 * (2 + 5)
    assert "| nf4 | 5.69 −65 % ✓ | 10.2 −50 % ✓ | 1,344 −6.0 % ✗ (−8.8 to −3.2) |" in markdown(three)
    assert "| fp32 | does not fit | does not fit |" in markdown(three)


def test_markdown_escapes_what_it_is_given(three: Report) -> None:
    written = markdown(three)
    assert "\\`\\<script>\\` has no kernel hint: none" in written
    assert written.count("<script>") == written.count("\\<script>")
    assert "| awq\\|x | failed |" in written


def test_markdown_begins_with_the_verdict() -> None:
    lines = markdown(made_up()).splitlines()
    assert lines[0] == "# Deploy fp8"
    assert "- Perplexity +0.7 % \\[+0.3, +1.1], KL 0.0042 nats per token." in lines
    assert "- int8: surely slower than bf16" in lines


def test_random_weights_have_no_columns_of_quality() -> None:
    report = made_up()
    random = replace(report, model=replace(report.model, random_weights={"seed": "0"}))
    for form in (markdown, shown):
        for told in ("7.676", "Perplexity and KL", "Same answer", "same top"):
            assert told in form(report), told
            assert told not in form(random), told


def test_csv_is_in_base_units(three: Report) -> None:
    written = lines_of(modes_csv(three))
    assert [line["mode"] for line in written] == ["bf16", "int8", "nf4", "awq|x", "fp32"]
    nf4 = written[2]
    assert int(nf4["weight_bytes"]) == 5_690_000_000
    assert float(nf4["kv_bytes_per_token"]) == KV_BYTES_PER_TOKEN
    assert float(nf4["ttft_p95_s"]) == pytest.approx(0.0867, rel=0.01)
    assert float(nf4["ttft_p95_s_low"]) < float(nf4["ttft_p95_s"]) < float(nf4["ttft_p95_s_high"])
    assert float(nf4["output_tokens_per_s_ratio"]) == pytest.approx(0.94)
    assert written[0]["output_tokens_per_s_ratio"] == ""
    assert written[3]["error"] == "`<script>` has no kernel hint: none"
    assert written[4]["status"] == "does not fit"
    assert written[4]["perplexity"] == "7.42"
    assert not any(name.endswith(("_ms", "_mb", "_gb", "_percent")) for name in nf4)


def test_levels_csv_has_every_figure_of_every_level(three: Report) -> None:
    written = lines_of(levels_csv(three))
    assert len(written) == 3 * (4 * 16 + 4 * 17)  # closed levels have no goodput
    one = next(
        line
        for line in written
        if (line["mode"], line["level"], line["figure"]) == ("nf4", "closed-64", "output_tokens_per_s")
    )
    assert float(one["concurrency"]) == 64
    assert float(one["ratio_low"]) < float(one["ratio"]) == pytest.approx(0.94)


def test_a_terminal_shows_every_mode_and_the_verdict_last() -> None:
    report = made_up(TEN)
    text = shown(report)
    for one in report.rows:
        assert all(word in text for word in one.name.split())  # a long name takes two lines
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines.index("Deploy fp8") > len(lines) - 12
    assert "report: /out/report.html" in lines[-1]


def test_a_terminal_shows_names_in_brackets_as_they_are(three: Report) -> None:
    """Rich takes `[/red]` for markup, and failed on it."""
    rows = [replace(one, mode=replace(one.mode, name=f"{one.name}[/red]")) for one in three.rows]
    assert "nf4[/red]" in shown(replace(three, rows=rows))


def test_five_modes_fit_a_terminal_of_eighty_characters() -> None:
    assert max(map(len, shown(made_up(), 80).splitlines())) <= 80
    assert "…" not in shown(made_up(), 80)


def test_a_difference_within_noise_is_explained_and_not_warned_of() -> None:
    """2,048 tokens of int8 are 0.3 % apart by chance: half a percent is their standard error."""
    report = made_up()
    quality = report.rows[1].quality
    assert quality is not None
    for apart, is_warned in (
        (Apart(change=0.004, standard_error=0.005, num_windows=8), False),
        (Apart(change=0.004, standard_error=0.001, num_windows=8), True),
    ):
        agreement = replace(quality.agreement, decode1_apart=apart, agrees=not is_warned)
        row = replace(report.rows[1], quality=replace(quality, agreement=agreement))
        told = replace(report, rows=[report.rows[0], row])
        assert any("int8, decode M=1: +0.40 ±" in said for said in warnings(told)) is is_warned
        assert any("too few tokens to decide" in said for said in explanations(told)) is not is_warned


def test_failed_requests_are_warned_of() -> None:
    report = made_up()
    first = report.rows[0]
    run = replace(first.levels[0].runs[0], num_errors=2, num_short=1)
    levels = [replace(first.levels[0], runs=[run]), *first.levels[1:]]
    told = replace(report, rows=[replace(first, levels=levels), *report.rows[1:]])
    assert warnings(told) == ["bf16, 1 stream: 2 requests failed, 1 answers were short."]
    assert warnings(report) == []


def test_goodput_is_told_where_the_verdict_looks() -> None:
    """At the highest rate; the middle one, where latencies are, parts no modes."""
    report = made_up()
    wanted = report.rows[2].figure("goodput_per_s", "open-16")
    assert wanted is not None
    assert float(lines_of(modes_csv(report))[2]["goodput_per_s"]) == wanted.estimate
    assert "Goodput: with TTFT <= 500 ms, ITL <= 30 ms, at 16 requests/s." in explanations(report)
