"""The engines of one server and how a request's `model` names one: `NAME` is the first, `NAME@nf4` that one.

host --builds--> Residents --find(model)--> api/

Most servers have one engine. With `--resident fp16,nf4` there are several over one checkpoint, each a process
with a share of the device's memory. A name with a precision is a promise: where another one is served by now,
because it was swapped, the name is not found.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service.config import Settings
from service.errors import HalftoneError, ModelNotFoundError, PrecisionError, SettingError
from service.front.engine_client import EngineClient
from service.front.supervisor import Supervisor
from service.front.swap import Swapper
from service.messages import EngineConfig
from service.metrics import Metrics, render
from service.precision import AUTO, canonical_of
from service.precision.spec import split_list


@dataclass(frozen=True, slots=True)
class Resident:
    """One engine, with what the front has for it."""

    model: str  # the server's name for the checkpoint
    asked: str  # the precision as the settings have it
    client: EngineClient
    supervisor: Supervisor
    metrics: Metrics
    swapper: Swapper

    @property
    def precision(self) -> str:
        """What is served; until that is known, what was asked for."""
        info = self.client.info
        return self.asked if info is None else info.precision

    @property
    def name(self) -> str:
        return f"{self.model}@{self.precision}"

    def is_called(self, name: str) -> bool:
        """Is this the engine that `NAME@precision` means, in whatever way the precision is spelled?"""
        model, _, precision = name.rpartition("@")
        try:
            return model == self.model and canonical_of(precision) == self.precision
        except PrecisionError:
            return False


Supervise = Callable[[EngineConfig, EngineClient, Metrics], Supervisor]


class Residents:
    """In the order of the setting; the first has the plain name."""

    def __init__(self, settings: Settings, model_path: Path, supervise: Supervise) -> None:
        """One for each precision of the settings; nothing is started."""
        self.model = settings.name
        self.model_path = model_path  # folder of the checkpoint that all are made from
        precisions = precisions_of(settings)
        base = settings.engine_config(model_path)
        found = []
        for place, precision in enumerate(precisions):
            later = tuple(precisions[place + 1 :])
            metrics = Metrics(self.model, precision)
            client = EngineClient(settings.max_queue_requests, metrics, settings.swap_wait_s)
            supervisor = supervise(
                msgspec.structs.replace(base, precision=precision, beside=later), client, metrics
            )
            swapper = Swapper(client, supervisor, metrics, settings.drain_timeout_s)
            found.append(Resident(self.model, precision, client, supervisor, metrics, swapper))
        self.all = tuple(found)
        self._start: asyncio.Task[None] | None = None
        self._compat = settings.metrics_compat

    @property
    def first(self) -> Resident:
        return self.all[0]

    @property
    def names(self) -> list[str]:
        """What `/v1/models` lists: the plain name, or one for each where there are several."""
        return [self.model] if len(self.all) == 1 else [resident.name for resident in self.all]

    def find(self, name: str | None) -> Resident:
        """The engine that a request names; None is the first. Raises ModelNotFoundError."""
        if name is None or name == self.model:
            return self.first
        for resident in self.all:
            if resident.is_called(name):
                return resident
        served = ", ".join(f"`{known}`" for known in self.names)
        raise ModelNotFoundError(f"model `{name[:64]}` is not served here; served is {served}", param="model")

    @property
    def num_open(self) -> int:
        """Requests that have no end yet."""
        return sum(resident.client.num_open for resident in self.all)

    async def render_metrics(self) -> bytes:
        """The body of /metrics, of type CONTENT_TYPE."""
        await asyncio.gather(*(resident.metrics.read_energy() for resident in self.all))
        return render([resident.metrics for resident in self.all], self._compat)

    # --- for the host --------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the first engine now, and each other one when the one before has its share of the memory."""
        self.first.supervisor.start()
        if len(self.all) > 1:
            self._start = asyncio.create_task(self._start_others(), name="residents")

    async def stop(self) -> None:
        """Ends every engine and waits until their processes are gone."""
        if self._start is not None:
            self._start.cancel()
        for resident in self.all:
            await resident.swapper.close()
        await asyncio.gather(*(resident.supervisor.stop() for resident in self.all))

    def drain(self) -> None:
        """No request is taken from now on."""
        for resident in self.all:
            resident.client.drain()

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        for resident in self.all:
            await resident.client.wait_idle()

    def end_all(self, error: str) -> None:
        """Every open request ends now, with an error that says `error`."""
        for resident in self.all:
            resident.client.end_all(error)

    # --- inside --------------------------------------------------------------------------------

    async def _start_others(self) -> None:
        """Where one cannot be ready those after it are not started, and fail of the same.

        What a ready one holds is written down: started again, it shall ask for as much and no more.
        """
        for place, resident in enumerate(self.all):
            if place:
                resident.supervisor.start()
            try:
                info = await resident.client.wait_ready()
                self._refuse_twin(resident)
            except HalftoneError as error:
                for other in self.all[place:]:
                    other.client.fail(error)
                return
            config = resident.supervisor.config
            resident.supervisor.config = msgspec.structs.replace(config, kv_tokens=info.kv_tokens, beside=())

    def _refuse_twin(self, resident: Resident) -> None:
        """PrecisionError for a precision that is another one's, spelled in another way."""
        same = [other for other in self.all if other.precision == resident.precision]
        if len(same) > 1:
            raise PrecisionError(
                f"setting `resident`: `{same[0].asked}` and `{same[1].asked}` are the same precision",
                hint="name each once",
            )


def precisions_of(settings: Settings) -> list[str]:
    """What the engines of a server serve, as it was asked for. Raises SettingError or PrecisionError."""
    if not settings.resident:
        return [settings.precision]
    if settings.precision != AUTO:
        raise SettingError(
            f"setting `precision` = `{settings.precision}` beside `resident` = `{settings.resident}`: each "
            "names what is served",
            hint="leave `precision` out; the plain name is the first of `resident`",
        )
    precisions = [canonical_of(precision) for precision in split_list(settings.resident)]
    if len(set(precisions)) < max(2, len(precisions)):
        raise SettingError(
            f"setting `resident` = `{settings.resident}`: two or more precisions are needed, each once",
            hint="`--precision` serves one",
        )
    return precisions
