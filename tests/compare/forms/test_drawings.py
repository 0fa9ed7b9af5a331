"""Points -> SVG: where things are drawn."""

import re

import msgspec
import pytest

from service import ledger
from service.compare.figures import Interval
from service.compare.forms.curves import Curve, Dot, Event, Level, Point, apart, curves, front, height_at
from service.compare.forms.pictures import pictures
from service.compare.forms.rows import SHADES, Bar, Difference, bars, intervals
from service.compare.forms.svg import NUM_COLOURS, Mark, log_ticks, number, shortened, ticks
from service.compare.forms.words import amount, signed
from tests.compare.made_up import GRID, TEN, made_up

BF16, NF4 = Mark("bf16", 0), Mark("nf4", 1)


def attribute(svg: str, name: str, class_: str) -> list[float]:
    """Values of one attribute over the elements of a class, in the order drawn."""
    return [
        float(found)
        for element in re.findall(rf'<[^>]*class="{class_}"[^>]*>', svg)
        for found in re.findall(rf' {name}="([^"]*)"', element)
    ]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1239.6, "1,240"),
        (99.96, "100"),
        (41.27, "41.3"),
        (3.0, "3.00"),
        (0.0273, "0.0273"),
        (0.0, "0.0000"),
        (2e-6, "2.0e−06"),
    ],
)
def test_amounts_have_three_digits(value: float, wanted: str) -> None:
    assert amount(value) == wanted


def test_signs_are_always_there() -> None:
    assert [signed(value) for value in (31.4, -2.44, 0.0, 9.96)] == ["+31", "−2.4", "+0.0", "+10"]


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 103) == [0, 25, 50, 75, 100]
    assert ticks(-7, 12, 4) == [-5, 0, 5, 10]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.9, 120) == pytest.approx([1, 3, 10, 30, 100])
    assert log_ticks(4, 90) == pytest.approx([5, 10, 20, 50])
    assert number(0.00002) == "2.0e-05"


def test_sixteen_modes_look_different() -> None:
    looks = {(mark.colour, mark.is_hollow) for mark in (Mark(str(n), n) for n in range(2 * NUM_COLOURS))}
    assert len(looks) == 2 * NUM_COLOURS
    dashed = {(mark.colour, mark.dash) for mark in (Mark(str(n), n) for n in range(2 * NUM_COLOURS))}
    assert len(dashed) == 2 * NUM_COLOURS


def test_long_names_keep_both_ends() -> None:
    assert shortened("awq=ORG/MODEL-AWQ + kv fp8", 15) == "awq=ORG… kv fp8"
    assert shortened("nf4 + kv int8") == "nf4 + kv int8"


def test_labels_are_pushed_apart_in_order() -> None:
    placed = apart([50.0, 51.0, 49.0, 200.0], 0, 210, 14)
    assert sorted(placed) == [placed[2], placed[0], placed[1], placed[3]]
    assert min(b - a for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)) >= 14
    assert max(apart([100.0] * 30, 0, 100)) == pytest.approx(100)


def test_a_difference_is_drawn_on_its_side_of_zero() -> None:
    rows = [
        Difference(NF4, 10.0, 8.0, 12.0, "+10 %", "better"),
        Difference(BF16, -5.0, -9.0, 1.0, "−5 %", "undecided"),
    ]
    svg = intervals(rows, (-2.0, 2.0), "%", "label")
    zero = attribute(svg, "x1", "zero")[0]
    noise, wide = attribute(svg, "x", "noise")[0], attribute(svg, "width", "noise")[0]
    assert noise < zero < noise + wide
    assert attribute(svg, "x1", "span s1")[0] > zero + wide / 2
    assert attribute(svg, "x1", "span s0")[0] < zero < attribute(svg, "x2", "span s0")[0]
    assert svg.count("value better") == svg.count("value undecided") == 1


def test_a_crossover_is_ringed_on_its_own_curve() -> None:
    flat = Curve(BF16, [Point(1, 100, 90, 110), Point(64, 100, 90, 110)])
    falling = Curve(NF4, [Point(1, 200, 190, 210), Point(64, 50, 45, 55)])
    svg = curves(
        [flat, falling], "x", "y", "label", log_x=True, events=[Event(NF4, 8, 4, 16, "nf4 stops paying")]
    )
    x, y = attribute(svg, "cx", "ring s1")[0], attribute(svg, "cy", "ring s1")[0]
    ends = [
        tuple(map(float, pair.split(",")))
        for pair in re.findall(r'points="([^"]*)" class="curve s1"', svg)[0].split()
    ]
    assert x == pytest.approx((ends[0][0] + ends[1][0]) / 2, abs=0.2)  # 8 is half way from 1 to 64
    assert y == pytest.approx((ends[0][1] + ends[1][1]) / 2, abs=0.2)
    assert "nf4 stops paying" in svg
    assert height_at([(0, 10), (10, 20)], 5) == 15


def test_the_front_joins_only_what_nothing_beats() -> None:
    dots = [
        Dot(BF16, 16, 0.0, 0.0, 0.0, True),
        Dot(NF4, 6, 0.02, 0.01, 0.03, True),
        Dot(Mark("worse", 2), 12, 0.03, 0.03, 0.03, False),
    ]
    svg = front(dots, "GB", "KL", "label")
    edge = re.findall(r'points="([^"]*)" class="edge"', svg)[0].split()
    assert len(edge) == 3  # two modes and the step between them
    assert attribute(svg, "y1", "whisker s1")[0] != attribute(svg, "y2", "whisker s1")[0]


def test_the_front_of_a_report_is_of_memory_and_divergence() -> None:
    (picture, *_) = pictures(made_up(TEN))["quality"]
    assert picture.title == "What is lost against what it takes"
    edge = re.findall(r'points="([^"]*)" class="edge"', picture.svg)[0].split()
    assert len(edge) > 2
    heights = [float(pair.split(",")[1]) for pair in edge]
    assert heights == sorted(heights)  # more memory, less loss: a step up would be a mode that is beaten


def test_kv_types_take_different_memory() -> None:
    """At equal weights, what tells them apart is the cache."""
    (picture, *_) = pictures(made_up(GRID))["quality"]
    assert "weights and KV cache" in picture.svg
    told = dict(re.findall(r"<title>([^:<]+): ([\d.]+), ", picture.svg))
    assert float(told["nf4 + kv int8"]) < float(told["nf4"])


def test_a_bar_is_as_long_as_its_value() -> None:
    svg = bars([Bar(BF16, 2.0, 2.0, 2.0, "2 J"), Bar(NF4, 1.0, 0.9, 1.1, "1 J")], "J", "label")
    assert attribute(svg, "width", "fill s0")[0] == pytest.approx(
        2 * attribute(svg, "width", "fill s1")[0], abs=0.2
    )
    assert svg.count('class="error"') == 1


def test_an_interval_as_wide_as_chance_leaves_the_curves_readable() -> None:
    """Two repeats multiply their error by 12.7: one such interval pressed every curve flat."""
    wide = Curve(BF16, [Point(1, 100, 0, 1400), Point(2, 200, 100, 300)])
    for log_y in (False, True):
        svg = curves([wide], "x", "y", "label", log_y=log_y)
        (path,) = re.findall(r'points="([^"]*)" class="curve s0"', svg)
        first, last = (float(pair.split(",")[1]) for pair in path.split())
        assert first - last > 20
        assert min(attribute(svg, "y1", "whisker s0") + attribute(svg, "y2", "whisker s0")) >= 26


def test_curves_of_nothing_but_zero_are_drawn() -> None:
    """A log axis has no place for it, and goodput beyond the knee is 0."""
    nothing = Curve(BF16, [Point(1, 0, 0, 0), Point(2, 0, 0, 0)])
    for log_y in (False, True):
        assert "nan" not in curves([nothing], "x", "y", "label", log_y=log_y)


def test_tokens_that_came_all_at_once_are_not_drawn() -> None:
    """On an overloaded machine every gap can be 0, and the whole report was lost."""
    replace, none = msgspec.structs.replace, Interval(estimate=0.0, low=0.0, high=0.0, n=3)
    report = made_up()
    rows = []
    for row in report.rows:
        levels = []
        for level in row.levels:
            figures = replace(level.figures, itl_p50_s=none, itl_p95_s=none, itl_p99_s=none)
            levels.append(replace(level, figures=figures, itl_curve_s=[0.0] * 51))
        rows.append(replace(row, levels=levels))
    titles = [picture.title for picture in pictures(replace(report, rows=rows))["load"]]
    assert "Time between tokens: p50, p95, p99" not in titles
    assert "Time between tokens: all of them" not in titles
    assert "Time to first token: p50, p95, p99" in titles


def test_parts_of_memory_keep_the_ledgers_order_and_letters() -> None:
    """A part that only the second mode had came last in the legend, and first in its stack."""
    report = made_up()
    memory = report.rows[0].memory
    assert memory is not None
    plain = msgspec.structs.replace(
        memory, parts={"weights.linear16": 15_000_000_000, "kv.used": 10, "kv.free": 5}
    )
    rows = [msgspec.structs.replace(report.rows[0], memory=plain), *report.rows[1:]]
    (picture, *_) = pictures(msgspec.structs.replace(report, rows=rows))["memory"]
    legend = re.findall(r'text-anchor="start" class="">([^<]+)', picture.svg)
    assert legend[:3] == ["weights: codes", "weights: scales", "weights: linear16"]
    assert legend.index("KV cache") < legend.index("activations") < legend.index("else, at the peak")
    assert legend[-1] == "smaller parts"


def test_an_objective_is_drawn_at_its_height() -> None:
    rising = Curve(BF16, [Point(1, 100, 100, 100), Point(2, 300, 300, 300)])
    for log_y in (False, True):
        svg = curves([rising], "x", "y", "label", log_y=log_y, levels=[Level(200, "SLO: 200 ms")])
        (path,) = re.findall(r'points="([^"]*)" class="curve s0"', svg)
        low, high = (float(pair.split(",")[1]) for pair in path.split())
        drawn, legend = attribute(svg, "y1", "level")
        assert high < drawn < low < legend
        assert "SLO: 200 ms" in svg


def test_there_is_a_shade_for_every_part_that_is_drawn() -> None:
    report = made_up()
    memory = report.rows[0].memory
    assert memory is not None
    many = msgspec.structs.replace(memory, parts={part.name: 1_000_000_000 for part in ledger.PARTS})
    rows = [msgspec.structs.replace(report.rows[0], memory=many), *report.rows[1:]]
    (picture, *_) = pictures(msgspec.structs.replace(report, rows=rows))["memory"]
    places = {int(place) for place in re.findall(r'class="part p(\d+)"', picture.svg)}
    assert places == set(range(len(SHADES)))
    assert "smaller parts" in picture.svg
