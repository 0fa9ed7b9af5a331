"""Figures -> inline SVG, drawn here so that a report needs no network, no script and no plotting library.

Text takes the page's colour; the i-th precision takes CSS class `s<i>`. Dashes differ as well as colours, so
that a grey print still tells them apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44
ROW, CHARACTER_WIDTH = 20, 7.5
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 2")


@dataclass(frozen=True)
class Series:
    """One precision's points, with its place in the report (colour and dash)."""

    name: str
    place: int
    points: list[tuple[float, float]]


def tag(name: str, text: str = "", **attributes: object) -> str:
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{text}</{name}>"


def figure(label: str, body: Sequence[str], height: float = HEIGHT) -> str:
    """SVG with a name for readers who do not see it."""
    return tag("svg", "".join(body), viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)


def text(x: float, y: float, content: str, anchor: str = "middle", **attributes: object) -> str:
    return tag("text", escape(content), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "grid") -> str:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values within [low, high], about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high * 1.0001]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def name_width(names: Sequence[str]) -> float:
    """Pixels that the longest name takes at the page's 13 px."""
    return CHARACTER_WIDTH * max(map(len, names), default=0)


def legend(series: Sequence[tuple[str, int]], top: float) -> tuple[list[str], float]:
    """Names, each beside its stroke, in as many lines as they need -> (drawn, height)."""
    drawn, x, y = [], float(LEFT), top + ROW
    for name, place in series:
        width = 44 + name_width([name])
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + ROW
        dash = DASHES[place % len(DASHES)]
        drawn.append(
            tag("line", x1=x, y1=y - 4, x2=x + 22, y2=y - 4, class_=f"curve s{place}", stroke_dasharray=dash)
        )
        drawn.append(text(x + 28, y, name, "start"))
        x += width
    return drawn, y - top + 8


def distribution(series: Sequence[Series], unit: str) -> str:
    """Cumulative curves, points (value > 0, share 0..1), values on a logarithmic axis."""
    values = [value for one in series for value, _ in one.points if value > 0]
    low, high = min(values), max(values)
    span = math.log(high / low) or 1.0
    bottom = HEIGHT - BOTTOM

    def at(value: float, share: float) -> tuple[float, float]:
        x = LEFT + math.log(max(value, low) / low) / span * (WIDTH - LEFT - RIGHT)
        return x, bottom - share * (bottom - TOP)

    body = []
    for share in (0.0, 0.25, 0.5, 0.75, 0.95):
        y = at(low, share)[1]
        body += [line(LEFT, y, WIDTH - RIGHT, y), text(LEFT - 7, y + 4, f"{share:.0%}", "end")]
    last_x = -99.0
    for value in log_ticks(low, high):
        x = at(value, 0)[0]
        body.append(line(x, TOP, x, bottom))
        if x - last_x > 34:
            body.append(text(x, bottom + 17, number(value)))
            last_x = x
    for one in series:
        path = " ".join("{:.1f},{:.1f}".format(*at(value, share)) for value, share in one.points)
        dash = DASHES[one.place % len(DASHES)]
        body.append(tag("polyline", points=path, class_=f"curve s{one.place}", stroke_dasharray=dash))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 34, unit, class_="axis"))
    names, height = legend([(one.name, one.place) for one in series], HEIGHT)
    return figure("Share of gaps that are at most so long, by precision", body + names, HEIGHT + height)


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, int, float]]]], unit: str) -> str:
    """Horizontal bars: (group, [(name, place, value)])."""
    row, gap, head = 22, 16, 20
    height = TOP + sum(head + row * len(items) + gap for _, items in groups) + 22
    high = max((value for _, items in groups for _, _, value in items), default=1.0) or 1.0
    left = 16 + name_width([name for _, items in groups for name, _, _ in items])
    scale = (WIDTH - left - 60) / high
    body, y = [], float(TOP)
    for title, items in groups:
        body.append(text(6, y + 12, title, "start", class_="group"))
        y += head
        for name, place, value in items:
            body.append(text(left - 8, y + 14, name, "end"))
            body.append(
                tag(
                    "rect",
                    x=left,
                    y=y + 2,
                    width=f"{max(value * scale, 1):.1f}",
                    height=row - 6,
                    class_=f"fill s{place}",
                )
            )
            body.append(text(left + value * scale + 6, y + 14, number(value), "start"))
            y += row
        y += gap
    body.append(text((left + WIDTH) / 2, height - 8, unit, class_="axis"))
    return figure(f"{unit}, by precision", body, height)


def stacks(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: str) -> str:
    """Horizontal stacked bars: (name, [(part, value)]); parts in the same order in every row."""
    names = list(dict.fromkeys(part for _, parts in rows for part, _ in parts))
    row, left = 34, 16 + name_width([name for name, _ in rows])
    legend_rows = math.ceil(len(names) / 2)
    height = TOP + row * len(rows) + 26 + 20 * legend_rows + 16
    high = max((sum(value for _, value in parts) for _, parts in rows), default=1.0) or 1.0
    scale = (WIDTH - left - 64) / high
    body, y = [], float(TOP)
    for name, parts in rows:
        body.append(text(left - 8, y + 20, name, "end"))
        x = float(left)
        for part, value in parts:
            place = names.index(part)
            title = tag("title", escape(f"{part}: {value:.1f} {unit}"))
            body.append(
                tag(
                    "rect",
                    title,
                    x=f"{x:.1f}",
                    y=y + 5,
                    width=f"{value * scale:.2f}",
                    height=row - 12,
                    class_=f"fill p{place}",
                )
            )
            x += value * scale
        body.append(text(x + 6, y + 20, number(sum(value for _, value in parts)), "start"))
        y += row
    body.append(text((left + WIDTH) / 2, y + 14, unit, class_="axis"))
    for n, part in enumerate(names):
        x, line_y = 16 + (n % 2) * (WIDTH / 2), y + 40 + 20 * (n // 2)
        body.append(tag("rect", x=x, y=line_y - 10, width=12, height=12, class_=f"fill p{n}"))
        body.append(text(x + 18, line_y, part, "start"))
    return figure(f"Memory by part in {unit}, by precision", body, height)


def scatter(points: Sequence[tuple[str, int, float, float]], x_unit: str, y_unit: str) -> str:
    """Labelled points (name, place, x, y), both axes linear; x starts at zero."""
    xs, ys = [x for *_, x, _ in points], [y for *_, y in points]
    x_high = max(xs) * 1.18
    margin = (max(ys) - min(ys)) * 0.2 or max(ys) * 0.05
    y_low, y_high = min(ys) - margin, max(ys) + margin
    bottom = HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / x_high * (WIDTH - LEFT - RIGHT),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - TOP),
        )

    body = []
    for value in ticks(0, x_high):
        x = at(value, y_low)[0]
        body += [line(x, TOP, x, bottom), text(x, bottom + 17, number(value))]
    for value in ticks(y_low, y_high):
        y = at(0, value)[1]
        body += [line(LEFT, y, WIDTH - RIGHT, y), text(LEFT - 7, y + 4, number(value), "end")]
    for name, place, x_value, y_value in points:
        x, y = at(x_value, y_value)
        body.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=6, class_=f"fill s{place}"))
        body.append(text(x, y - 11, name, class_="point"))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_unit, class_="axis"))
    body.append(
        tag(
            "text",
            escape(y_unit),
            transform=f"translate(13 {(TOP + bottom) / 2}) rotate(-90)",
            text_anchor="middle",
            class_="axis",
        )
    )
    return figure(f"{y_unit} against {x_unit}, by precision", body)
