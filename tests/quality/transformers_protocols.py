"""The protocols again, from their definitions, by transformers: nothing is ours but articles and prose."""

import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.quality.wikitext import articles, prose


def gptq(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, size: int, most: int
) -> float:
    """Lines joined by blank ones, one text of tokens, windows of `size`, the mean loss of each."""
    lines = [line + "\n" if line.strip() else "" for line in text.split("\n")]
    lines = lines if text.split("\n")[-1] else lines[:-1]
    ids = tokenizer("\n\n".join(lines)).input_ids
    losses = []
    for number in range(min(len(ids) // size, most or len(ids))):
        batch = torch.tensor([ids[number * size : (number + 1) * size]])
        with torch.no_grad():
            losses.append(float(model(batch, labels=batch).loss) * size)
    return math.exp(sum(losses) / (len(losses) * size))


def llama_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, size: int, most: int
) -> float:
    """Chunks of the text as it is, BOS in the first place of each, the second half scored."""
    ids = tokenizer(text).input_ids
    total, count = 0.0, 0
    for number in range(min(len(ids) // size, most or len(ids))):
        chunk = ids[number * size : (number + 1) * size]
        if tokenizer("").input_ids:
            chunk[0] = tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([chunk])).logits[0].double().log_softmax(-1)
        for row in range(size // 2, size - 1):
            total -= float(logits[row, chunk[row + 1]])
            count += 1
    return math.exp(total / count)


def lm_eval_word(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, context: int, most: int
) -> float:
    """Each token once, behind all that fits: chunks of the context, the last one filled up from before."""
    total, words = 0.0, 0
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for article in articles(text)[: most or None]:
        words += len(article.split()) + article[0].isspace() + article[-1].isspace()
        ids = tokenizer(prose(article), add_special_tokens=False).input_ids
        done = 0
        while done < len(ids):
            new = min(context, len(ids) - done)
            end = done + new
            sequence = [prefix, *ids[:end]] if not done else ids[end - context - 1 : end]
            with torch.no_grad():
                logits = model(torch.tensor([sequence[:-1]])).logits[0].double().log_softmax(-1)
            total -= float(logits[-new:].gather(1, torch.tensor(ids[done:end])[:, None]).sum())
            done = end
    return math.exp(total / words)
