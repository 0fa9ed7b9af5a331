"""What each part of one engine holds of its device, now: the figures behind service/ledger's names.

startup --model, engine--> Ledger --parts--> EngineInfo; child --now and then--> LedgerWatch --> StepStats

Tensors that the engine keeps are counted one by one. What the process holds outside of torch is measured
once, when the engine is ready and nobody waits: on a GPU so that a neighbour is never taken for ours; on a
CPU, where tensors, interpreter and libraries share one heap, when what loading left there has been given
back, so that what is held beyond it is the steps'. The parts sum to the whole.
"""

import logging
import time
from collections.abc import Callable

from service import device as devices
from service.engine.device_use import used_bytes
from service.engine.engine import Engine
from service.engine.graphs import GraphMemory
from service.model.batch import PagedKV
from service.model.instance import ModelInstance

logger = logging.getLogger(__name__)

LOOK_S = 1.0
WORTH_TELLING_BYTES = 1 << 20


class Ledger:
    """Of an engine that has been warmed up and, on a GPU, has captured its steps."""

    def __init__(
        self, model: ModelInstance, kv: PagedKV, engine: Engine, step_bytes: int, used_before: int | None
    ) -> None:
        """`step_bytes`: on a GPU, most that a step took beside what the engine keeps. `used_before`: by all
        processes, on a GPU, before this one opened it; None: not known, then what others hold passes for
        ours."""
        self._model, self._kv, self._engine = model, kv, engine
        self._device = model.device
        self._step_bytes = step_bytes
        self._workspace = 0
        if devices.runs_behind(self._device):
            self._outside = self._outside_of_gpu_allocator(used_before)
        else:
            devices.release_cached(self._device)
            kept = sum(self._tensors().values()) + model.decoder.recordings.num_bytes
            self._outside = max(devices.memory_used_bytes(self._device) - kept, 0)

    def parts(self, *, is_idle: bool = True) -> dict[str, int]:
        """Part -> bytes; `is_idle`: no step is under way, whose tensors would pass for a workspace."""
        if devices.runs_behind(self._device):
            return self._gpu_parts(is_idle=is_idle)
        tensors = self._tensors()
        workspace = self._model.decoder.recordings.num_bytes
        left = devices.memory_used_bytes(self._device) - sum(tensors.values()) - workspace - self._outside
        return tensors | {
            "activations": max(left, 0),
            "workspace": workspace,
            "graphs": 0,
            "allocator_slack": 0,
            "outside_torch": self._outside + min(left, 0),  # pages of a file go when others need the room
        }

    def _gpu_parts(self, *, is_idle: bool) -> dict[str, int]:
        tensors, graphs = self._tensors(), self._graphs()
        held = devices.memory_used_bytes(self._device)
        left = held - sum(tensors.values()) - graphs.buffer_bytes
        if is_idle:
            kept = devices.memory_kept_bytes(self._device) - graphs.slack_bytes
            self._workspace = max(left - kept, 0)
        left = max(left - self._workspace, 0)
        activations = min(self._step_bytes, left)
        return tensors | {
            "activations": activations,
            "workspace": self._workspace,
            "graphs": graphs.buffer_bytes + graphs.driver_bytes,
            "allocator_slack": left - activations,
            "outside_torch": self._outside,
        }

    def _outside_of_gpu_allocator(self, used_before: int | None) -> int:
        used = used_bytes(devices.device_uuid(self._device))
        if used is None or used_before is None:
            used, used_before = devices.memory_taken_bytes(self._device), 0
        in_torch = devices.memory_used_bytes(self._device)
        outside = used - used_before - in_torch - self._graphs().driver_bytes
        if outside < 0:
            logger.warning("memory outside of torch is not known: others gave some back meanwhile")
        return max(outside, 0)

    def _tensors(self) -> dict[str, int]:
        """What the engine keeps from start to end."""
        runner = self._engine.runner
        used = self._engine.cache.num_held * (self._kv.bytes // self._kv.num_blocks)
        return self._model.memory_bytes() | {
            "tables.requests": runner.penalties.bytes + runner.state.bytes,
            "kv.used": used,
            "kv.free": self._kv.bytes - used,
        }

    def _graphs(self) -> GraphMemory:
        graphs = self._engine.runner.graphs
        return graphs.memory if graphs else GraphMemory()


class LedgerWatch:
    """Looks about once a second: at what requests hold, and at what has changed by 1 MiB."""

    def __init__(
        self, ledger: Ledger, told: dict[str, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger
        self._told = told
        self._clock = clock
        self._looked_at = clock()

    def look(self, *, is_idle: bool) -> dict[str, int] | None:
        """All parts where one of them is worth telling, else None."""
        if self._clock() < self._looked_at + LOOK_S:
            return None
        self._looked_at = self._clock()
        parts = self._ledger.parts(is_idle=is_idle)
        changes = {part: abs(size - self._told.get(part, 0)) for part, size in parts.items()}
        if not changes["kv.used"] and max(changes.values()) < WORTH_TELLING_BYTES:
            return None
        self._told = parts
        return parts
