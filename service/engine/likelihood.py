"""Before anybody is served: does a checkpoint that was quantized elsewhere still know its language?

startup --source--> LikelihoodCheck, which tokenizes while weights load --model--> nothing, or CheckpointError

Kernels are held against the weights as they were read (self_check). Whether they were read rightly only a
text can tell: nibbles in another order, zeros off by one or the scales of other groups make weights of the
right size that mean nothing. A model of V tokens that knows nothing loses ln V nats a token, and one whose
weights were misread more, because it is sure of what it says. The bound is half of ln V. On this text, which
any model that has seen English finds easy, the demo model loses 1.9 to 2.2 of its 10.8 in every precision,
and 12.9 or more behind every reader that was made wrong on purpose: docs/correctness.md has the figures.
"""

import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from service.errors import CheckpointError
from service.model.batch import BLOCK_TOKENS, sequence_batch
from service.model.checkpoint import TensorSource
from service.model.instance import ModelInstance
from service.quality.divergence import negative_log_likelihood

logger = logging.getLogger(__name__)

MAX_TOKENS = 128
LEAST_TOKENS = 2  # one is scored
BOUND = 0.5  # of ln V
TEXT = """\
Once upon a time there was a little girl who lived with her mother in a small house near the forest. One day \
her mother said to her: "Take this basket of bread and milk to your grandmother, who is old and ill. Do not \
leave the path, and do not talk to strangers." The girl took the basket and went into the forest. On the way \
she met a dog. "Where are you going?" asked the dog. "I am going to my grandmother," said the girl, "with a \
basket of bread and milk, because she is old and ill."\
"""


class LikelihoodCheck:
    """Of a model that `source` is read into; begins to tokenize when it is made."""

    def __init__(self, source: TensorSource, tokenizer: Path) -> None:
        self._path = source.path
        self._begun = ThreadPoolExecutor(1, "likelihood")
        self._token_ids: Future[list[int]] = self._begun.submit(tokenize, tokenizer)
        self._begun.shutdown(wait=False)

    @classmethod
    def of(cls, source: TensorSource, tokenizer: Path) -> "LikelihoodCheck | None":
        """None where nobody can have misread anything: 16-bit weights, and weights that were drawn.

        A checkpoint without a tokenizer cannot be asked: the log says so.
        """
        if source.quantization is None or source.random_weights:
            return None
        if not (tokenizer / "tokenizer.json").is_file():
            logger.warning(
                "`%s` has no tokenizer.json: nothing has shown that its quantized weights are read rightly",
                source.path,
            )
            return None
        return cls(source, tokenizer)

    @torch.inference_mode()
    def __call__(self, model: ModelInstance) -> None:
        """Raises CheckpointError where the text is likelier by chance."""
        limit = min(MAX_TOKENS, model.decoder.cos.shape[0])
        token_ids = self._token_ids.result()[:limit]
        if len(token_ids) < LEAST_TOKENS:
            return
        nats = nats_per_token(model, token_ids)
        chance = math.log(model.config.vocab_size)
        logger.info("a plain English text takes %.2f nats a token, %.2f by chance", nats, chance)
        if not nats <= BOUND * chance:  # NaN too
            raise CheckpointError(
                f"checkpoint `{self._path}`, read as `{model.backend.canonical}`, does not know its "
                f"language: plain English takes {nats:.2f} nats a token; at most {BOUND * chance:.2f} are "
                f"accepted, and chance takes {chance:.2f}",
                hint="its tensors are damaged or packed in another way than config.json says: fetch it "
                "again, or serve the 16-bit checkpoint that it was made from; if other servers speak with "
                "it, report it",
            )


def tokenize(folder: Path) -> list[int]:
    """The text, with what this tokenizer puts before every text."""
    from tokenizers import Tokenizer  # most starts need none

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    return ids


def nats_per_token(model: ModelInstance, token_ids: list[int]) -> float:
    """Mean over all tokens but the first, in one forward pass."""
    num_blocks = -(-len(token_ids) // BLOCK_TOKENS)
    batch = sequence_batch(token_ids, list(range(1, num_blocks + 1)), model.device)  # block 0 is nobody's
    batch = replace(batch, logit_rows=batch.positions[:-1])
    logits = model.forward(batch, model.new_kv(num_blocks + 1))
    return float(negative_log_likelihood(logits, batch.token_ids[1:]).mean())
