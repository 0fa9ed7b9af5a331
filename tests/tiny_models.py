"""Random checkpoints of every family, small enough to build on the spot, and a greedy loop over them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch
from service.model.checkpoint import TensorSource
from service.model.instance import ModelInstance
from service.precision import load_backend

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def make_checkpoint(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Write a random checkpoint of this family and return transformers' model of it, in float32."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # random norms and biases, and weights large enough that every part of the model moves the logits
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.15)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model.float().eval()


def load_instance(source: Path | TensorSource, precision: str = "fp32", **options: Any) -> ModelInstance:
    return ModelInstance.load(source, load_backend(precision), torch.device("cpu"), **options)


def one_sequence(tokens: list[int], start: int, kv: PagedKV, *, every_row: bool = True) -> StepBatch:
    """A step over tokens[start:] of one sequence whose earlier tokens are cached, in blocks 1, 2, ..."""
    positions = torch.arange(start, len(tokens))
    num_blocks = -(-len(tokens) // BLOCK_TOKENS)
    assert num_blocks < kv.num_blocks
    rows = len(tokens) - start
    return StepBatch(
        token_ids=torch.tensor(tokens[start:]),
        positions=positions,
        slots=positions + BLOCK_TOKENS,
        query_starts=[0, rows],
        context_lengths=[len(tokens)],
        block_tables=torch.arange(1, num_blocks + 1, dtype=torch.int32)[None],
        num_decode=int(rows == 1),
        logit_rows=torch.arange(rows) if every_row else torch.tensor([rows - 1]),
    )


def decode_batch(sequences: list[list[int]], tables: list[list[int]]) -> StepBatch:
    """A step with the last token of each sequence; tables[s] are the blocks of sequence s."""
    positions = torch.tensor([len(tokens) - 1 for tokens in sequences])
    widest = max(map(len, tables))
    table = torch.tensor([blocks + [0] * (widest - len(blocks)) for blocks in tables], dtype=torch.int32)
    blocks = table.long().gather(1, (positions // BLOCK_TOKENS)[:, None])[:, 0]
    return StepBatch(
        token_ids=torch.tensor([tokens[-1] for tokens in sequences]),
        positions=positions,
        slots=blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        query_starts=list(range(len(sequences) + 1)),
        context_lengths=[len(tokens) for tokens in sequences],
        block_tables=table,
        num_decode=len(sequences),
        logit_rows=torch.arange(len(sequences)),
    )


def logits_of(instance: ModelInstance, tokens: list[int]) -> Tensor:
    """One-shot prefill -> float32 [tokens, vocab]."""
    kv = instance.new_kv(-(-len(tokens) // BLOCK_TOKENS) + 1)
    return instance.forward(one_sequence(tokens, 0, kv), kv)


def greedy(instance: ModelInstance, prompt: list[int], num_tokens: int) -> list[int]:
    """Prefill, then one token a step through the paged cache -> the new tokens."""
    kv = instance.new_kv(-(-(len(prompt) + num_tokens) // BLOCK_TOKENS) + 1)
    tokens, start = list(prompt), 0
    for _ in range(num_tokens):
        logits = instance.forward(one_sequence(tokens, start, kv, every_row=False), kv)
        start = len(tokens)
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]
