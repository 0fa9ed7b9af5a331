"""In float32 an answer does not depend on what else is in the batch."""

from pathlib import Path

import pytest
from demo_server import prose
from neighbours import LENGTHS, Answer, answer_all, answer_each, prompts_from

from service.engine.startup import Serving, start
from service.messages import EngineConfig

pytestmark = pytest.mark.demo

NEW_TOKENS = 8


def serve(folder: Path, max_batch_tokens: int) -> Serving:
    """No prefix cache: an answer alone shall be computed as far as one in company."""
    config = EngineConfig(
        model_path=str(folder),
        precision="fp32",
        device="cpu",
        max_batch_tokens=max_batch_tokens,
        kv_tokens=2048,
        prefix_cache=False,
    )
    return start(config, lambda _: None, 0.0)


@pytest.fixture(scope="module")
def alone(demo_model: Path) -> list[Answer]:
    serving = serve(demo_model, 1024)
    return answer_each(serving, prompts_from(prose(demo_model)), NEW_TOKENS)


def test_neighbours_change_no_bit(demo_model: Path, alone: list[Answer]) -> None:
    """Prompts are computed whole, beside those of seven others."""
    assert sum(LENGTHS) < 1024
    together = answer_all(serve(demo_model, 1024), prompts_from(prose(demo_model)), NEW_TOKENS)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.logprobs for answer in together] == [answer.logprobs for answer in alone]


def test_neighbours_that_cut_a_prompt_change_no_token(demo_model: Path, alone: list[Answer]) -> None:
    """Where others leave less of a step, a prompt is cut elsewhere, and its sums have another order."""
    together = answer_all(serve(demo_model, 96), prompts_from(prose(demo_model)), NEW_TOKENS)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
