"""What every drawing of a report is made of: SVG text, scales, ticks, and one mark for each mode.

pictures --points--> charts --uses--> here --SVG text--> page

Drawn here so that a report needs no network, no script and no plotting library. A mode is told by its name
beside the mark, by the mark's shape and by its colour, in this order: a grey print still tells them apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400  # of every drawing, in its own units: about a phone's width, so that text stays readable there
FONT = 12
CHARACTER = 7.9  # widest usual mean width of a bold character at FONT, in the same units
NUM_COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 2", "12 3")  # one less than colours: a ninth mode differs
LONGEST_NAME = 18
WIDEST = 2.5  # times its estimate: as far as an interval may widen an axis

Scale = Callable[[float], float]


def tag(name: str, content: str = "", **attributes: object) -> str:
    """One element; `class_` becomes `class`, `stroke_width` `stroke-width`. `content` is SVG already."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def figure(label: str, body: Sequence[str], height: float) -> str:
    """A drawing with a name for readers who do not see it."""
    return tag("svg", "".join(body), viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=label)


def text(x: float, y: float, content: str, anchor: str = "middle", class_: str = "") -> str:
    return tag("text", escape(content), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "grid") -> str:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def box(x: float, y: float, width: float, height: float, class_: str, title: str = "") -> str:
    hover = tag("title", escape(title)) if title else ""
    wide, high = f"{max(width, 0):.1f}", f"{height:.1f}"
    return tag("rect", hover, x=f"{x:.1f}", y=f"{y:.1f}", width=wide, height=high, class_=class_)


def points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """A long name without its middle: both ends of `awq:group=64 + kv int8` tell modes apart."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[-(longest - 1 - head) :]}"


def width_of(names: Sequence[str]) -> float:
    """What the longest of `names` takes, as it is drawn."""
    return CHARACTER * max((len(shortened(name)) for name in names), default=0)


def number(value: float) -> str:
    """Three digits that count: 1,240, 41.3, 0.0273."""
    if value and (abs(value) >= 1e7 or abs(value) < 1e-4):
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """For values > 0."""
    span = math.log(high / low) or 1.0
    return lambda value: start + math.log(value / low) / span * (end - start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values within [low, high], about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round multiples of powers of ten within [low, high], the densest set of at most `count`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in powers for m in steps if low * 0.999 <= m * 10.0**p <= high * 1.001]
        if len(found) <= count:
            return found
    return found[:: math.ceil(len(found) / count)]


@dataclass(frozen=True)
class Picture:
    """A drawing with what is said above and below it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Mark:
    """How one mode is drawn everywhere: its name, and its place in the report."""

    name: str
    place: int

    @property
    def colour(self) -> str:
        """CSS class, defined in style.html."""
        return f"s{self.place % NUM_COLOURS}"

    @property
    def dash(self) -> str:
        return DASHES[self.place % len(DASHES)]

    @property
    def is_hollow(self) -> bool:
        """The second round of shapes: a ninth mode has the first one's, hollow."""
        return self.place // NUM_COLOURS % 2 == 1

    def drawn(self, x: float, y: float, size: float = 4.6, *, title: str = "") -> str:
        corners = points([(x + size * dx, y + size * dy) for dx, dy in SHAPES[self.place % NUM_COLOURS]])
        hover = tag("title", escape(title or self.name))
        return tag(
            "polygon", hover, points=corners, class_=f"{'hollow' if self.is_hollow else 'mark'} {self.colour}"
        )

    def beside(self, x: float, y: float, anchor: str = "start") -> str:
        """The name, in the mode's colour."""
        return text(x, y, shortened(self.name), anchor, f"name {self.colour}")


def _regular(corners: int, turned: float = 0.0, radius: float = 1.0) -> list[tuple[float, float]]:
    angles = [math.pi * (2 * n / corners + turned - 0.5) for n in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star(corners: int) -> list[tuple[float, float]]:
    outer, inner = _regular(corners, radius=1.35), _regular(corners, 1 / corners, 0.55)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


SHAPES: tuple[list[tuple[float, float]], ...] = (
    _regular(20),  # round
    _regular(4, 0.25, 1.25),  # square
    _regular(3, 0.0, 1.35),
    _regular(4, 0.0, 1.35),  # diamond
    _regular(3, 1.0, 1.35),
    _star(5),
    _star(4),
    _regular(6, 0.0, 1.2),
)
