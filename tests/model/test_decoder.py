"""Our decoder against transformers' own models of each family, on tiny random weights in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from service.model.batch import BLOCK_TOKENS
from service.model.instance import ModelInstance
from tests.tiny_models import decode_batch, greedy, load_instance, logits_of, make_checkpoint, one_sequence

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-yarn-attention": (
        "qwen3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.7,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3-window": ("smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 20}),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelInstance, PreTrainedModel]:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    model_type, changes = FAMILIES[request.param]
    reference = make_checkpoint(folder, model_type, **changes)
    return load_instance(folder), reference


def some_tokens(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def test_logits_equal_transformers(pair: tuple[ModelInstance, PreTrainedModel]) -> None:
    instance, reference = pair
    tokens = some_tokens(200)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.3, "the model must say something"
    torch.testing.assert_close(logits_of(instance, tokens), expected, atol=1e-4, rtol=0)


def test_greedy_tokens_equal_generate(pair: tuple[ModelInstance, PreTrainedModel]) -> None:
    instance, reference = pair
    prompt = some_tokens(37, seed=2)
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=-1
        )
    assert greedy(instance, prompt, 24) == expected[0, len(prompt) :].tolist()


def test_chunks_and_decode_equal_one_prefill(pair: tuple[ModelInstance, PreTrainedModel]) -> None:
    """However a sequence is cut into chunks, each row's logits are those of one prefill."""
    instance, _ = pair
    tokens = some_tokens(100, seed=3)
    kv = instance.new_kv(8)
    rows, start = [], 0
    for end in (5, 16, 48, 61, 97, 98, 99, 100):
        rows.append(instance.forward(one_sequence(tokens[:end], start, kv), kv))
        start = end
    torch.testing.assert_close(torch.cat(rows), logits_of(instance, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("wanted", [[], [59], [3, 40, 59]], ids=len)
def test_the_last_layer_ends_with_the_wanted_rows(
    pair: tuple[ModelInstance, PreTrainedModel], wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache gets K and V of all rows, and what comes after attention sees the wanted ones."""
    instance, _ = pair
    tokens = some_tokens(61, seed=4)
    last, seen = instance.decoder.layers[-1], []
    down = last._down
    monkeypatch.setattr(last, "_down", lambda x: seen.append(len(x)) or down(x))
    kv = instance.new_kv(8)
    batch = one_sequence(tokens[:60], 0, kv)
    batch = type(batch)(**{**vars(batch), "logit_rows": torch.tensor(wanted, dtype=torch.int64)})
    found = instance.forward(batch, kv)
    following = instance.forward(one_sequence(tokens, 60, kv), kv)
    want = logits_of(instance, tokens)
    assert seen == [*[len(wanted)] * bool(wanted), 1, 61]
    torch.testing.assert_close(found, want[wanted], atol=1e-4, rtol=0)
    torch.testing.assert_close(following, want[60:], atol=1e-4, rtol=0)


def test_neighbours_do_not_move_a_decode_step(pair: tuple[ModelInstance, PreTrainedModel]) -> None:
    """Ragged sequences decoded together, pages interleaved, give what each gives alone."""
    instance, _ = pair
    sequences = [some_tokens(length, seed=length) for length in (3, 17, 64, 33, 90)]
    kv = instance.new_kv(40)
    tables = [[1 + number + 5 * page for page in range(7)] for number in range(5)]
    for table, tokens in zip(tables, sequences, strict=True):
        for position in range(0, len(tokens) - 1, BLOCK_TOKENS):
            batch = one_sequence(tokens[: min(position + BLOCK_TOKENS, len(tokens) - 1)], position, kv)
            pages = torch.tensor([table], dtype=torch.int32)
            slots = pages.long()[0, batch.positions // BLOCK_TOKENS] * BLOCK_TOKENS
            slots = slots + batch.positions % BLOCK_TOKENS
            instance.forward(
                type(batch)(**{**vars(batch), "block_tables": pages, "slots": slots, "num_decode": 0}), kv
            )
    together = instance.forward(decode_batch(sequences, tables), kv)
    for row, tokens in zip(together, sequences, strict=True):
        torch.testing.assert_close(row, logits_of(instance, tokens)[-1], atol=1e-4, rtol=0)


def test_observe_sees_every_linear(pair: tuple[ModelInstance, PreTrainedModel]) -> None:
    instance, reference = pair
    kv = instance.new_kv(3)
    seen: dict[str, int] = {}
    instance.forward(one_sequence(some_tokens(9), 0, kv), kv, lambda path, x: seen.update({path: x.shape[1]}))
    linears = {
        name: module.in_features
        for name, module in reference.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert seen == linears
