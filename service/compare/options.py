"""How much a comparison measures: levels of load, repeats, texts. The defaults fit the device.

cli --flags--> CompareOptions --> Plan
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from loadtest.slo import Slo
from service.errors import SettingError

LEVEL = re.compile(r"(?P<streams>\d+)|(?P<rate>\d*\.?\d+)/s|(?P<percent>\d*\.?\d+)%")
LEAST_OPEN_REQUESTS = 10
LEAST_CLOSED_REQUESTS = 8
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class LevelSpec:
    """One level of load as asked: streams, requests/s, or a share of what the reference can answer."""

    concurrency: int = 0
    rate_per_s: float = 0.0
    share: float = 0.0

    @property
    def is_closed(self) -> bool:
        return self.concurrency > 0

    def __str__(self) -> str:
        if self.is_closed:
            return str(self.concurrency)
        return f"{self.rate_per_s:g}/s" if self.rate_per_s else f"{100 * self.share:g}%"


def parse_levels(text: str) -> tuple[LevelSpec, ...]:
    """`1,4,2/s,60%` -> closed loops of 1 and 4 streams, Poisson at 2 requests/s and at 60 % of capacity.

    Ordered: closed loops by streams, then open ones. Raises SettingError.
    """
    levels = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = LEVEL.fullmatch(part)
        value = float(next(filter(None, found.groups()))) if found else 0.0
        if found is None or not value:
            raise SettingError(
                f"`--levels {text}`: `{part}` is no level of load",
                hint="`4` is four streams, `2.5/s` requests a second, `60%` a share of what the reference "
                "can",
            )
        levels.add(
            LevelSpec(
                concurrency=int(value) if found["streams"] else 0,
                rate_per_s=value if found["rate"] else 0.0,
                share=value / 100 if found["percent"] else 0.0,
            )
        )
    if not any(level.is_closed for level in levels) or all(level.is_closed for level in levels):
        raise SettingError(
            f"`--levels {text}` needs streams and rates",
            hint="`1,4,30%,60%,90%`: tokens/s come from streams, latencies and the knee from rates",
        )
    order = {
        level: (not level.is_closed, level.concurrency, level.share, level.rate_per_s) for level in levels
    }
    return tuple(sorted(levels, key=lambda level: order[level]))


@dataclass(frozen=True)
class CompareOptions:
    """What is measured. Amounts of load are those of each repeat."""

    precisions: str  # where nobody names any
    levels: tuple[LevelSpec, ...]
    output_tokens: int
    open_s: float  # of arrivals that count, at each rate
    agreement_tokens: int  # scored by prefill, by decode at M=1 and at M=8
    kv_tokens: int  # where the settings leave it to the device's memory
    minutes: float  # no repeat beyond `repeats` is begun that would end after as many
    requests_per_stream: int = 4
    warmup_per_stream: int = 1
    repeats: int = 3
    max_repeats: int = 6  # where `repeats` cannot resolve 5 %
    slo: Slo | None = None
    max_perplexity_rise: float = 0.05  # a mode that loses more is not one to deploy
    num_windows: int = 8  # at least 8: that many sequences decode together
    window_tokens: int = 513  # scored: one less a window
    seed: int = 0
    prompts: str = ""  # JSONL; empty: loadtest's own
    text: str = ""  # UTF-8 file; empty: half B of the interpreter's documentation

    def num_requests(self, concurrency: int, rate_per_s: float) -> int:
        """That count in one repeat, with so many streams or (0) at such a rate."""
        if concurrency:
            return max(LEAST_CLOSED_REQUESTS, concurrency * self.requests_per_stream)
        return max(LEAST_OPEN_REQUESTS, math.ceil(self.open_s * rate_per_s))

    def num_warmup(self, concurrency: int, num_requests: int) -> int:
        """Of an open loop its first arrivals, so that what counts finds others on the way."""
        return concurrency * self.warmup_per_stream if concurrency else max(1, num_requests // 8)


def defaults(device: Device) -> CompareOptions:
    """What fits two cores in 10 minutes, or one GPU in 15."""
    if device == "cpu":
        return CompareOptions(
            precisions="bf16,int8,nf4,awq",
            levels=parse_levels("1,4,30%,60%,90%"),
            output_tokens=32,
            open_s=2.0,
            agreement_tokens=1024,
            minutes=10.0,
            kv_tokens=8192,
        )
    return CompareOptions(
        precisions="fp16,int8,nf4,awq",
        levels=parse_levels("1,8,32,30%,60%,90%"),
        output_tokens=64,
        open_s=2.0,
        agreement_tokens=2048,
        minutes=15.0,
        kv_tokens=65_536,
    )


def check(options: CompareOptions) -> None:
    """Raises SettingError for amounts that measure nothing."""
    least = {
        "requests_per_stream": (options.requests_per_stream, 1),
        "repeats": (options.repeats, 1),
        "output_tokens": (options.output_tokens, 2),
        "num_windows": (options.num_windows, 1),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise SettingError(f"compare option `{name}` = `{value}` is too small: at least {smallest}")
    if options.max_repeats < options.repeats:
        raise SettingError(
            f"`--max-repeats {options.max_repeats}` is less than `--repeats {options.repeats}`",
            hint="it bounds what is added where those cannot resolve 5 %",
        )
    each = options.agreement_tokens // min(8, options.num_windows)
    if each + 1 > options.window_tokens:
        raise SettingError(
            f"compare option `agreement_tokens` = `{options.agreement_tokens}` needs windows of {each + 1} "
            f"tokens, and they have {options.window_tokens}"
        )
