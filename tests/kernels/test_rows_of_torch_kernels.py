"""What torch computes for a deterministic model on a CPU: a row's bits depend on that row alone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm import reference as norm
from service.kernels.gated_silu import reference as gate

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "add_rms_norm": lambda x: torch.cat(norm.add_rms_norm(x, x.flip(-1), x[0].abs().clone(), 1e-5), -1),
    "gated_silu": lambda x: gate.gated_silu(x, deterministic=True),
}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 5], indirect=True)
@pytest.mark.parametrize("width", [130, 192, 1472])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_is_the_same_in_any_company(kernel: str, width: int) -> None:
    """Some calls are shared among threads, some are not; some rows end where a register does, some do not."""
    torch.manual_seed(width)
    x = torch.randn(301, width)
    x[0] = torch.randn(width)
    compute = KERNELS[kernel]
    together = compute(x)
    for rows in (1, 2, 5, 17, 64, 300):
        assert torch.equal(compute(x[:rows].contiguous()), together[:rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [5], indirect=True)
def test_torch_s_own_silu_would_not_do() -> None:
    """If this fails, its other form is no longer needed."""
    torch.manual_seed(0)
    x = torch.randn(301, 1472)
    together = gate.gated_silu(x)
    alone = torch.cat([gate.gated_silu(row[None]) for row in x])
    assert not torch.equal(alone, together)
    torch.testing.assert_close(gate.gated_silu(x, deterministic=True), together)
