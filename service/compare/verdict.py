"""Rows with intervals -> which mode to deploy, in words, and how sure that is. What is not established is
not said.

assemble --Case--> judge() --Verdict--> Report
"""

from collections.abc import Sequence
from dataclasses import dataclass

from service.compare.figures import CONFIDENCE, Interval, effect
from service.compare.findings import SPEED, Ratio
from service.compare.report import NullComparison, Row, Verdict
from service.compare.statistics import RESOLUTION, resolves
from service.compare.words import listed

GOODPUT = "goodput_per_s"
DECIDING = {SPEED: "tokens/s", GOODPUT: "requests/s within the SLO"}
LATENCIES = {"ttft_p95_s": "p95 TTFT", "tpot_p50_s": "TPOT", "itl_p95_s": "p95 ITL"}


@dataclass(frozen=True)
class Case:
    """What a verdict is on."""

    rows: Sequence[Row]  # in the order asked, failed ones too
    reference: str
    ratio: Ratio
    place: str  # model, device and traffic in words
    throughput_level: str
    latency_level: str
    rate_levels: Sequence[str]  # ids, lowest rate first
    slo: str  # in words; empty: none
    max_perplexity_rise: float
    judges_quality: bool
    null: NullComparison | None

    @property
    def figures(self) -> list[tuple[str, str]]:
        """What decides, first things first: figure and level."""
        speed = (SPEED, self.throughput_level)
        return [(GOODPUT, self.rate_levels[-1]), speed] if self.slo else [speed]

    def label(self, level_id: str) -> str:
        """`4 streams`, `6 requests/s`."""
        found = (row.level(level_id) for row in self.rows)
        return next((level.label for level in found if level), level_id)

    @property
    def rule(self) -> str:
        measure = (
            f"the most requests/s within {self.slo} at the highest rate, then the most tokens/s with the "
            "most streams"
            if self.slo
            else "the most tokens/s with the most streams"
        )
        quality = (
            f" Of modes whose perplexity is surely no more than {100 * self.max_perplexity_rise:g} % above "
            f"{self.reference}'s:"
            if self.judges_quality
            else ""
        )
        return (
            f"{quality} {measure}. Modes whose intervals overlap are told apart by divergence, where its "
            "intervals do not overlap, and else by bytes; a mode that is not surely ahead of the reference "
            "is not preferred to it."
        ).strip()


def judge(case: Case) -> Verdict:
    """Names a mode only where this run establishes that it is ahead of the reference and not behind
    another."""
    passed, rejected = sift(case)
    tied = leaders(case, passed)
    base = next((row for row in tied if row.name == case.reference), None)
    is_open = len(tied) > 1 and (base is not None or not all(is_told(case, tied[0], row) for row in tied[1:]))
    chosen = None if is_open else closest(case, eligible(case, tied))
    for row in passed:
        if row not in tied:
            rejected[row.name] = behind(case, [*tied, *passed], row)
    names = [row.name for row in tied]
    can_deploy = chosen is not None and case.judges_quality
    if not tied:
        headline = f"No mode can be deployed from what was measured: {case.place}."
    elif not case.judges_quality:
        figure = DECIDING[case.figures[-1][0]]
        if len(names) == 1:
            found = f"{names[0]} is ahead in {figure}"
        elif len(tied) < len(passed):
            found = f"{listed(names)} are ahead in {figure}, and cannot be told apart"
        else:
            found = f"{listed(names)} cannot be told apart in {figure}"
        headline = (
            f"For {case.place}: {found}. The weights are random, so there is no verdict on quality, and none "
            "on what to deploy."
        )
    elif chosen is None:
        headline = (
            f"For {case.place}: nothing is established. Of what is good enough, this run cannot tell "
            f"{listed(names)} apart in speed."
        )
    else:
        headline = f"For {case.place}: deploy {chosen.name}."
    return Verdict(
        deploy=chosen.name if chosen and can_deploy else "",
        tied=names if len(names) > 1 else [],
        headline=headline,
        because=because(case, chosen, tied),
        costs=costs(case, chosen) if chosen else [],
        sureness=sureness(case, chosen),
        rejected=rejected,
        rule=case.rule,
    )


def sift(case: Case) -> tuple[list[Row], dict[str, str]]:
    """Modes that could be deployed, and why the others could not."""
    passed, rejected = [], {}
    for row in case.rows:
        if not row.ok:
            reason = row.error.splitlines()[0]
            rejected[row.name] = f"failed: {reason}" if row.status == "failed" else reason
        elif row.mode.server:
            rejected[row.name] = "another server: its speed is known, its quality is not"
        elif case.judges_quality and row.name != case.reference and (loss := too_lossy(case, row)):
            rejected[row.name] = loss
        else:
            passed.append(row)
    return passed, rejected


def too_lossy(case: Case, row: Row) -> str:
    """Why a mode's loss is not established to be within what is allowed; empty where it is."""
    found = row.quality.perplexity_ratio if row.quality else None
    if found is None:
        return "its quality was not measured against the reference"
    allowed = 1 + case.max_perplexity_rise
    if found.estimate > allowed:
        return f"perplexity {percent_of(found)}, more than the {100 * case.max_perplexity_rise:g} % allowed"
    if found.high is not None and found.high > allowed:
        most = f"{100 * case.max_perplexity_rise:g} %"
        return f"perplexity {percent_of(found)}: not surely within the {most} allowed"
    return ""


def leaders(case: Case, rows: Sequence[Row]) -> list[Row]:
    """Rows that no other is surely ahead of, by each deciding figure in turn; the highest first."""
    tied = list(rows)
    for figure, level in case.figures:
        known = [(found.estimate, row) for row in tied if (found := row.figure(figure, level))]
        if not known:
            continue
        best = max(known, key=lambda pair: pair[0])[1]
        ordered = [best, *(row for row in tied if row is not best)]
        # the highest may be too uncertain to be ahead of anybody, where another that is lower is
        tied = [row for row in ordered if not ahead_of(case, row, tied, figure, level)] or [best]
    return tied


def ahead_of(case: Case, row: Row, rows: Sequence[Row], figure: str, level: str) -> list[Row]:
    """Those of `rows` that are surely ahead of it."""
    return [
        other
        for other in rows
        if other is not row and effect(figure, case.ratio(other, row, figure, level)) == "better"
    ]


def eligible(case: Case, tied: Sequence[Row]) -> list[Row]:
    """Leaders that are themselves surely ahead of the reference, where it is none of them; all of them, where
    it is, or nobody knows its speed."""
    return [row for row in tied if is_faster(case, row)] or list(tied)


def is_told(case: Case, one: Row, other: Row) -> bool:
    """Is the difference of two modes known with an interval? Not from one repeat."""
    figure, level = case.figures[-1]
    found = case.ratio(one, other, figure, level)
    return found is not None and found.low is not None


def closest(case: Case, tied: Sequence[Row]) -> Row | None:
    """Of rows that speed cannot tell apart: the one surely nearest to the reference, else the smallest."""
    if len(tied) < 2:
        return tied[0] if tied else None
    if case.judges_quality:
        nearest = min(tied, key=lambda row: row.quality.kl_mean if row.quality else 0.0)
        if all(surely_nearer(nearest, row) for row in tied if row is not nearest):
            return nearest
    return min(tied, key=weight_bytes)


def surely_nearer(one: Row, other: Row) -> bool:
    """Are the intervals of divergence apart?"""
    mine, theirs = (row.quality.kl if row.quality else None for row in (one, other))
    if mine is None or theirs is None or mine.high is None or theirs.low is None:
        return False
    return mine.high < theirs.low


def behind(case: Case, rows: Sequence[Row], row: Row) -> str:
    """By which deciding figure, and how far, behind the first of `rows` that it is surely behind."""
    for figure, level in case.figures:
        for other in ahead_of(case, row, rows, figure, level)[:1]:
            found = case.ratio(row, other, figure, level)
            assert found is not None
            return f"{DECIDING[figure]} {percent_of(found)} against {other.name}"
    return f"behind {rows[0].name}"


def because(case: Case, chosen: Row | None, tied: Sequence[Row]) -> list[str]:
    """What speaks for it, each with its interval."""
    said = []
    if chosen is None:
        return undecided(case, tied)
    if chosen.name == case.reference:
        return [f"no mode within the allowed loss is surely faster than {case.reference}"]
    for figure, level in case.figures:
        found = chosen.ratio(figure, level)
        if found and effect(figure, found) == "better":
            said.append(
                f"{DECIDING[figure]} {percent_of(found)} against {case.reference} at {case.label(level)}"
            )
    for name, words in LATENCIES.items():
        found = chosen.ratio(name, case.latency_level)
        if found and effect(name, found) == "better":
            said.append(f"{words} {percent_of(found)} at {case.label(case.latency_level)}")
    said += freed(case, chosen)
    energy = chosen.ratio("joules_per_output_token", case.throughput_level)
    if energy and effect("joules_per_output_token", energy) == "better":
        said.append(f"joules per output token {percent_of(energy)}")
    others = [row for row in tied if row is not chosen]
    rivals = [row for row in eligible(case, tied) if row is not chosen]
    if rivals:
        is_nearer = case.judges_quality and all(surely_nearer(chosen, row) for row in rivals)
        ahead = f"is nearer to {case.reference}" if is_nearer else "has the fewest bytes"
        names = listed([row.name for row in rivals])
        said.append(f"{names} cannot be told from {chosen.name} in speed; {chosen.name} {ahead}")
    if unsure := [row.name for row in others if row not in rivals]:
        either = f"cannot be told from {chosen.name} in speed, and not from {case.reference} either"
        said.append(f"{listed(unsure)} {either}")
    return said


def is_faster(case: Case, row: Row) -> bool:
    """Surely ahead of the reference in a deciding figure."""
    return any(effect(figure, row.ratio(figure, level)) == "better" for figure, level in case.figures)


def undecided(case: Case, tied: Sequence[Row]) -> list[str]:
    """What is known of the modes between which nothing is established: bytes, what they buy and cost."""
    others = [row for row in tied if row.name != case.reference]
    said = []
    if 0 < len(others) < len(tied):
        said.append(
            f"no mode that is good enough is surely faster than {case.reference}, so that it may stay; the "
            "others would change:"
        )
    said += [traded for row in others if (traded := trade(case, row))]
    return said + (freed(case, min(others, key=weight_bytes)) if others else [])


def trade(case: Case, row: Row) -> str:
    """What is known of a mode whose speed is not: bytes, and what they cost."""
    base = next((other for other in case.rows if other.name == case.reference), None)
    parts = []
    if base and base.memory and row.memory:
        parts.append(f"weights {percent(row.memory.weight_bytes / base.memory.weight_bytes)}")
    if case.judges_quality and row.quality and row.quality.perplexity_ratio:
        parts.append(f"perplexity {percent_of(row.quality.perplexity_ratio)}")
    return f"{row.name}: {', '.join(parts)}" if parts else ""


def weight_bytes(row: Row) -> int:
    return row.memory.weight_bytes if row.memory else 0


def freed(case: Case, row: Row) -> list[str]:
    """What its bytes buy; exact, so it needs no interval."""
    bought = row.purchase
    if bought is None or bought.more_kv_tokens <= 0:
        return []
    frees = f"frees {bought.freed_bytes / 1e6:,.0f} MB of weights and " if bought.freed_bytes > 0 else ""
    return [
        f"{row.name} {frees}holds {bought.more_kv_tokens:,d} more tokens of KV cache, "
        f"{bought.more_requests:,d} more requests of this load, in the memory that {case.reference} takes"
    ]


def costs(case: Case, chosen: Row) -> list[str]:
    """What is surely lost against the reference."""
    if chosen.name == case.reference:
        return []
    said = []
    if case.judges_quality and (quality := chosen.quality):
        if quality.perplexity_ratio:
            allowed = f"{100 * case.max_perplexity_rise:g} % are allowed"
            said.append(f"perplexity {percent_of(quality.perplexity_ratio)}; {allowed}")
        said.append(
            f"KL {quality.kl_mean:.4f} nats a token; the same likeliest token in "
            f"{100 * quality.top1_agreement:.1f} %"
        )
        if quality.greedy:
            said.append(
                f"{100 * quality.greedy.same_share:.0f} % of greedy answers stay the same for "
                f"{quality.greedy.num_tokens} tokens{by_rounding(case)}"
            )
    for name, words in {SPEED: "tokens/s with one stream", **LATENCIES}.items():
        level = "closed-1" if name == SPEED else case.latency_level
        found = chosen.ratio(name, level)
        if found and effect(name, found) == "worse":
            said.append(f"{words} {percent_of(found)}")
    if chosen.loading and chosen.loading.quantize_seconds:
        said.append(f"{chosen.loading.quantize_seconds:.0f} s once, to make its checkpoint")
    return said


def by_rounding(case: Case) -> str:
    """How many answers of the reference itself part where its decode rounds otherwise than its prefill."""
    base = next((row for row in case.rows if row.name == case.reference), None)
    if base is None or base.quality is None or base.quality.greedy is None:
        return ""
    return f", of {case.reference}'s own, rounded another way, {100 * base.quality.greedy.same_share:.0f} %"


def bounds(case: Case, chosen: Row) -> list[str]:
    """The ends of the intervals that the choice rests on: what it gains at least, and costs at most."""
    said = []
    for figure, level in case.figures:
        gain = chosen.ratio(figure, level)
        if gain and gain.low is not None and effect(figure, gain) == "better":
            said.append(f"{DECIDING[figure]} at least {percent(gain.low)}")
    loss = chosen.quality.perplexity_ratio if case.judges_quality and chosen.quality else None
    if loss and loss.high is not None:
        said.append(f"perplexity at most {percent(loss.high)}")
    if chosen.name == case.reference or not said:
        return []
    return [f"against {case.reference}, each at {100 * CONFIDENCE:g} % confidence: {', '.join(said)}"]


def sureness(case: Case, chosen: Row | None) -> list[str]:
    """What the intervals can carry, and what would have to be measured to be surer."""
    repeats = max((row.num_repeats for row in case.rows), default=0)
    said = [
        *(bounds(case, chosen) if chosen else []),
        f"every figure is the mean of {repeats} engines" if repeats > 1 else "every figure is of one engine",
    ]
    said.append(case.null.said if case.null else "the null comparison was not measured")
    own = case.null.row.ratio(SPEED, case.throughput_level) if case.null else None
    if own is not None:
        said.append(f"the same weights measured twice differ in tokens/s by {percent_of(own)}")
        if own.excludes(1.0):
            said.append("that is more than chance: differences of that size are noise in this run")
    unresolved = [
        row.name
        for row in case.rows
        if row.ok and row.name != case.reference and not resolves(row.ratio(SPEED, case.throughput_level))
    ]
    if unresolved:
        said.append(
            f"a difference of {100 * RESOLUTION:g} % in tokens/s could be missed for {listed(unresolved)}: "
            "more `--repeats`, or a quieter machine, would tell"
        )
    if case.judges_quality and chosen and chosen.quality and chosen.quality.perplexity_ratio:
        said.append(
            f"quality is of {chosen.quality.tokens:,d} tokens of one text; yours may differ: `--text FILE`"
        )
    return said


def percent(ratio: float) -> str:
    """`+12.1 %`."""
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def percent_of(found: Interval) -> str:
    """A ratio in words: `+12.1 % (10.4 to 13.9)`."""
    if found.low is None or found.high is None:
        return f"{percent(found.estimate)} (one run)"
    ends = f"{100 * (found.low - 1):+.1f} to {100 * (found.high - 1):+.1f}".replace("-", "−")
    return f"{percent(found.estimate)} ({ends})"
