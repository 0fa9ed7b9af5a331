"""Report -> one HTML page: what a stranger must find in it, and what must never be in it."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import msgspec
import pytest

from service.compare.forms.page import render_page
from service.compare.report import Apart, Mode, Report, Verdict
from tests.compare.made_up import GRID, MODES, TEN, VERDICT, Made, failed, made_up, row, too_large

HOSTILE = "<script>alert(1)</script>\"'&<b>"
replace = msgspec.structs.replace


def random_weights(report: Report) -> Report:
    return replace(report, model=replace(report.model, random_weights={"seed": "0"}))


def with_failures(report: Report) -> Report:
    rows = [*report.rows[:1], failed("int8", "`int8` has no kernel\n  hint: none"), too_large("fp32")]
    return replace(report, rows=rows, complete=False, verdict=None)


def undecided(report: Report) -> Report:
    verdict = replace(VERDICT, deploy="", tied=["fp8", "awq"], headline="Neither is surely better.")
    return replace(report, verdict=verdict)


def hostile(report: Report) -> Report:
    rows = [row(replace_name(made), MODES[0]) for made in MODES]
    errors = [failed(HOSTILE + "2", HOSTILE)]
    verdict = Verdict(
        deploy=rows[1].name,
        tied=[],
        headline=HOSTILE,
        because=[HOSTILE],
        costs=[HOSTILE],
        sureness=[HOSTILE],
        rejected={HOSTILE: HOSTILE},
        rule=HOSTILE,
    )
    rows[1] = replace(rows[1], kernels={HOSTILE: HOSTILE}, calibration={HOSTILE: HOSTILE}, kv_dtype=HOSTILE)
    return replace(
        report,
        first_line=HOSTILE,
        supports=HOSTILE,
        rows=rows + errors,
        verdict=verdict,
        reference=rows[0].name,
        model=replace(report.model, name=HOSTILE),
        device=replace(report.device, name=HOSTILE),
        environment={HOSTILE: HOSTILE},
    )


def large_reference(report: Report) -> Report:
    """What a user who needs 4 bits most has: quality against 16 bits, and no speed of them."""
    rows = [
        replace(
            one, levels=[replace(level, ratios=None) for level in one.levels], crossover=None, purchase=None
        )
        for one in report.rows[1:]
    ]
    return replace(report, rows=[too_large("bf16"), *rows], null=None)


def another_server(report: Report) -> Report:
    """Its speed is known, and nothing of its bytes and quality."""
    mode = Mode(name="vllm", precision="", server="http://127.0.0.1:8001")
    other = replace(
        report.rows[1], mode=mode, memory=None, quality=None, loading=None, purchase=None, kernels={}
    )
    return replace(report, rows=[*report.rows, other])


def replace_name(made: Made) -> Made:
    return Made(f"{made.name}{HOSTILE}", made.gigabytes, made.speed_alone, made.speed_crowded, made.kl)


KINDS: dict[str, Callable[[], Report]] = {
    "all measured": made_up,
    "one run": lambda: made_up(repeats=1, null=None),
    "one mode": lambda: made_up(MODES[:1], verdict=None),
    "ten modes": lambda: made_up(TEN),
    "grid of KV types": lambda: made_up(GRID),
    "random weights": lambda: random_weights(made_up()),
    "failures": lambda: with_failures(made_up()),
    "undecided": lambda: undecided(made_up()),
    "nothing measured": lambda: made_up(
        rows=[failed("bf16", "no memory")], null=None, verdict=None, complete=False
    ),
    "a reference that does not fit": lambda: large_reference(made_up()),
    "another server": lambda: another_server(made_up()),
    "hostile names": lambda: hostile(made_up()),
}


class Reader(HTMLParser):
    """Tags in balance, text by tag, and everything that a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += " "
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")
        ]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def read(report: Report) -> Reader:
    return Reader(render_page(report))


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_is_whole_and_needs_nothing_beside_it(kind: str) -> None:
    report = KINDS[kind]()
    page = render_page(report)
    reader = Reader(page)
    assert reader.open == []
    assert reader.fetched == []
    assert reader.handlers == []
    assert not reader.tags & {"script", "iframe", "link", "img", "object", "form", "b"}
    assert not re.search(r"url\(|@import|\bNone\b|\bnan\b|\binf\b", page)
    for one in report.rows:
        assert one.name in reader.text


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_drawing_is_one(kind: str) -> None:
    """A division by the width of nothing put `nan` into a path, and the drawing was empty."""
    page = render_page(KINDS[kind]())
    for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
        for value in re.findall(rf' {name}="([^"]*)"', page):
            assert -1 <= float(value) <= 2000, (name, value)
    for drawn in re.findall(r'points="([^"]*)"', page):
        assert all(re.fullmatch(r"-?[\d.]+,-?[\d.]+", pair) for pair in drawn.split())


def test_a_stranger_reads_the_answer_first() -> None:
    """Which, at what cost, how sure: before the first table."""
    words = read(made_up()).words
    top = words[: words.index("The modes side by side")]
    for said in (
        "Deploy fp8",
        "✓ better and ✗ worse than bf16 are established, ~ cannot be told from none",
        "Tokens/s with 64 streams, latencies at 8 requests/s",
        "Why",
        "What it costs",
        "How sure",
        *VERDICT.because,
        *VERDICT.costs,
        *VERDICT.sureness,
    ):
        assert said in top
    assert "tokens/s 1,973 bf16: 1,430 +38 % ✓ +34 to +42" in top
    assert "weights GB 9.08 bf16: 16.1 −43 % ✓" in top
    assert "KL nats/token 0.0042" in top


def test_a_change_within_its_interval_is_told_apart_from_an_established_one() -> None:
    page = render_page(made_up())
    assert '<small class="better">+38 % ✓</small><small class="ends">+34 to +42</small>' in page
    assert '<small class="worse">−6.0 % ✗</small>' in page
    assert '<small class="undecided">~ +0.2 %</small><small class="ends">−0.2 to +0.6</small>' in page


def test_a_peak_that_is_a_little_lower_is_not_better() -> None:
    """0.1 % of a process's memory was once told as established."""
    report = made_up()
    memory, base = report.rows[1].memory, report.rows[0].memory
    assert memory is not None
    assert base is not None
    near = replace(
        memory, peak_bytes=int(base.peak_bytes * 0.999), weight_bytes=int(base.weight_bytes * 0.999)
    )
    page = render_page(replace(report, rows=[report.rows[0], replace(report.rows[1], memory=near)]))
    assert '20.6<small class="undecided">~ −0.1 %</small>' in page
    assert '16.0<small class="better">−0.1 % ✓</small>' in page


def test_noise_is_a_row_of_its_own() -> None:
    words = read(made_up()).words
    assert "noise bf16 against itself 1,436 ~ +0.4 %" in words
    assert "5 of 136 ratios exclude 1" in words
    assert "against itself" not in read(made_up(null=None)).words


def test_one_run_has_no_intervals_and_says_so() -> None:
    words = read(made_up(repeats=1, null=None)).words
    assert "~ +38 % one run" in words
    assert "+34 to +42" not in words.replace("[+34, +42]", "")


def test_no_verdict_is_said_as_loudly() -> None:
    words = read(undecided(made_up())).words
    assert "No verdict: fp8, awq cannot be told apart" in words
    assert "Deploy" not in words.replace("precision to deploy", "")
    assert "What is known" in words


def test_what_stands_in_backticks_is_code_and_nothing_else_is() -> None:
    verdict = replace(VERDICT, sureness=["more `--repeats` & <b>", "`<i>`"])
    page = render_page(made_up(verdict=verdict))
    assert "<li>more <code>--repeats</code> &amp; &lt;b&gt;</li>" in page
    assert "<li><code>&lt;i&gt;</code></li>" in page


def test_a_reference_to_deploy_costs_what_others_save() -> None:
    verdict = replace(VERDICT, deploy="bf16", costs=[])
    words = read(made_up(verdict=verdict)).words
    assert "Deploy bf16" in words
    assert "It is the reference: it costs what another mode would save" in words
    assert "same answer % of greedy" not in words[: words.index("Why")]


def test_a_mode_to_deploy_has_its_figures_where_the_reference_does_not_fit() -> None:
    words = read(large_reference(made_up())).words
    assert "weights GB 9.08 peak GB 13.6 tokens/s 1,973 goodput" in words[: words.index("Why")]


def test_an_unfinished_run_has_no_verdict_and_names_what_it_lacks() -> None:
    words = read(replace(with_failures(made_up()), not_measured=["nf4", "awq"])).words
    assert "No verdict: the run is not complete" in words
    assert "Stopped before nf4, awq were measured in full" in words
    assert "int8: failed: `int8` has no kernel hint: none" in words


def test_a_mode_that_does_not_fit_keeps_its_quality() -> None:
    page = render_page(with_failures(made_up()))
    cells = re.search(r"fp32</span>.*?</tr>", page, re.DOTALL)
    assert cells is not None
    words = Reader(f"<table><tr><th><span>{cells[0]}</table>").words
    assert "does not fit: needs 16.1 GB, has 12.0 GB" in words
    assert "7.420" in words


def test_what_another_server_does_not_tell_is_left_open() -> None:
    words = read(another_server(made_up())).words
    row = words[words.index(" vllm – – 1,158 −19 % ✗") :]
    assert row.index("– – –") < row.index("noise")


def test_random_weights_get_no_verdict_on_quality() -> None:
    words = read(random_weights(made_up())).words.split("How it was measured")[0]
    assert "No verdict on quality: the weights are random." in words
    assert "What is lost against what it takes" not in words
    for figure in ("7.676", "+3.5 %", "90.7"):
        assert figure in read(made_up()).words
        assert figure not in words


def test_what_was_not_measured_is_left_out() -> None:
    """A CPU has no energy counter, and without an SLO there is no goodput."""
    report = made_up()
    rows = []
    for one in report.rows:
        levels = []
        for level in one.levels:
            none = {"joules_per_output_token": None, "joules_per_token": None, "goodput_per_s": None}
            ratios = level.ratios and replace(level.ratios, **none)
            runs = [replace(run, energy=None, goodput_per_s=None) for run in level.runs]
            levels.append(replace(level, figures=replace(level.figures, **none), ratios=ratios, runs=runs))
        rows.append(replace(one, levels=levels))
    without = replace(report, rows=rows, workload=replace(report.workload, slo=None))
    for words, is_there in ((read(report).words, True), (read(without).words, False)):
        for title in ("Energy per token", "Goodput", "goodput requests/s in SLO", "Joules per output token"):
            assert (title in words) is is_there, title


def test_a_disagreement_of_decode_is_flagged() -> None:
    report = made_up()
    apart = Apart(change=0.004, standard_error=0.001, num_windows=8)
    quality = report.rows[2].quality
    assert quality is not None
    agreement = replace(quality.agreement, decode1_apart=apart, agrees=False)
    rows = [*report.rows]
    rows[2] = replace(rows[2], quality=replace(quality, agreement=agreement))
    words = read(replace(report, rows=rows)).words
    assert "+0.400 ± 0.100 % – apart" in words
    assert "Not for nf4: decode and prefill are apart." in words
    assert "nf4, decode M=1: +0.40 ± 0.10 % from prefill on 2,048 tokens, more than 0.2 %" in words
    assert "– apart" not in read(report).words
    assert "are apart" not in read(report).words


def test_a_run_that_the_server_counts_otherwise_says_so() -> None:
    report = made_up()
    (level, *others), rows = report.rows[1].levels, [*report.rows]
    said = "sum of TTFT, s: the server counts -7.1 %"
    level = replace(level, runs=[replace(level.runs[0], disagreements=[said]), *level.runs[1:]])
    rows[1] = replace(rows[1], levels=[level, *others])
    assert said in read(replace(report, rows=rows)).words
    assert "the server counts" not in read(report).words


def test_an_8_bit_cache_is_told() -> None:
    report = made_up()
    coded = replace(report, rows=[replace(one, kv_dtype="int8") for one in report.rows])
    assert (
        "The KV cache of every row holds int8; KL is against bf16 with a cache in bf16" in read(coded).words
    )
    assert "holds int8" not in read(report).words
