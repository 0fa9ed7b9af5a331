"""The same prompts through one engine, together and each alone."""

from dataclasses import dataclass, field

from service.engine.startup import Serving
from service.messages import Sampling, Submit

LENGTHS = (3, 17, 40, 64, 100, 129, 200, 333)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def prompts_from(text: list[int]) -> list[list[int]]:
    """Eight of mixed length from all over a text of 400 tokens or more."""
    stride = (len(text) - max(LENGTHS)) // len(LENGTHS)
    return [text[stride * number :][:length] for number, length in enumerate(LENGTHS)]


def answer_all(serving: Serving, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
    """Greedy answers to prompts that arrive together."""
    answers = [Answer() for _ in prompts]
    for number, prompt in enumerate(prompts):
        sampling = Sampling(num_tokens, temperature=0, logprobs=0, ignore_eos=True)
        serving.engine.add(Submit(number, prompt, sampling))
    while serving.engine.has_work:
        for output in serving.engine.step().outputs:
            assert not output.error
            answers[output.id].token_ids += output.token_ids
            answers[output.id].logprobs += [entry.logprob for entry in output.logprobs or []]
    return answers


def answer_each(serving: Serving, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
    """The same, with nobody beside them."""
    return [answer_all(serving, [prompt], num_tokens)[0] for prompt in prompts]
