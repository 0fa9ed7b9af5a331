"""How a kernel is timed on a GPU, and the sizes of Llama-3.1-8B that it is timed at."""

import statistics
from collections.abc import Callable

import torch

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 32, 4096, 32, 8, 128, 14336, 128256
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
CONTEXT, PAGE = 640, 16
READ_BYTES_PER_SECOND = 3.04e12  # sum over 1 GiB on an H100 80GB HBM3: docs/performance.md
HALF, CUDA = torch.float16, torch.device("cuda")


def microseconds(launch: Callable[[int], object], copies: int = LAYERS, repeats: int = 15) -> float:
    """Of one launch, captured once for each copy."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            launch(copy)
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times[3:])


def show(rows: int, name: str, got: float, num_bytes: float = 0) -> None:
    floor = num_bytes / READ_BYTES_PER_SECOND * 1e6
    print(f"{rows:5d}  {name:52s} {got:8.2f} us   floor {floor:8.2f}", flush=True)
