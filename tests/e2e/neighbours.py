"""The same prompts through one engine, together and each alone."""

from dataclasses import dataclass, field

from service.engine.startup import Serving
from service.messages import Sampling, Submit

LENGTHS = (3, 17, 40, 64, 100, 129, 200, 333)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)  # of each prompt token but the first


def prompts_from(text: list[int]) -> list[list[int]]:
    """Eight of mixed length from all over a text of 400 tokens or more."""
    stride = (len(text) - max(LENGTHS)) // len(LENGTHS)
    return [text[stride * number :][:length] for number, length in enumerate(LENGTHS)]


def answer_all(
    serving: Serving, prompts: list[list[int]], num_tokens: int, *, scores_prompts: bool = False
) -> list[Answer]:
    """Greedy answers to prompts that arrive together."""
    answers = [Answer() for _ in prompts]
    asked = Sampling(num_tokens, 0, ignore_eos=True, logprobs=0, prompt_logprobs=0 if scores_prompts else -1)
    for number, prompt in enumerate(prompts):
        serving.engine.add(Submit(number, prompt, asked))
    while serving.engine.has_work:
        for output in serving.engine.step().outputs:
            assert not output.error
            answer = answers[output.id]
            answer.token_ids += output.token_ids
            answer.logprobs += [entry.logprob for entry in output.logprobs or []]
            answer.prompt_logprobs += [entry.logprob for entry in output.prompt_logprobs or [] if entry]
    return answers


def answer_each(
    serving: Serving, prompts: list[list[int]], num_tokens: int, *, scores_prompts: bool = False
) -> list[Answer]:
    """The same, with nobody beside them."""
    return [answer_all(serving, [prompt], num_tokens, scores_prompts=scores_prompts)[0] for prompt in prompts]


def differing(ones: list[Answer], others: list[Answer]) -> tuple[int, float]:
    """-> answers that are not the same, and the share of tokens that are not.

    All behind the first token that differs may differ, so answers count beside tokens.
    """
    pairs = [
        (x, y)
        for one, other in zip(ones, others, strict=True)
        for x, y in zip(one.token_ids, other.token_ids, strict=True)
    ]
    answers = sum(one.token_ids != other.token_ids for one, other in zip(ones, others, strict=True))
    return answers, sum(x != y for x, y in pairs) / len(pairs)
