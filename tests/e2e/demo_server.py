"""The whole server in a thread of the test: HTTP front, engine child, demo model; and a text for it."""

import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
from tokenizers import Tokenizer

from service.api.app import create_app
from service.config import Settings
from service.front.host import Host
from service.front.supervisor import ENGINE_COMMAND
from service.messages import EngineInfo, Evaluated
from tests.front_thread import running
from tests.metric_samples import sample

# one step ahead of its results, as on a GPU
ENGINE_AHEAD = (sys.executable, str(Path(__file__).with_name("engine_ahead.py")))
PROSE = Path(__file__).parents[2] / "LICENSE"  # some 2,300 tokens that nobody will edit
START_TIMEOUT_S = 120
ANSWER_TIMEOUT_S = 180


class DemoServer:
    """A front in a thread of its own, and the real engine as its child process."""

    host: Host
    info: EngineInfo
    loop: asyncio.AbstractEventLoop

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.host.metrics, name, precision=self.info.precision, **labels) or 0.0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request, answered whole."""
        return self.post_all([(path, body)])[0]

    def post_all(self, requests: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """All of them at once -> their answers, in this order."""

        async def inside() -> list[dict[str, Any]]:
            async with httpx2.AsyncClient(base_url=self.host.url, timeout=ANSWER_TIMEOUT_S) as client:
                sent = [client.post(path, json={"model": "demo", **body}) for path, body in requests]
                answers = await asyncio.gather(*sent)
            for answer in answers:
                assert answer.status_code == 200, answer.text
            return [answer.json() for answer in answers]

        return asyncio.run(inside())

    def evaluate(self, windows: list[list[int]], modes: list[Any], **options: Any) -> Evaluated:
        """The engine's own figures of quality, asked for as `halftone eval` does."""
        answer = asyncio.run_coroutine_threadsafe(
            self.host.client.evaluate(windows, modes, **options), self.loop
        )
        return answer.result()


@contextlib.contextmanager
def serving(
    folder: Path, *, command: Sequence[str] = ENGINE_COMMAND, **settings: Any
) -> Iterator[DemoServer]:
    """A ready server over the checkpoint in `folder`, on a free port; `command` is its engine's program."""
    server = DemoServer()
    configured = Settings(model=str(folder), served_model_name="demo", port=0, device="cpu", **settings)
    with running(lambda: Host(configured, folder, create_app, command=command), START_TIMEOUT_S) as (
        server.host,
        server.loop,
    ):
        assert server.host.client.info is not None
        server.info = server.host.client.info
        yield server


def prose(folder: Path) -> list[int]:
    """Token ids of one long English text."""
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROSE.read_text()).ids
    return ids
