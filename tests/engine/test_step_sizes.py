"""How many tokens a step may hold, by device, precision and what the user said."""

import pytest
import torch

from service.engine.startup import batch_limits
from service.errors import SettingError
from service.messages import EngineConfig
from service.precision.base import Activation

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "activation", "expected"),
    [
        (GPU, "16bit", (1024, 256, 768, 2048)),
        (GPU, "int8_rows", (1024, 256, 1024, 2048)),
        (GPU, "fp8_rows", (1024, 256, 1024, 2048)),
        (CPU, "16bit", (512, 64, 512, 512)),
    ],
)
def test_by_device_and_precision(
    device: torch.device, activation: Activation, expected: tuple[int, int, int, int]
) -> None:
    assert batch_limits(EngineConfig(model_path="", precision="bf16"), device, activation) == expected


def test_what_the_user_says_holds_for_every_step() -> None:
    config = EngineConfig(model_path="", precision="bf16", max_batch_tokens=600, max_batch_requests=500)
    assert batch_limits(config, GPU, "16bit") == (600, 500, 600, 600)
    with pytest.raises(SettingError, match="max_batch_requests"):
        batch_limits(
            EngineConfig(model_path="", precision="bf16", max_batch_tokens=8, max_batch_requests=9),
            GPU,
            "16bit",
        )
