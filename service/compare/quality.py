"""What the engine scored -> the report's quality, with intervals over windows of text.

mode.measure() --Evaluated--> quality_of() --Quality--> report.Row
"""

from math import exp, expm1, sqrt

from service.compare.figures import Interval
from service.compare.report import Agreement, Apart, Greedy, Quality
from service.compare.statistics import student_t
from service.errors import HalftoneError
from service.messages import Evaluated, GreedyAgreement

DECODE_MODES = ("decode1", "decode8")


def perplexity(evaluated: Evaluated, mode: str) -> float:
    """exp(mean negative log-likelihood)."""
    return exp(evaluated.nll[mode] / evaluated.tokens[mode])


def quality_of(evaluated: Evaluated) -> Quality:
    """Raises HalftoneError where prefill and decode scored different tokens."""
    windows = evaluated.windows
    num_windows = len(windows.tokens) if windows else 0
    against = evaluated.against_reference
    return Quality(
        perplexity=perplexity(evaluated, "prefill"),
        tokens=evaluated.tokens["prefill"],
        kl_mean=evaluated.kl_mean,
        kl_tokens=evaluated.kl_tokens,
        kl=over_windows(evaluated.kl_mean, evaluated.kl_standard_error, num_windows),
        kl_quantiles=evaluated.kl_quantiles,
        top1_agreement=evaluated.top1_agreement,
        top1=over_windows(evaluated.top1_agreement, evaluated.top1_standard_error, num_windows),
        agreement=agreement_of(evaluated),
        perplexity_ratio=exponential(over_windows(against.mean, against.standard_error, num_windows))
        if against
        else None,
        reference_perplexity=exp(sum(windows.reference_nll) / sum(windows.tokens))
        if windows and windows.reference_nll
        else None,
        greedy=greedy_of(evaluated.greedy) if evaluated.greedy else None,
    )


def over_windows(mean: float, standard_error: float, num_windows: int) -> Interval:
    """A mean per token whose error is that of windows taken as independent."""
    if num_windows < 2:
        return Interval(estimate=mean, low=None, high=None, n=num_windows)
    reach = student_t(num_windows - 1) * standard_error
    return Interval(estimate=mean, low=mean - reach, high=mean + reach, n=num_windows)


def exponential(found: Interval) -> Interval:
    """Of nats: the difference of two log-likelihoods as the ratio of their perplexities."""
    return Interval(
        estimate=exp(found.estimate),
        low=None if found.low is None else exp(found.low),
        high=None if found.high is None else exp(found.high),
        n=found.n,
    )


def greedy_of(found: GreedyAgreement) -> Greedy:
    """By prompt: tokens before the first that differs -> how long answers agree."""
    whole = [agreed >= generated for generated, agreed in zip(found.generated, found.agreed, strict=True)]
    agreed = sorted(found.agreed)
    share = sum(whole) / len(whole)
    return Greedy(
        num_prompts=len(whole),
        num_tokens=max(found.generated),
        same_share=share,
        same_standard_error=sqrt(share * (1 - share) / len(whole)),
        median_agreed_tokens=agreed[len(agreed) // 2],
        agreed_tokens=found.agreed,
    )


def agreement_of(evaluated: Evaluated) -> Agreement:
    """Three perplexities of the same tokens -> how far decode is from prefill, and how sure that is.

    Prefill scored more tokens than decode did; of those that both did, the pairs tell its share. Raises
    HalftoneError where the modes scored different numbers of tokens: that compares nothing.
    """
    pairs = [evaluated.paired[mode] for mode in DECODE_MODES]
    counts = {*(evaluated.tokens[mode] for mode in DECODE_MODES), *(pair.tokens for pair in pairs)}
    if len(counts) != 1:
        raise HalftoneError(f"prefill and decode scored different tokens: {evaluated.tokens}")
    decode1, decode8 = (perplexity(evaluated, mode) for mode in DECODE_MODES)
    prefill = decode1 * exp(-pairs[0].mean)
    # exp(mean) is the ratio of the perplexities, and also what a small error of the mean is multiplied by
    apart1, apart8 = (
        Apart(
            change=expm1(pair.mean),
            standard_error=exp(pair.mean) * pair.standard_error,
            num_windows=pair.windows,
        )
        for pair in pairs
    )
    return Agreement(
        tokens=counts.pop(),
        prefill=prefill,
        decode1=decode1,
        decode8=decode8,
        decode1_apart=apart1,
        decode8_apart=apart8,
        disagreement=max(abs(apart1.change), abs(apart8.change)),
        agrees=not (apart1.is_flagged or apart8.is_flagged),
    )
