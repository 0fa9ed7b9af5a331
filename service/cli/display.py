"""Progress of anything that takes longer than a breath: bars on a terminal, one line a stage elsewhere.

Called as demo.Progress and from messages.Loading: (stage, done, total, unit). Writes to stderr, so that
what a command prints can be piped.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from service.disk import megabytes
from service.front.engine_client import EngineClient

POLL_S = 0.1
NAMES = {
    "download": "Downloading",
    "convert": "Converting",
    "import": "Starting the engine",
    "device": "Opening the device",
    "verify": "Verifying",
    "calibrate": "Calibrating",
    "quantize": "Quantizing",
    "save": "Saving",
    "load": "Loading",
    "kernels": "Compiling kernels",
    "check": "Checking kernels",
    "warm": "Warming up",
    "capture": "Capturing graphs",
    "canary": "Hearing the canary",
    "drain": "Waiting for requests",
    "stop": "Ending the engine",
    "roll_back": "Going back",
    "evaluate": "Evaluating",
    "time": "Timing kernels",
}


def amount(done: float, total: float, unit: str) -> str:
    """`12 MB of 98 MB`, `3 of 30 layers`."""
    if unit == "bytes":
        return f"{megabytes(int(done))} of {megabytes(int(total))}"
    return f"{done:.0f} of {total:.0f} {unit}"


class AmountColumn(ProgressColumn):
    """How far a stage is, in its own unit."""

    def render(self, task: Task) -> Text:
        return Text(amount(task.completed, task.total or 0, task.fields["unit"]) if task.total else "")


class Display(AbstractContextManager["Display"]):
    """One command's stages, in the order in which they come."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            AmountColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._stage = ""
        self._task: TaskID | None = None
        self._done = 0
        self._total = 0
        self._unit = ""
        self._started_s = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stage = ""  # what failed has no closing line
        self.close()

    def close(self) -> None:
        """Ends the last stage; may be called before the end of the `with` block."""
        self._end_stage()
        if self.console.is_terminal:  # elsewhere none was drawn, and ending them prints an empty line
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        name = NAMES.get(stage, stage)
        if stage != self._stage:
            self._end_stage()
            self._stage, self._started_s = stage, time.monotonic()
            if self.console.is_terminal:
                self._task = self._bars.add_task(name, total=total or None, unit=unit)
            else:
                size = f" ({megabytes(total)})" if unit == "bytes" and total else ""
                self.console.print(f"{name}{size} ...", highlight=False, soft_wrap=True)
        self._done, self._total, self._unit = done, total, unit
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total or None)

    def _end_stage(self) -> None:
        """One line that stays: what was done, how much of it, in which time."""
        if not self._stage:
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        seconds = time.monotonic() - self._started_s
        total = megabytes(self._total) if self._unit == "bytes" else f"{self._total} {self._unit}"
        amount_done = f"{total}, " if self._total > 1 else ""
        text = f"{NAMES.get(self._stage, self._stage)}: {amount_done}{seconds:.1f} s"
        self.console.print(text, highlight=False, soft_wrap=True)
        self._stage = ""


async def show_loading(clients: Sequence[EngineClient], display: Display) -> None:
    """Draws what engines say on their way to ready, one after the other; ends by being cancelled."""
    while True:
        for client in clients:
            if client.loading is not None:
                display(client.loading.stage, client.loading.done, client.loading.total, client.loading.unit)
        await asyncio.sleep(POLL_S)
