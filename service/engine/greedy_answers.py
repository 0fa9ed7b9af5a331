"""Greedy answers of the served weights, by the engine's own steps, and how long a reference agrees with them.

evaluate --prompts--> answer_greedily --answers--> the reference reads them in one pass --> agreed_tokens

The reference need not answer itself: as long as its likeliest token is the answer's next one, its own answer
would have been the same, and the first place where it is not is where the two part.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from service.engine.engine import Engine
from service.errors import HalftoneError
from service.kernels.greedy import greedy
from service.messages import Sampling, Submit


def answer_greedily(
    engine: Engine, prompts: Sequence[list[int]], max_tokens: int, advance: Callable[[int], None]
) -> list[list[int]]:
    """-> the answers' tokens, each up to a stop token, that included; `advance` is given tokens.

    The engine must be idle. Raises HalftoneError with what it says of a prompt that it cannot answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):  # ids below 0 are no request's of the front
        engine.add(Submit(-1 - number, prompt, Sampling(max_tokens, temperature=0)))
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error:
                engine.abort([-1 - number for number in range(len(prompts))])
                raise HalftoneError(f"prompt {-1 - output.id} cannot be answered: {output.error}")
            answers[-1 - output.id] += output.token_ids
            advance(len(output.token_ids))
    return answers


def agreed_tokens(answer: Sequence[int], logits: Iterable[Tensor]) -> int:
    """Tokens of `answer` before the first that a reference would not have said; `logits` [rows, vocab] in
    slices, a row for each token."""
    agreed = 0
    for rows in logits:
        for likeliest in greedy(rows).tolist():
            if likeliest != answer[agreed]:
                return agreed
            agreed += 1
    return agreed
