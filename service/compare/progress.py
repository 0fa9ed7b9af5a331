"""The bar of a comparison: how far it is, and how long it will take, by what its own turns have taken.

job --turns--> Pace --> terminal
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# rough seconds of a turn and of quality, until the first have been measured
GUESSED_TURN_S, GUESSED_QUALITY_S = 20.0, 40.0
LOAD_SHARE = 0.2  # of a turn; the rest is traffic


class Pace:
    """One bar for all turns. Use as a context."""

    def __init__(self, console: Console, num_turns: int, num_qualities: int) -> None:
        self._turns_s: list[float] = []
        self._qualities_s: list[float] = []
        self._left_turns, self._left_qualities = num_turns, num_qualities
        self._bar = Progress(
            TextColumn("{task.description:<30}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def turn_s(self) -> float:
        """Seconds that a turn is expected to take, quality apart."""
        return mean(self._turns_s, GUESSED_TURN_S)

    @property
    def spent_s(self) -> float:
        return sum(self._turns_s) + sum(self._qualities_s)

    def remain(self, num_turns: int) -> None:
        """As many are to come: a round was added, or a mode has failed."""
        self._left_turns = num_turns

    def advancing(self, what: str, wants_quality: bool) -> Callable[[str, float], None]:
        """-> what a turn calls with its stage and the share of it that is done."""
        quality_s = mean(self._qualities_s, GUESSED_QUALITY_S) if wants_quality else 0.0
        furthest_s = 0.0

        def advance(stage: str, share: float) -> None:
            nonlocal furthest_s
            share = min(share, 1.0)
            inside_s = {
                "load": LOAD_SHARE * self.turn_s * share,
                "traffic": self.turn_s * (LOAD_SHARE + (1 - LOAD_SHARE) * share),
                "quality": self.turn_s + quality_s * share,
            }.get(stage, 0.0)
            # stages of the engine each count from nothing: the bar waits, it does not go back
            furthest_s = max(furthest_s, inside_s)
            self._show(f"{what}: {stage}", furthest_s)

        return advance

    def ended(self, turn_s: float, quality_s: float) -> None:
        """A turn took so long; `quality_s` is 0 where it had none."""
        self._turns_s.append(turn_s)
        self._left_turns -= 1
        if quality_s:
            self._qualities_s.append(quality_s)
            self._left_qualities -= 1
        self._show("", 0.0)

    def _show(self, what: str, inside_s: float) -> None:
        left_s = self._left_turns * self.turn_s + max(self._left_qualities, 0) * mean(
            self._qualities_s, GUESSED_QUALITY_S
        )
        left_s = max(left_s - inside_s, 0.0)
        done_s = self.spent_s + inside_s
        self._bar.update(
            self._task,
            description=what,
            completed=done_s,
            total=max(done_s + left_s, 1.0),
            left=f"about {left_s / 60:.0f} min left" if left_s >= 90 else f"about {left_s:.0f} s left",
        )


def mean(values: list[float], guess: float) -> float:
    return sum(values) / len(values) if values else guess
