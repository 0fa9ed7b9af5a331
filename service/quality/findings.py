"""What `halftone eval` found, as types: the source of its JSON file and of its tables.

Evaluated, Cut --finding(), agreement_of(), greedy_of()--> Findings --> cli/evaluate. No torch here.

Every standard error takes windows as independent; that of decode beside prefill also has one token's errors
move together, wherever it is predicted. Intervals of 95 % are about two of them to each side.
"""

from math import exp, expm1
from statistics import median

import msgspec

from service.messages import Evaluated
from service.quality.protocols import Cut


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """From the reference, on the tokens that count."""

    reference: str
    kl_nats_per_token: float
    kl_standard_error: float
    kl_quantiles: dict[str, float]  # p50, p90, p99, max; nats
    top1_agreement: float  # share of tokens with the same likeliest one
    top1_standard_error: float
    reference_perplexity: float
    change: float  # perplexity / the reference's - 1, paired token by token
    change_standard_error: float


class Perplexity(msgspec.Struct, frozen=True, kw_only=True):
    """One protocol's figure, and what it is of."""

    protocol: str
    words: str  # the protocol in a sentence
    unit: str  # what it is per: token, word
    perplexity: float
    standard_error: float
    num_units: int
    scored_tokens: int
    num_windows: int
    divergence: Divergence | None = None


class Apart(msgspec.Struct, frozen=True, kw_only=True):
    """Perplexity of decode beside that of prefill, on the same tokens."""

    change: float  # decode / prefill - 1
    standard_error: float
    tokens: int


class Greedy(msgspec.Struct, frozen=True, kw_only=True):
    """How long greedy answers are those of the reference."""

    prompts: str  # file
    prompts_sha256: str
    max_tokens: int
    generated: list[int]  # by prompt, tokens of the answer
    agreed: list[int]  # by prompt, tokens before the first that differs; as many as generated: none did

    @property
    def num_apart(self) -> int:
        """Answers that part from the reference's."""
        return sum(agreed < made for agreed, made in zip(self.agreed, self.generated, strict=True))

    @property
    def median_agreed(self) -> float:
        return median(self.agreed)


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """With everything needed to repeat them."""

    halftone: str
    model_path: str
    precision: str
    dtype: str
    kv_dtype: str
    device: str
    torch: str
    weight_bytes: int
    tokenizer_sha256: str
    text: dict[str, str]  # name, sha256, python
    calibration: dict[str, str]  # of the mode, where it is calibrated: never the same words
    random_weights: dict[str, str]
    perplexities: list[Perplexity]
    decode: dict[str, Apart]  # decode1, decode8 -> beside prefill
    greedy: Greedy | None = None


def perplexity_of(protocol: str, cut: Cut, evaluated: Evaluated, reference: str) -> Perplexity:
    """One Evaluate's answer under its protocol."""
    nll, tokens = evaluated.nll["prefill"], evaluated.tokens["prefill"]
    value = exp(nll / cut.num_units)
    return Perplexity(
        protocol=protocol,
        words=cut.words,
        unit=cut.unit,
        perplexity=value,
        # d exp(x) = exp(x) dx, and tokens / units is 1 but for words
        standard_error=value * evaluated.nll_standard_error * tokens / cut.num_units,
        num_units=cut.num_units,
        scored_tokens=tokens,
        num_windows=len(cut.windows),
        divergence=divergence_of(cut, evaluated, reference) if reference else None,
    )


def divergence_of(cut: Cut, evaluated: Evaluated, reference: str) -> Divergence:
    pair, windows = evaluated.against_reference, evaluated.windows
    assert pair is not None, "an answer with a reference is paired"
    assert windows is not None, "and tells its windows"
    share = pair.tokens / cut.num_units
    return Divergence(
        reference=reference,
        kl_nats_per_token=evaluated.kl_mean,
        kl_standard_error=evaluated.kl_standard_error,
        kl_quantiles=evaluated.kl_quantiles,
        top1_agreement=evaluated.top1_agreement,
        top1_standard_error=evaluated.top1_standard_error,
        reference_perplexity=exp(sum(windows.reference_nll) / cut.num_units),
        change=expm1(pair.mean * share),
        change_standard_error=exp(pair.mean * share) * pair.standard_error * share,
    )


def decode_of(evaluated: Evaluated) -> dict[str, Apart]:
    """Each decode mode that was asked for."""
    return {
        mode: Apart(
            change=expm1(pair.mean),
            standard_error=exp(pair.mean) * pair.standard_error,
            tokens=pair.tokens,
        )
        for mode, pair in evaluated.paired.items()
    }
