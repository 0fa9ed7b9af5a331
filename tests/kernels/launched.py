"""Which of our kernels are launched, by package and name, whatever launches them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from service.kernels.cuda.driver import Launch
from tests.kernels.absent_gpu import kernel_modules


def triton_kernels() -> set[str]:
    """All there are: what is told whether its launch is dependent, and whatever is called a kernel."""
    return {
        name_of(value)
        for module in kernel_modules().values()
        for name, value in vars(module).items()
        if hasattr(value, "arg_names") and (name.endswith("_kernel") or "IS_DEPENDENT" in value.arg_names)
    }


def name_of(kernel: Any) -> str:
    """`greedy.likeliest_kernel` of service.kernels.greedy.triton."""
    return f"{kernel.__module__.split('.')[-2]}.{kernel.__name__}"


@contextmanager
def launched() -> Iterator[Counter[str]]:
    """-> how often each was while this lasts: Triton's as `name_of`, those in CUDA C++ by their own name."""
    found: Counter[str] = Counter()
    call = Launch.__call__

    def call_cuda(self: Launch, num_blocks: int, shared_bytes: int, stream: int) -> None:
        found[self._kernel.name] += 1
        call(self, num_blocks, shared_bytes, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", call_cuda)
        for module in kernel_modules().values():
            if launch := getattr(module, "launch", None):
                patch.setattr(module, "launch", counting(launch, found))
        yield found


def counting(launch: Any, found: Counter[str]) -> Any:
    def call_triton(kernel: Any, *arguments: Any, **options: Any) -> None:
        found[name_of(kernel)] += 1
        launch(kernel, *arguments, **options)

    return call_triton
