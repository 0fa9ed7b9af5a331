"""Drawings with a line for each mode: differences with intervals, bars, percentiles, memory by part.

pictures --Difference, Bar, Ladder, Stack--> here --SVG text--> page
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from service.compare.forms.svg import (
    CHARACTER,
    WIDEST,
    WIDTH,
    Mark,
    Scale,
    box,
    figure,
    line,
    linear,
    log_ticks,
    logarithmic,
    number,
    tag,
    text,
    ticks,
    width_of,
)

ROW, TOP, AXIS = 24, 8, 34
MARK_ROOM = 14


@dataclass(frozen=True)
class Shade:
    """One part of a stack: lightness alternates, so that neighbours differ on grey paper too."""

    fill: str
    ink: str


SHADES = (
    Shade("#1f3a52", "#fff"),
    Shade("#e0a15a", "#000"),
    Shade("#5f8fb4", "#000"),
    Shade("#24614c", "#fff"),
    Shade("#b9d3c6", "#000"),
    Shade("#6d4b88", "#fff"),
    Shade("#cdbcdc", "#000"),
    Shade("#7c4a2a", "#fff"),
    Shade("#d9d9d4", "#000"),
    Shade("#4c5257", "#fff"),
    Shade("#a9b0b5", "#000"),
    Shade("#8c2f4b", "#fff"),
)


@dataclass(frozen=True)
class Difference:
    """A difference and its interval; `words` are printed at the line's end."""

    mark: Mark
    value: float
    low: float
    high: float
    words: str
    verdict: str  # better, worse, same: CSS class


@dataclass(frozen=True)
class Bar:
    mark: Mark
    value: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Ladder:
    """Percentiles of one latency, ascending."""

    mark: Mark
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Stack:
    mark: Mark
    parts: Sequence[tuple[str, float]]
    words: str


def names(marks: Sequence[Mark], row: float = ROW) -> tuple[list[str], float]:
    """Marks and names down the left side -> (drawn, where the plot begins)."""
    left = MARK_ROOM + 6 + width_of([mark.name for mark in marks]) + 8
    drawn = []
    for n, mark in enumerate(marks):
        y = TOP + row * (n + 0.5)
        drawn += [mark.drawn(9, y), mark.beside(MARK_ROOM + 4, y + 4)]
    return drawn, left


def scale_below(scale: Scale, values: Sequence[float], bottom: float, words: str, middle: float) -> list[str]:
    drawn, last = [], -99.0
    for value in values:
        x, written = scale(value), number(value)
        drawn.append(line(x, TOP, x, bottom))
        if x - last > CHARACTER * len(written) + 6:
            drawn.append(text(x, bottom + 14, written, class_="tick"))
            last = x
    drawn.append(text(middle, bottom + 29, words, class_="axis"))
    return drawn


def intervals(rows: Sequence[Difference], noise: tuple[float, float] | None, words: str, label: str) -> str:
    """Differences from the reference around 0; `noise` is what the reference differs from itself."""
    drawn, left = names([row.mark for row in rows])
    right = WIDTH - 10 - CHARACTER * max(len(row.words) for row in rows)
    bottom = TOP + ROW * len(rows)
    ends = [value for row in rows for value in (row.low, row.high)] + [0.0, *(noise or ())]
    low, high = min(ends), max(ends)
    margin = 0.06 * ((high - low) or 1.0)
    scale = linear(low - margin, high + margin, left, right)
    body = []
    if noise:
        told = f"noise: the reference against itself, {noise[0]:+.1f} to {noise[1]:+.1f} %"
        body.append(
            box(scale(noise[0]), TOP, max(scale(noise[1]) - scale(noise[0]), 1), bottom - TOP, "noise", told)
        )
    body += scale_below(scale, ticks(low - margin, high + margin, 4), bottom, words, (left + right) / 2)
    body.append(line(scale(0), TOP - 2, scale(0), bottom + 3, "zero"))
    for n, row in enumerate(rows):
        y = TOP + ROW * (n + 0.5)
        body += [
            line(scale(row.low), y, scale(row.high), y, f"span {row.mark.colour}"),
            line(scale(row.low), y - 4, scale(row.low), y + 4, f"whisker {row.mark.colour}"),
            line(scale(row.high), y - 4, scale(row.high), y + 4, f"whisker {row.mark.colour}"),
            row.mark.drawn(scale(row.value), y),
            text(WIDTH - 4, y + 4, row.words, "end", class_=f"value {row.verdict}"),
        ]
    return figure(label, body + drawn, bottom + AXIS)


def bars(rows: Sequence[Bar], words: str, label: str) -> str:
    """Lengths from 0, with intervals where low < high."""
    drawn, left = names([row.mark for row in rows])
    right = WIDTH - 12 - CHARACTER * max(len(row.words) for row in rows)
    bottom = TOP + ROW * len(rows)
    values = [row.value for row in rows]
    high = max([*values, *(min(row.high, WIDEST * row.value) for row in rows)]) or 1.0
    scale = linear(0, high, left, right)
    body = scale_below(scale, ticks(0, high, 4), bottom, words, (left + right) / 2)
    for n, row in enumerate(rows):
        y = TOP + ROW * (n + 0.5)
        body.append(
            box(left, y - 7, max(scale(row.value) - left, 1), 14, f"fill {row.mark.colour}", row.words)
        )
        if row.high > row.low:
            ends = scale(row.low), y, min(scale(row.high), right), y
            body += [line(*ends, "halo"), line(*ends, "error")]
        body.append(text(WIDTH - 4, y + 4, row.words, "end", class_="value"))
    return figure(label, body + drawn, bottom + AXIS)


def ladders(rows: Sequence[Ladder], words: str, label: str) -> str:
    """p50, p95 and p99 of each mode on one line; logarithmic, because they differ by factors."""
    drawn, left = names([row.mark for row in rows])
    right, bottom = WIDTH - 22, TOP + ROW * len(rows)
    values = [value for row in rows for value in (row.p50, row.p95, row.p99)]
    low, high = max(min(values), max(values) / 1e4), max(values)
    if high < 2 * low:
        low, high = low / 1.5, high * 1.5
    to_x = logarithmic(low, high, left + 12, right)

    def scale(value: float) -> float:
        return to_x(max(value, low))

    body = scale_below(scale, log_ticks(low, high, 5), bottom, words, (left + right) / 2)
    for n, row in enumerate(rows):
        y, colour = TOP + ROW * (n + 0.5), row.mark.colour
        told = f"{row.mark.name}: p50 {number(row.p50)}, p95 {number(row.p95)}, p99 {number(row.p99)}"
        body += [
            line(scale(row.p50), y, scale(row.p99), y, f"span {colour}"),
            line(scale(row.p50), y - 6, scale(row.p50), y + 6, f"span {colour}"),
            tag(
                "circle",
                tag("title", escape(told)),
                cx=f"{scale(row.p95):.1f}",
                cy=f"{y:.1f}",
                r=4.6,
                class_=f"mark {colour}",
            ),
            tag("circle", cx=f"{scale(row.p99):.1f}", cy=f"{y:.1f}", r=4, class_=f"hollow {colour}"),
        ]
    return figure(label, body + drawn, bottom + AXIS)


def stacks(rows: Sequence[Stack], names_in_order: Sequence[str], words: str, label: str) -> str:
    """Horizontal stacks; those of the names that any of them has are below, with the letter of each."""
    there = {part for row in rows for part, _ in row.parts}
    parts = [name for name in names_in_order if name in there]
    row_height = 30
    drawn, left = names([row.mark for row in rows], row_height)
    right = WIDTH - 12 - CHARACTER * max(len(row.words) for row in rows)
    bottom = TOP + row_height * len(rows)
    high = max(sum(size for _, size in row.parts) for row in rows) or 1.0
    scale = linear(0, high, left, right)
    body = scale_below(scale, ticks(0, high, 4), bottom, words, (left + right) / 2)
    for n, row in enumerate(rows):
        y, begun = TOP + row_height * (n + 0.5), 0.0
        for part, size in row.parts:
            wide = scale(begun + size) - scale(begun)
            place = parts.index(part)
            body.append(box(scale(begun), y - 9, wide, 18, f"part p{place}", f"{part}: {number(size)}"))
            letter = chr(ord("a") + place)
            if wide > CHARACTER + 4:
                body.append(text(scale(begun) + wide / 2, y + 4, letter, class_=f"letter on{place}"))
            begun += size
        body.append(text(WIDTH - 4, y + 4, row.words, "end", class_="value"))
    y = bottom + AXIS + 12
    for n, part in enumerate(parts):
        x = 4 + (n % 2) * (WIDTH / 2)
        body.append(box(x, y - 11, 15, 15, f"part p{n}"))
        body.append(text(x + 7.5, y + 1, chr(ord("a") + n), class_=f"letter on{n}"))
        body.append(text(x + 21, y + 1, part, "start"))
        y += 20 * (n % 2)
    return figure(label, body + drawn, bottom + AXIS + 12 + 20 * -(-len(parts) // 2))
