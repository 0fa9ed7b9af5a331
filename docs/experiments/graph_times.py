"""How experiments time launches on a GPU: captured in one graph, which is replayed."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SKIPPED = 3  # of the first replays, which find clocks and caches as they were


def capture(launches: Iterable[Callable[[], Any]]) -> "torch.cuda.CUDAGraph":
    """One behind the other; each has run once before, so that whatever it loads or allocates first is there."""
    import torch  # whoever starts workers has none

    torch.cuda.synchronize()  # two launches on one workspace may not meet on two streams
    launches = list(launches)
    with torch.cuda.stream(torch.cuda.Stream()):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def replays_us(graph: "torch.cuda.CUDAGraph", replays: int = 9) -> list[float]:
    """Microseconds of each replay, after SKIPPED others."""
    import torch

    times = []
    for _ in range(SKIPPED + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times[SKIPPED:]
