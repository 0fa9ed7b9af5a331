"""An H100 that is not here: Triton compiles for it, or says what it would compile; nothing is launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "service" / "kernels"
# package -> its dispatched operator and the Triton function behind it
OPERATORS = {
    "awq_linear": {"_gemm": "awq_linear"},
    "greedy": {"_greedy": "greedy"},
    "row_state": {"_read_rows": "read_rows", "_write_rows": "write_rows"},
    "sample": {"_sample": "sample"},
    "sample_likely": {"_sample_likely": "sample_likely"},
    "shape_logits": {"_shape_logits": "shape_logits", "_count_tokens": "count_tokens"},
}


class AbsentDriver:
    """What Triton asks of a driver."""

    class utils:  # noqa: N801
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            return 0, 1, 32, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    class launcher_cls:  # noqa: N801
        def __init__(self, source: Any, metadata: Any) -> None:
            self.source = source

        def __call__(self, *_: Any) -> None:
            pass

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def absent_gpu() -> Iterator[None]:
    """Triton's kernels are made for it while this lasts."""
    pytest.importorskip("triton")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernels = [
        value
        for module in kernel_modules().values()
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", AbsentDriver())
        patch.setattr("service.kernels.launch._compiled", {})
        for kernel in kernels:  # what was made before, and is made now, is nobody's afterwards
            patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
        yield


def kernel_modules() -> dict[str, Any]:
    names = [path.parent.name for path in sorted(KERNELS.glob("*/triton.py"))]
    return {name: import_module(f"service.kernels.{name}.triton") for name in names}


@contextmanager
def recorded() -> Iterator[set[tuple[Any, ...]]]:
    """-> each kernel launched or compiled, with all that Triton compiles it for; nothing is compiled."""
    from triton.runtime.jit import JITFunction

    found: set[tuple[Any, ...]] = set()

    class Compiled:
        function = packed_metadata = None

        def run(self, *_: Any) -> None:
            pass

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
        *_, binder = kernel.device_caches[0]
        _, specialization, options = binder(*arguments, **options)
        found.add((kernel.__name__, *map(str, specialization), str(sorted(options.items()))))
        return Compiled()

    with absent_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield found


@contextmanager
def tensors_on_it() -> Iterator[None]:
    """The CPU's tensors say that they are a GPU's, so that its kernels are chosen.

    Nothing computes what these would write, so no memory is left as it was found.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: not tensor.is_meta), raising=False)
        patch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False), raising=False)
        patch.setattr(torch, "empty", torch.zeros)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        for name, module in kernel_modules().items():
            package = import_module(f"service.kernels.{name}")
            patch.setattr(package, "cuda", module, raising=False)
            for operator, function in OPERATORS.get(name, {}).items():
                patch.setattr(package, operator, getattr(module, function))
        yield
