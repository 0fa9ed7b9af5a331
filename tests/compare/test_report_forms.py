"""Report -> schema, page, table, exports, from rows made by hand."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import msgspec
import pytest

from service import cores
from service.compare.assemble import environment
from service.compare.export import comma_separated, markdown, notes
from service.compare.figures import Figures, Interval, Latency, Level, Run
from service.compare.mode import agreement_of
from service.compare.page import render_page
from service.compare.report import (
    Agreement,
    Apart,
    Device,
    Loading,
    Memory,
    Mode,
    Model,
    Quality,
    Report,
    Row,
    Text,
    Workload,
    purchase,
    schema,
    shipped_schema,
)
from service.errors import HalftoneError
from service.messages import Evaluated, Paired


def once(value: float) -> Interval:
    return Interval(estimate=value, low=0.9 * value, high=1.1 * value, n=3)


def level(id: str, concurrency: int) -> Level:
    latency = Latency(n=10, mean=0.05, p50=0.05, p95=0.1, p99=0.15, max=0.2)
    run = Run(
        repeat=0,
        order=0,
        seed=0,
        num_ok=8,
        num_errors=0,
        num_short=0,
        errors={},
        window_s=2.0,
        prompt_tokens=80,
        output_tokens=128,
        output_tokens_per_s=64.0 + concurrency,
        requests_per_s=4.0,
        goodput_per_s=None,
        ttft_s=latency,
        itl_s=latency,
        tpot_s=latency,
        e2e_s=latency,
        energy=None,
        client_cpu_share=0.02,
        client_lag_p99_s=0.0003,
        raw=f"modes/1-x-{id}.json",
    )
    figures = {
        f"{name}_{percent}_s": once(times * middle)
        for name, middle in (("ttft", 0.05), ("itl", 0.01), ("tpot", 0.011), ("e2e", 0.2))
        for times, percent in enumerate(("p50", "p95", "p99"), 1)
    }
    return Level(
        id=id,
        concurrency=concurrency,
        rate_per_s=0.0 if concurrency else 1.5,
        num_requests=8,
        num_warmup=2,
        runs=[run],
        figures=Figures(output_tokens_per_s=once(64.0 + concurrency), requests_per_s=once(4.0), **figures),
        itl_curve_s=[0.005 + 0.0005 * n for n in range(51)],
    )


def row(
    precision: str,
    weight_bytes: int,
    perplexity: float,
    disagreement: float = 0.0005,
    standard_error: float = 0.001,
) -> Row:
    apart = Apart(change=disagreement, standard_error=standard_error)
    agreement = Agreement(
        tokens=2048,
        prefill=perplexity,
        decode1=perplexity * (1 + disagreement),
        decode8=perplexity,
        decode1_apart=apart,
        decode8_apart=Apart(change=0.0, standard_error=standard_error),
        disagreement=disagreement,
        agrees=not apart.is_flagged,
    )
    return Row(
        mode=Mode(name=precision, precision=precision),
        status="ok",
        num_repeats=3,
        memory=Memory(
            weight_bytes=weight_bytes,
            kv_bytes=20_000_000,
            kv_tokens=1000,
            kv_bytes_per_token=20_000,
            peak_load_bytes=2 * weight_bytes,
            peak_bytes=weight_bytes + 50_000_000,
            peak_without_kv_bytes=weight_bytes + 30_000_000,
            parts={"weights.codes": weight_bytes - 1000, "weights.norms": 1000, "kv.free": 20_000_000},
        ),
        quality=Quality(
            perplexity=perplexity,
            tokens=4096,
            kl_mean=0.01,
            kl_tokens=4096,
            top1_agreement=0.95,
            agreement=agreement,
        ),
        levels=[level("closed-1", 1), level("closed-4", 4), level("open", 0)],
        loading=Loading(seconds=once(3.5), stages={"import": 1.0, "load": 2.5}),
        dtype="bf16",
        kv_dtype="bf16",
        kernels={"qkv_proj": "torch"},
        seconds=10.0,
    )


def report(*rows: Row) -> Report:
    reference = next((one for one in rows if one.ok), None)
    return Report(
        format="halftone-report/2",
        first_line="tiny on a <b>machine</b>",
        supports="nothing but this test",
        complete=all(one.ok for one in rows),
        not_measured=[],
        reference="bf16",
        model=Model(name="tiny & small", path="/m", architecture="A", num_parameters=1),
        device=Device(kind="cpu", name="x", threads=2),
        workload=Workload(
            prompts="64 texts",
            prompts_sha256="0" * 64,
            seed=0,
            rate_rule="as asked",
            output_tokens=16,
            kv_tokens=1000,
            num_repeats=3,
            max_repeats=5,
            throughput_level="closed-4",
            latency_level="open",
        ),
        text=Text(
            name="t",
            sha256="1" * 64,
            python="3.11.7",
            calibration_name="c",
            calibration_sha256="2" * 64,
            num_windows=8,
            window_tokens=513,
            protocol="p",
        ),
        rows=[msgspec.structs.replace(one, purchase=purchase(one, reference, 100.0)) for one in rows],
        schedule=[],
        environment={"python": "3.11", "commit": ""},
        started_at="2026-01-01T00:00:00+00:00",
        seconds=20.0,
    )


@pytest.fixture
def three() -> Report:
    return report(
        row("bf16", 269_000_000, 20.0),
        row("nf4", 115_000_000, 23.9, disagreement=0.004),
        Row(
            mode=Mode(name="awq:bits=3", precision="awq:bits=3"),
            status="failed",
            error="`<script>` has no kernel\n  hint: none",
        ),
    )


def test_an_8_bit_cache_is_told_in_every_form(three: Report) -> None:
    """With what its cost is seen against; a report of 16-bit caches says nothing of it."""
    coded = report(*(msgspec.structs.replace(one, kv_dtype="int8") for one in three.rows[:2]))
    told = "The KV cache of every row holds int8; KL is against bf16 with a cache in bf16"
    for shown in (coded, three):
        for text in (render_page(shown), markdown(shown)):
            assert (told in text) is (shown is coded)
    header, first, *_ = comma_separated(coded).splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["kv_dtype"] == "int8"


def test_the_shipped_schema_is_the_types(three: Report) -> None:
    assert shipped_schema() == schema(), "write it anew: python -m service.compare.report"
    jsonschema.Draft202012Validator.check_schema(shipped_schema())
    good = msgspec.to_builtins(three)
    jsonschema.validate(good, shipped_schema())
    for broken in ({**good, "rows": [{"precision": "x"}]}, {**good, "complete": "yes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, shipped_schema())


def test_what_freed_bytes_buy(three: Report) -> None:
    bought = three.rows[1].purchase
    assert bought is not None
    assert bought.freed_bytes == 154_000_000
    assert bought.kv_bytes_per_token == 20_000
    assert bought.more_kv_tokens == 7700
    assert bought.more_requests == 77
    assert three.rows[0].purchase is None
    larger = purchase(row("fp32", 538_000_000, 20.0), row("bf16", 269_000_000, 20.0), 100.0)
    assert larger is not None
    assert larger.more_kv_tokens == -13_450


class Reader(HTMLParser):
    """Tags in balance, text, and everything a browser would fetch."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_every_row_and_fetches_nothing(three: Report) -> None:
    page = render_page(three)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
    for one in three.rows:
        assert reader.text.count(one.name) >= 2
    assert "`<script>` has no kernel" in reader.text
    assert "tiny on a <b>machine</b>" in reader.text  # escaped, or the parser would have eaten the tags
    assert page.count("<svg") == 4
    assert "43 % of the bytes of bf16" in reader.text
    assert "19.5 % higher" in reader.text
    assert "+7,700" in reader.text
    assert "+0.400 ± 0.100 % – apart" in reader.text


def test_random_weights_get_no_verdict_on_quality(three: Report) -> None:
    model = msgspec.structs.replace(three.model, random_weights={"seed": "0"})
    random = msgspec.structs.replace(three, model=model)
    reader = Reader()
    reader.feed(render_page(random))
    assert "no verdict: random weights" in reader.text
    assert "there is no verdict on its quality" in reader.text
    assert "% higher" not in reader.text
    assert "Quality against bytes" not in reader.text
    for written in (reader.text, markdown(random)):
        assert "19.5 %" not in written
        assert "95.0 %" not in written
    rows = [line for line in markdown(random).splitlines() if line.startswith("| nf4")]
    assert rows[0].count(" no verdict ") == 3
    assert "no verdict" not in markdown(three) + render_page(three)


def test_a_page_of_failures_is_still_a_page() -> None:
    failed = report(Row(mode=Mode(name="bf16", precision="bf16"), status="failed", error="no memory"))
    reader = Reader()
    reader.feed(render_page(failed))
    assert "no memory" in reader.text
    assert "not complete" in reader.text


def test_tokens_that_came_all_at_once_have_no_curve(three: Report) -> None:
    """On an overloaded machine every gap can be 0, and the whole report was lost."""
    rows = [
        msgspec.structs.replace(
            mode, levels=[msgspec.structs.replace(one, itl_curve_s=[0.0] * 51) for one in mode.levels]
        )
        for mode in three.rows
    ]
    page = render_page(msgspec.structs.replace(three, rows=rows))
    assert "Time between two tokens" not in page
    assert "Memory at the peak" in page


def test_a_disagreement_is_flagged_everywhere(three: Report) -> None:
    wanted = (
        "(!) nf4, decode M=1: +0.40 ± 0.10 % from prefill on 2,048 tokens, more than 0.2 % and more than 2 "
    )
    assert any(note.startswith(wanted) for note in notes(three))
    assert "+0.40 ± 0.10 % (!)" in markdown(three)
    assert not any(note.startswith("(!) bf16") for note in notes(three))
    assert not any("M=8:" in note for note in notes(three))


def test_a_difference_within_noise_is_told_and_not_flagged() -> None:
    """2,048 tokens of int8 are 0.3 % apart by chance: half a percent is their standard error."""
    noisy = report(
        row("bf16", 269_000_000, 20.0), row("int8", 1, 20.5, disagreement=0.004, standard_error=0.005)
    )
    assert "+0.40 ± 0.50 % |" in markdown(noisy)
    assert (
        "int8, decode M=1: +0.40 ± 0.50 % from prefill on 2,048 tokens, more than 0.2 % but within 2"
        in str(notes(noisy))
    )
    assert "– apart" not in render_page(noisy)
    assert not any(note.startswith("(!)") for note in notes(noisy))


@pytest.mark.parametrize(
    ("change", "standard_error", "flagged"),
    [(0.003, 0.001, True), (-0.003, 0.001, True), (-0.003, 0.002, False), (0.0015, 0.0001, False)],
)
def test_a_flag_needs_both_size_and_certainty(change: float, standard_error: float, flagged: bool) -> None:
    assert Apart(change=change, standard_error=standard_error).is_flagged is flagged


def test_tables_have_a_cell_for_every_column(three: Report) -> None:
    lines = [line for line in markdown(three).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 3
    assert len(comma_separated(three).splitlines()) == 1 + 3 + 1  # the error's hint is a line of its own


def test_agreement_by_hand() -> None:
    nll = {"prefill": 6.0, "decode1": 6.003, "decode8": 5.991}
    paired = {"decode1": Paired(3, 0.001, 0.0001), "decode8": Paired(3, -0.003, 0.001)}
    agreement = agreement_of(Evaluated(1, 1, 1, nll, dict.fromkeys(MODES, 3), paired=paired))
    assert agreement.prefill == pytest.approx(7.389056)
    assert agreement.decode8_apart.change == pytest.approx(-0.0029955, rel=1e-4)  # exp(-0.003) - 1
    assert agreement.decode8_apart.change == pytest.approx(agreement.decode8 / agreement.prefill - 1)
    assert agreement.decode8_apart.standard_error == pytest.approx(0.001 * 0.9970045)
    assert agreement.disagreement == pytest.approx(0.0029955, rel=1e-4)
    assert not agreement.agrees
    paired["decode8"] = Paired(3, -0.003, 0.0016)
    assert agreement_of(Evaluated(1, 1, 1, nll, dict.fromkeys(MODES, 3), paired=paired)).agrees
    for tokens, common in (({"prefill": 3, "decode1": 3, "decode8": 2}, 3), (dict.fromkeys(MODES, 3), 2)):
        paired["decode8"] = Paired(common, 0.0, 0.0)
        with pytest.raises(HalftoneError, match="different tokens"):
            agreement_of(Evaluated(1, 1, 1, nll, tokens, paired=paired))


MODES = ("prefill", "decode1", "decode8")


def test_readme_of_the_load_generator_is_what_the_page_says() -> None:
    """One definition of TPOT, in both places."""
    readme = (Path(__file__).resolve().parents[2] / "loadtest/README.md").read_text()
    assert "(E2E - TTFT) / (n - 1)" in readme


def test_the_environment_is_told_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no such call, and a comparison there ended without its report."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "_mac_cores", lambda: 8)
    assert environment(None)["machine"].endswith(", 8 cores usable")
