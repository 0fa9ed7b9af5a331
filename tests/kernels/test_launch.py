"""What Triton compiled is launched again for the same kind of arguments, and for no other."""

from typing import Any

import pytest
import torch

from service.kernels import launch as launching
from service.kernels.launch import cdiv, launch, next_power_of_2

WIDE = torch.zeros(64, dtype=torch.float16)


class Compiled:
    """Remembers its launches."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class Kernel:
    """Stands in for a Triton kernel: compiles for each launch that it is asked for itself."""

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.asked: list[tuple[Any, ...]] = []
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled | None:
            self.asked.append((grid, arguments, options))
            if self.interpreted:
                return None
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        class active:  # noqa: N801
            @staticmethod
            def get_current_stream(device: int) -> str:
                return "stream"

    monkeypatch.setattr(launching, "driver", Driver)
    monkeypatch.setattr(launching, "_compiled", {})


def test_the_second_launch_is_past_triton() -> None:
    kernel, out = Kernel(), torch.zeros(8)
    for grid in ((3,), (5, 2)):
        launch(kernel, grid, (WIDE, out), (7, 0.5), (64, True), num_warps=2)
    ((grid, arguments, options),) = kernel.asked
    assert grid == (3,)
    assert arguments == (WIDE, out, 7, 0.5, 64, True, False)
    assert options == {
        "num_warps": 2,
        "num_stages": 3,
        "launch_pdl": False,
        "enable_fp_fusion": True,
    }
    pointers = (WIDE.data_ptr(), out.data_ptr())
    hooks = (None, None, None)
    assert kernel.compiled[0].launches == [
        (5, 2, 1, "stream", "function", "metadata", *hooks, *pointers, 7, 0.5, 64, True, False)
    ]


@pytest.mark.parametrize(
    ("numbers", "compiles"),
    [((9, 0.5), 1), ((7, 2.5), 1), ((1, 0.5), 2), ((16, 0.5), 2), ((7 + (1 << 31), 0.5), 2)],
    ids=["another number", "another float", "one", "a multiple of 16", "a wide number"],
)
def test_numbers_that_triton_compiles_for(numbers: tuple[int, float], compiles: int) -> None:
    kernel = Kernel()
    for given in ((7, 0.5), numbers):
        launch(kernel, (1,), (WIDE,), given, (64,))
    assert len(kernel.compiled) == compiles


@pytest.mark.parametrize(
    "tensor", [WIDE.bfloat16(), WIDE[4:], WIDE[1:]], ids=["dtype", "8 bytes off", "2 bytes off"]
)
def test_tensors_that_triton_compiles_for(tensor: torch.Tensor) -> None:
    kernel = Kernel()
    for given in (WIDE, tensor, WIDE[8:]):  # the last is aligned again
        launch(kernel, (1,), (given,), (), ())
    assert len(kernel.compiled) == 2


def test_options_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(launching, "DEPENDENT", False)
    launch(kernel, (1,), (WIDE,), (), (64,))
    launch(kernel, (1,), (WIDE,), (), (32,))
    launch(kernel, (1,), (WIDE,), (), (64,), num_warps=8)
    launch(kernel, (1,), (WIDE,), (), (64,), num_stages=1)
    launch(kernel, (1,), (WIDE,), (), (64,), contracts=False)
    monkeypatch.setattr(launching, "DEPENDENT", True)
    launch(kernel, (1,), (WIDE,), (), (64,))
    assert len(kernel.compiled) == 6
    assert [options["launch_pdl"] for _, _, options in kernel.asked] == [False] * 5 + [True]
    assert [options["enable_fp_fusion"] for _, _, options in kernel.asked] == [True] * 4 + [False, True]


def test_the_interpreter_is_asked_each_time() -> None:
    kernel = Kernel(interpreted=True)
    for _ in range(3):
        launch(kernel, (1,), (WIDE,), (), ())
    assert len(kernel.asked) == 3


def test_rounding_up() -> None:
    assert [cdiv(number, 8) for number in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert [next_power_of_2(number) for number in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
