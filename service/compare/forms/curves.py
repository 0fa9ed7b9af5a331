"""Drawings with two axes: what a mode does as load grows, and what its quality costs in memory.

pictures --Curve, Dot--> curves(), front() --SVG text--> page
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from service.compare.figures import Interval
from service.compare.forms.svg import (
    CHARACTER,
    FONT,
    WIDEST,
    WIDTH,
    Mark,
    Scale,
    figure,
    line,
    linear,
    log_ticks,
    logarithmic,
    number,
    points,
    shortened,
    tag,
    text,
    ticks,
    width_of,
)
from service.compare.forms.words import Unit

HEIGHT = 270
LEFT, TOP, BOTTOM = 46, 26, 40
LABEL_HEIGHT = 14
MARGIN = 1.06  # of an axis beyond its highest value


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float
    high: float

    @classmethod
    def of(cls, x: float, interval: Interval, unit: Unit) -> "Point":
        """One repeat has no ends: they are the estimate."""
        low, high = interval.low, interval.high
        y, lowest, highest = (
            (interval.estimate if end is None else end) / unit.divisor
            for end in (interval.estimate, low, high)
        )
        return cls(x, y, lowest, highest)


@dataclass(frozen=True)
class Curve:
    mark: Mark
    points: list[Point]


@dataclass(frozen=True)
class Level:
    """A horizontal line that a value should stay below, such as an objective."""

    y: float
    words: str


@dataclass(frozen=True)
class Event:
    """Something at one x of one curve, with its interval: a crossover, a knee."""

    mark: Mark
    x: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Dot:
    """One mode of a scatter: `is_front`: no other mode is better in both."""

    mark: Mark
    x: float
    y: float
    low: float
    high: float
    is_front: bool


def y_axis(scale: Scale, values: Sequence[float], right: float, words: str) -> list[str]:
    """Ticks at the left, and what they count above them: nobody turns a phone to read an axis."""
    drawn = [text(2, 11, words, "start", class_="axis")]
    for value in values:
        y = scale(value)
        drawn += [line(LEFT, y, right, y), text(LEFT - 5, y + 4, number(value), "end", class_="tick")]
    return drawn


def x_axis(scale: Scale, values: Sequence[float], middle: float, words: str) -> list[str]:
    drawn, bottom, last = [], HEIGHT - BOTTOM, -99.0
    for value in values:
        x, written = scale(value), number(value)
        drawn.append(line(x, bottom, x, bottom + 4, "rule"))
        if x - last > CHARACTER * len(written) + 4:
            drawn.append(text(x, bottom + 17, written, class_="tick"))
            last = x
    drawn.append(text(middle, HEIGHT - 7, words, class_="axis"))
    return drawn


def apart(wanted: Sequence[float], low: float, high: float, gap: float = LABEL_HEIGHT) -> list[float]:
    """Places near `wanted`, in the same order, `gap` apart and within [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed = [0.0] * len(wanted)
    floor = low
    for n in order:
        placed[n] = max(wanted[n], floor)
        floor = placed[n] + gap
    ceiling = high
    for n in reversed(order):
        placed[n] = min(placed[n], ceiling)
        ceiling = placed[n] - gap
    return placed


def stroke(mark: Mark, path: str) -> str:
    return tag("polyline", points=path, class_=f"curve {mark.colour}", stroke_dasharray=mark.dash)


def upward(every: Sequence[Point], others: Sequence[float], *, log_y: bool) -> tuple[Scale, list[float]]:
    """The vertical scale and its ticks.

    An interval of two repeats may be as wide as it likes: ends that would press the curves flat are cut off.
    """
    values = [point.y for point in every] + list(others)
    bottom, positive = HEIGHT - BOTTOM, [value for value in values if value > 0]
    highest = max([min(point.high, WIDEST * point.y) for point in every] + values)
    if log_y and positive:
        lows = [max(point.low, point.y / WIDEST) for point in every if point.y > 0]
        lowest = min(positive + lows)
        scale, marks = logarithmic(lowest / MARGIN, highest * MARGIN, bottom, TOP), log_ticks(lowest, highest)
    else:
        lowest = 0.0
        scale, marks = linear(0, (highest or 1.0) * MARGIN, bottom, TOP), ticks(0, highest)
    return lambda value: max(scale(max(value, lowest)), TOP), marks


def curves(
    series: Sequence[Curve],
    x_words: str,
    y_words: str,
    label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    levels: Sequence[Level] = (),
    events: Sequence[Event] = (),
) -> str:
    """A line for each mode with its interval as a band, its name at its end, and events on the axis below."""
    every = [point for one in series for point in one.points]
    right = WIDTH - 12 - width_of([one.mark.name for one in series])
    bottom, xs = HEIGHT - BOTTOM, sorted({point.x for point in every})
    across = (logarithmic if log_x else linear)(xs[0], xs[-1], LEFT + 8, right - 8)
    up, marks = upward(every, [level.y for level in levels], log_y=log_y)
    body = y_axis(up, marks, right, y_words)
    body += x_axis(across, xs if len(xs) <= 8 else ticks(xs[0], xs[-1]), (LEFT + right) / 2, x_words)
    for n, level in enumerate(levels):
        below = HEIGHT + 8 + (len(events) + n) * (LABEL_HEIGHT + 3)
        body += [
            line(LEFT, up(level.y), right, up(level.y), "level"),
            line(2, below - 4, 15, below - 4, "level"),
            text(18, below, level.words, "start", class_="note"),
        ]
    for one in series:
        band = [(across(p.x), up(p.high)) for p in one.points]
        band += [(across(p.x), up(p.low)) for p in reversed(one.points)]
        body.append(tag("polygon", points=points(band), class_=f"band {one.mark.colour}"))
    for one in series:
        path = points([(across(p.x), up(p.y)) for p in one.points])
        body.append(stroke(one.mark, path))
        for p in one.points:
            x = across(p.x)
            told = f"{one.mark.name}: {number(p.y)} [{number(p.low)}, {number(p.high)}] at {number(p.x)}"
            body.append(line(x, up(p.low), x, up(p.high), f"whisker {one.mark.colour}"))
            body.append(one.mark.drawn(x, up(p.y), 3.6, title=told))
    ends = apart([up(one.points[-1].y) for one in series], TOP, bottom)
    for one, y in zip(series, ends, strict=True):
        body.append(line(across(one.points[-1].x) + 5, up(one.points[-1].y), right + 1, y, "leader"))
        body.append(one.mark.beside(right + 3, y + 4))
    for n, event in enumerate(events):
        body += marked_event(event, series, across, up, n)
    num_below = len(events) + len(levels)
    return figure(label, body, HEIGHT + (LABEL_HEIGHT + 3) * num_below + (4 if num_below else 0))


def marked_event(event: Event, series: Sequence[Curve], across: Scale, up: Scale, place: int) -> list[str]:
    """A ring on the mode's own curve with the event's interval through it, and its words below the axis."""
    curve = next(one for one in series if one.mark == event.mark)
    drawn = [(across(point.x), up(point.y)) for point in curve.points]
    low, middle, high = (
        min(max(across(x), drawn[0][0]), drawn[-1][0]) for x in (event.low, event.x, event.high)
    )
    y, below, colour = height_at(drawn, middle), HEIGHT + 8 + place * (LABEL_HEIGHT + 3), event.mark.colour
    return [
        line(low, y, high, y, f"whisker {colour}"),
        line(low, y - 4, low, y + 4, f"whisker {colour}"),
        line(high, y - 4, high, y + 4, f"whisker {colour}"),
        tag(
            "circle",
            tag("title", escape(event.words)),
            cx=f"{middle:.1f}",
            cy=f"{y:.1f}",
            r=8,
            class_=f"ring {colour}",
        ),
        event.mark.drawn(8, below - 4),
        text(18, below, event.words, "start", class_="note"),
    ]


def height_at(drawn: Sequence[tuple[float, float]], x: float) -> float:
    """Of a curve as it is drawn, at `x` within it."""
    for (x0, y0), (x1, y1) in pairwise(drawn):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return drawn[-1][1]


def shares(series: Sequence[Curve], x_words: str, label: str) -> str:
    """Of each mode the share (y, percent) of values up to x > 0; without marks, for there are many points."""
    xs = sorted(point.x for one in series for point in one.points)
    right, bottom = WIDTH - 12 - width_of([one.mark.name for one in series]), HEIGHT - BOTTOM
    across, up = logarithmic(xs[0], xs[-1], LEFT + 8, right - 8), linear(0, 100, bottom, TOP)
    body = y_axis(up, [0, 25, 50, 75, 95], right, "% of all, up to")
    body += x_axis(across, log_ticks(xs[0], xs[-1]), (LEFT + right) / 2, x_words)
    ends = apart([up(50 + 5 * n) for n in range(len(series))], TOP, bottom)
    for one, y in zip(series, ends, strict=True):
        path = points([(across(point.x), up(point.y)) for point in one.points])
        body.append(stroke(one.mark, path))
        body += [one.mark.drawn(right + 2, y), one.mark.beside(right + 10, y + 4)]
    return figure(label, body, HEIGHT)


def front(dots: Sequence[Dot], x_words: str, y_words: str, label: str) -> str:
    """Each mode at what it costs (x) and what it loses (y): down and left is better, the front is joined.

    y is logarithmic with a strip for 0 at the bottom, where the reference is: losses differ by powers of ten.
    """
    right, bottom = WIDTH - 14, HEIGHT - BOTTOM
    positive = [value for dot in dots for value in (dot.y, dot.low, dot.high) if value > 0]
    low, high = (min(positive), max(positive)) if positive else (0.01, 0.1)
    if high / low < 10:  # less than a decade looks like more than it is
        low, high = low / 2, high * 2
    strip = bottom - 26
    scale_up = logarithmic(low, high * MARGIN, strip, TOP + 10)
    across = linear(0, max(dot.x for dot in dots) * 1.1, LEFT, right)

    def up(value: float) -> float:
        return scale_up(value) if value >= low else bottom - 8

    body = y_axis(up, log_ticks(low, high, 7), right, y_words)
    body += [text(LEFT - 5, bottom - 4, "0", "end", class_="tick"), line(LEFT, bottom - 8, right, bottom - 8)]
    body += x_axis(across, ticks(0, max(dot.x for dot in dots) * 1.1), (LEFT + right) / 2, x_words)
    edge = sorted((across(dot.x), up(dot.y)) for dot in dots if dot.is_front)
    steps = [edge[0]] if edge else []
    for x, y in edge[1:]:
        steps += [(x, steps[-1][1]), (x, y)]
    body.append(tag("polyline", points=points(steps), class_="edge"))
    taken = [(across(dot.x), up(dot.y), 8.0, 8.0) for dot in dots]
    for dot in dots:
        x, y = across(dot.x), up(dot.y)
        body.append(line(x, up(dot.low), x, up(dot.high), f"whisker {dot.mark.colour}"))
        body.append(dot.mark.drawn(x, y, 5.4, title=f"{dot.mark.name}: {number(dot.x)}, {number(dot.y)}"))
        body.append(named(dot, x, y, taken, right))
    return figure(label, body, HEIGHT)


def named(dot: Dot, x: float, y: float, taken: list[tuple[float, float, float, float]], right: float) -> str:
    """The name beside its mark, where it covers no other mark or name (centre, half width, half height)."""
    half = CHARACTER * len(shortened(dot.mark.name)) / 2
    places = [
        (dx, dy)
        for distance in (1.0, 2.0, 3.0)
        for dx, dy in ((half + 9, 0.0), (0.0, -13 * distance), (0.0, 14 * distance), (-half - 9, 0.0))
    ]

    def covered(dx: float, dy: float) -> float:
        cx, cy = x + dx, y + dy
        if cx - half < LEFT or cx + half > right + 10 or cy < TOP - 6 or cy > HEIGHT - BOTTOM:
            return 1e6
        return sum(
            max(0.0, half + w - abs(cx - ox)) * max(0.0, FONT / 2 + h - abs(cy - oy))
            for ox, oy, w, h in taken
        )

    dx, dy = min(places, key=lambda place: covered(*place))
    taken.append((x + dx, y + dy, half, FONT / 2))
    return dot.mark.beside(x + dx, y + dy + 4, "middle")
