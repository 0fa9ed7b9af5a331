"""An engine that ends, in whatever way, gives the device's memory back. `pytest -m gpu`, by hand."""

import signal
from collections.abc import Callable

import pytest
import torch

from service.messages import EngineConfig, Fatal, Ready, Sampling, Shutdown, Submit
from service.model.hub import PRESETS
from tests.engine_child import Child, spawned

pytestmark = pytest.mark.gpu
SHAPE = PRESETS / "llama-3.2-1b"


def shut_down(child: Child) -> None:
    child.send(Shutdown())


def hang_up(child: Child) -> None:
    """As a front that dies."""
    child.connection.close()


def kill(child: Child) -> None:
    """As the supervisor does with an engine that gives no sign of life."""
    child.process.send_signal(signal.SIGKILL)


def used_bytes() -> int:
    """By all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize(
    ("precision", "end"),
    [("fp16", shut_down), ("nf4", kill), ("awq", hang_up)],
    ids=["shut down", "killed", "hung up"],
)
def test_99_of_100_bytes_come_back(precision: str, end: Callable[[Child], None]) -> None:
    """Weights, KV cache, graphs and context, with requests on their way."""
    before = used_bytes()
    config = EngineConfig(
        model_path=str(SHAPE),
        precision=precision,
        device="cuda",
        load_format="random",
        max_batch_requests=16,
        kv_memory_fraction=0.5,
    )
    with spawned(config) as child:
        child.connection.settimeout(300)
        while not isinstance(message := child.receive(), Ready):
            assert not isinstance(message, Fatal), message
        endless = Sampling(4000, ignore_eos=True)
        child.send(*(Submit(id, list(range(100)), endless) for id in range(8)))
        child.send(Submit(9, [1, 2, 3], Sampling(4, ignore_eos=True)))
        child.outputs(until=9)
        taken = used_bytes() - before
        assert taken > sum(message.info.memory_bytes.values()) > 1 << 30
        end(child)
        child.process.wait(timeout=30)
    assert used_bytes() - before <= 0.01 * taken
