"""How many tokens a step may hold, by device, precision and what the user said."""

import pytest
import torch

from service.engine.startup import batch_limits
from service.errors import SettingError
from service.messages import EngineConfig
from service.precision import TABLE, load_backend

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        *((GPU, precision, (1024, 256, 512, 2048)) for precision in ("fp32", "bf16", "fp16")),
        *((GPU, precision, (1024, 256, 768, 2048)) for precision in ("awq", "nf4", "int3")),
        *((GPU, precision, (1024, 256, 1024, 2048)) for precision in ("int8", "fp8")),
        *((CPU, precision, (512, 64, 512, 512)) for precision in TABLE),
    ],
)
def test_by_device_and_precision(
    device: torch.device, precision: str, expected: tuple[int, int, int, int]
) -> None:
    config = EngineConfig(model_path="", precision=precision)
    assert batch_limits(config, device, load_backend(precision)) == expected


def test_what_the_user_says_holds_for_every_step() -> None:
    config = EngineConfig(model_path="", precision="bf16", max_batch_tokens=600, max_batch_requests=500)
    assert batch_limits(config, GPU, load_backend("bf16")) == (600, 500, 600, 600)
    with pytest.raises(SettingError, match="max_batch_requests"):
        batch_limits(
            EngineConfig(model_path="", precision="bf16", max_batch_tokens=8, max_batch_requests=9),
            GPU,
            load_backend("bf16"),
        )
