"""Before a deterministic engine serves anybody: is a request the same alone, in company, cut and repeated?

startup --model--> check_independence, or DeviceError

Why it should be is argued in docs/correctness.md; this sees a device, a driver or a torch of which it is not
true. One request runs alone and whole, then among others of which each step has room for a part, then again
with the beginning of its prompt cached.
"""

from itertools import count

import torch

from service.engine.engine import Engine, Limits
from service.errors import DeviceError
from service.messages import Sampling, Submit
from service.model.batch import BLOCK_TOKENS
from service.model.instance import ModelInstance

PROMPT_TOKENS, NEW_TOKENS = 45, 4
NEIGHBOURS = (3, 1, 20, 7) * 5  # prompt tokens of each: more rows than the kernels for few rows take
STEP_TOKENS = 32  # in company

Answer = list[tuple[int, float]]  # tokens and their log-probabilities


@torch.inference_mode()
def check_independence(model: ModelInstance) -> None:
    """Raises DeviceError where a bit differs."""
    prompt_tokens = min(PROMPT_TOKENS, model.decoder.cos.shape[0] - NEW_TOKENS)
    ids = count(1)
    watched, *others = (
        Submit(
            next(ids), prompt(model, length), Sampling(NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
        )
        for length in (prompt_tokens, *(min(length, prompt_tokens) for length in NEIGHBOURS))
    )
    alone = answer(engine_for(model, 1, PROMPT_TOKENS), watched, [])
    engine = engine_for(model, 1 + len(others), STEP_TOKENS)
    for circumstance, neighbours in (("beside other requests", others), ("behind a cached prefix", [])):
        if answer(engine, watched, neighbours) != alone:
            raise DeviceError(
                f"setting `deterministic`: on `{model.device}` in `{model.backend.canonical}` a request's "
                f"log-probabilities are others {circumstance} than alone",
                hint="serve without `deterministic` or in another `--precision`, and report what "
                "`halftone doctor` says",
            )


def prompt(model: ModelInstance, length: int) -> list[int]:
    """Token ids all over the vocabulary; no length's prompt begins like another's."""
    return [(place * 7919 + length) % model.config.vocab_size for place in range(length)]


def engine_for(model: ModelInstance, num_requests: int, step_tokens: int) -> Engine:
    context_tokens = PROMPT_TOKENS + NEW_TOKENS
    num_blocks = num_requests * -(-context_tokens // BLOCK_TOKENS) + 1
    limits = Limits(context_tokens, step_tokens, num_requests, model.config.vocab_size)
    return Engine(model, model.new_kv(num_blocks), limits, model.device, deterministic=True)


def answer(engine: Engine, watched: Submit, others: list[Submit]) -> Answer:
    """Of the watched request, which comes in the middle of the others."""
    told: Answer = []
    middle = len(others) // 2
    for submit in (*others[:middle], watched, *others[middle:]):
        engine.add(submit)
    while engine.has_work:
        for output in engine.step().outputs:
            if output.id == watched.id:
                told += [(entry.token_id, entry.logprob) for entry in output.logprobs or []]
    return told
