"""What earlier tenants left in the KV cache is read by nobody, be it a broken request's NaN."""

from pathlib import Path

import pytest
import torch
from tiny_models import load_instance, make_checkpoint

from service.engine.engine import Engine, Limits
from service.messages import Sampling, Submit
from service.model.instance import ModelInstance


def answers(model: ModelInstance, content: float) -> dict[int, list[int]]:
    """Six requests of several lengths over a cache full of this."""
    kv = model.new_kv(40)
    for pages in kv.tensors:
        pages[1:] = content
    engine = Engine(model, kv, Limits(200, 64, 8, model.config.vocab_size), torch.device("cpu"))
    for id in range(6):
        asked = Sampling(20, temperature=id % 2, seed=id, ignore_eos=True)
        engine.add(Submit(id, list(range(3, 4 + 9 * id)), asked))
    told: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error
            told.setdefault(output.id, []).extend(output.token_ids)
    return told


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cache_full_of_nan_changes_nothing(tmp_path: Path, precision: str, window: int | None) -> None:
    make_checkpoint(tmp_path, "mistral", sliding_window=window)
    model = load_instance(tmp_path, precision)
    assert answers(model, torch.nan) == answers(model, 0.0)
