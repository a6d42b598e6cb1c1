"""Which of the paper's claims hold for a summary, which do not, what was asked beside them, and with which power."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynskip.evaluation.report import claims, findings
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.document import Table
from dynskip.evaluation.report.evidence import detectable, direction, holm, p_value
from dynskip.evaluation.report.figures import WEIGHTS
from dynskip.evaluation.report.numbers import number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, bounds, families_of, find, select

HOLDS, IN_PART, FAILS, OPEN, UNTESTED = "holds", "holds in part", "does not hold", "open", "untested"
BESIDE = "no claim of the paper"
# In the order of the table, and in words of how many claims.
_ORDER = {
    HOLDS: "hold",
    IN_PART: "hold in part",
    FAILS: "do not hold",
    OPEN: "are open, their interval too wide for either",
    UNTESTED: "are untested",
    BESIDE: "",
}
# By the reason's name in a summary what a comparison of controllers lacks.
_LACKS = {
    "beyond": "fixed input at as many layers",
    "alike": "fixed inputs that differ",
    "noise": "draws of the noise",
    "trainings": "trainings",
    "curves": "losses of the trainings",
    "rows": "rows trained on",
    "moving": "a validation loss that stands still",
}
_FEWER = "an oracle over depths matches full depth on fewer layers"
_AS_FEW = f"an oracle over depths matches full depth on {100 * paper.MATCHING_SHARE:.1f} % of the layers"
# Controls of the oracle, in words; those that know nothing of how deep a sequence has to go.
_CONTROLS = {
    "equal depth, greedy": "a choice among paths of one depth",
    "null": "noise alone",
    "cross-fitted": "an oracle that chose on another output",
}
_IGNORANT = ("equal depth, greedy", "null")
# The endings of metrics, and what they score by.
SCORES = (("", "ROUGE-L"), ("_nats", "log-likelihood"))
_MOST = 0.5  # a control that surely has more of a gain than this, and perhaps all, refutes that the gain is another's


@dataclass(frozen=True)
class Verdict:
    """What the paper claims, whether that holds here, and what was measured.

    seen: the true effect that 80 % of runs as large as this one would show, in the measure's unit.
    """

    claim: str
    verdict: str
    measured: str = ""
    seen: str = ""


def verdicts(summary: Summary) -> list[Verdict]:
    """Of each claim of the paper, in its order."""
    return [verdict for judge in _CLAIMS for verdict in judge(summary)]


def tally(summary: Summary) -> str:
    """How many claims of the paper have each verdict, and how to read `claims_table`."""
    found = [each.verdict for each in verdicts(summary)]
    counts = [f"{found.count(verdict)} {words}" for verdict, words in _ORDER.items() if words and verdict in found]
    counted = f"{', '.join(counts[:-1])} and {counts[-1]}" if len(counts) > 1 else counts[0]
    return (
        f"Of {len(found) - found.count(BESIDE)} claims of the paper {counted}. What is seen from a size on is seen by "
        "80 % of runs as large as this one."
    )


def claims_table(summary: Summary) -> Table:
    """All verdicts, those that hold first."""
    order = list(_ORDER)
    rows = sorted(verdicts(summary), key=lambda each: order.index(each.verdict))
    return Table(
        "The paper's claims",
        ("claim", "here", "measured", "seen from"),
        [(each.claim, each.verdict, each.measured or "–", each.seen or "–") for each in rows],
    )


def _section(summary: Summary, name: str) -> Row:
    section: Row = summary.get(name) or {}
    return section


def _seen(row: Row, text: Callable[[float], str]) -> str:
    size = detectable(row)
    return "" if size is None else text(size)


def _share(value: float) -> str:
    return f"{number(100 * value, 1)} %"


def _where(words: Mapping[int, str], rows: Sequence[Row], signs: Sequence[int]) -> str:
    """By sign at how many layers the rows have it; the layers alone where all have one."""
    at = {sign: [str(row["budget"]) for row, own in zip(rows, signs, strict=True) if own == sign] for sign in words}
    told = [(word, ", ".join(at[sign])) for sign, word in words.items() if at[sign]]
    return f"at {told[0][1]}" if len(told) == 1 else ", ".join(f"{word} at {budgets}" for word, budgets in told)


def _of_all(signs: Sequence[int], claimed: int) -> str:
    """The verdict on a claim that each of ``signs`` is ``claimed``."""
    if claimed in signs:
        return HOLDS if set(signs) == {claimed} else IN_PART
    return FAILS if -claimed in signs else OPEN


def _hidden_states(summary: Summary) -> list[Verdict]:
    section = _section(summary, "hidden_states")
    weights = claims.never_skipped(section)
    found = []
    for strategy, name in (("uls", "uniform"), ("rls", "random")):
        rows = select(section, metric="cosine_final", weights=weights, strategy=f"{strategy} - exit")
        rows = sorted((row for row in rows if bounds(row) is not None), key=lambda row: int(row["budget"]))
        claim = f"{name} skipping ends closer to the full model than early exit"
        if weights is None or not rows:
            if strategy == "uls":
                found.append(Verdict(f"{claim}, of weights never trained to skip", UNTESTED))
            continue
        signs = [direction(row) for row in rows]
        where = _where({1: "closer", -1: "farther", 0: "open"}, rows, signs)
        measured = f"{where} layers; {signed(rows[0])} in cosine at {rows[0]['budget']}"
        verdict = _of_all(signs, 1) if strategy == "uls" else BESIDE  # the paper's figure has no random skipping
        found.append(Verdict(f"{claim}, of {WEIGHTS[weights]}", verdict, measured, _seen(rows[0], number)))
    return found


def _static(summary: Summary) -> list[Verdict]:
    section, num_layers = _section(summary, "static"), summary["conditions"].get("num_layers")
    claim = "each static path of fewer layers scores less than full depth"
    found = findings.losses(section, num_layers)
    if found is None:
        return [Verdict(claim, UNTESTED), *([_siblings(summary)] if _section(summary, "siblings").get("rows") else [])]
    deepest, unit = found.rows[-1], "nats a token" if found.by_nats else "ROUGE-L"
    where = _where({-1: "less", 1: "more", 0: "open"}, found.rows, found.signs)
    seen = _seen(deepest, lambda size: number(size, 4))
    told = Verdict(
        claim,
        _of_all(found.signs, -1),
        f"{where} layers; {signed(deepest, 4)} {unit} at {deepest['budget']}",
        seen,
    )
    return [told] if found.family == "siblings" else [told, _siblings(summary)]


def _siblings(summary: Summary) -> Verdict:
    """The paper's protocol where it was run on its own: the same claim of weights tuned for one budget each."""
    claim, num_layers = "weights tuned for one budget each lose to full depth", summary["conditions"].get("num_layers")
    found = findings.losses(_section(summary, "siblings"), num_layers)
    if found is None:
        return Verdict(f"{claim}, the paper's protocol", UNTESTED, "not run")
    deepest = found.rows[-1]
    where = _where({-1: "less", 1: "more", 0: "open"}, found.rows, found.signs)
    measured = f"{where} layers; {signed(deepest, 4)} nats a token at {deepest['budget']}"
    seen = _seen(deepest, lambda size: number(size, 4))
    return Verdict(f"{claim}, the paper's protocol, as far as it was run", _of_all(found.signs, -1), measured, seen)


def _controllers(summary: Summary) -> list[Verdict]:
    claim = "fixed-input controllers choose layers as well as those that read hidden states"
    found = findings.AgainstFixed(_section(summary, "controllers"))
    if found.row is None:
        return [Verdict(claim, UNTESTED)]
    unit, margin = ("nats a token", "margin_nats") if found.by_nats else ("ROUGE-L", "margin_rouge_l")
    ends, size = bounds(found.row), summary["conditions"].get(margin)
    within = ends is not None and size is not None and ends[1] < size
    verdict = {
        "better": FAILS,
        "worse": HOLDS,
        "open": HOLDS if within else OPEN,
        "untested": UNTESTED,
    }[found.verdict]
    lacks = [_LACKS.get(name, name) for name in found.reasons] if found.verdict == "untested" else []
    why = f"; lacking: {', '.join(lacks)}" if lacks else ""
    at = f" at {number(found.row['layers'], 1)} layers" if "layers" in found.row else ""
    at += " by likelier decisions, where the paper's are sampled" if found.row.get("choice") == "argmax" else ""
    among = f", the clearest of {found.num_all} comparisons, {found.num} of them tested" if found.num_all > 1 else ""
    moved = f"; {findings.still_moving(found.row)}" if findings.still_moving(found.row) else ""
    seen = _seen(found.row, lambda effect: number(effect, 4))
    measured = f"hidden states gain {signed(found.row, 4)} {unit}{at}{among}{moved}{why}"
    return [Verdict(claim, verdict, measured, seen)]


def _oracle(summary: Summary) -> list[Verdict]:
    """By either score: how much an oracle could choose by differs between them."""
    section, found = _section(summary, "oracle"), []
    for suffix, score in SCORES:
        family = next(iter(families_of(section, metric=f"mean{suffix}")), None)
        if family is not None:
            found += _matched(section, summary["conditions"]["num_layers"], family, suffix, score)
    return found or [Verdict(_FEWER, UNTESTED), Verdict(_AS_FEW, UNTESTED, _noise())]


def _noise() -> str:
    return f"noise on the paper's own means does on {_share(claims.paper_null().matching_share)}"


def _matched(section: Row, num_layers: int, family: str, suffix: str, score: str) -> list[Verdict]:
    """Whether it matches full depth; in part, where what knows nothing of depths does so, too."""
    cheapest = min(row["budget"] for row in select(section, metric=f"mean{suffix}", family=family)) / num_layers
    floor = f"the cheapest path has {_share(cheapest)}; {_noise()}"
    fewer, as_few = f"{_FEWER}, in {score}", f"{_AS_FEW}, in {score}"
    row = find(section, metric=f"matching_share{suffix}", family=family, control="oracle")
    ends = None if row is None else bounds(row)
    if row is None or ends is None:
        return [Verdict(fewer, FAILS, "at no budget"), Verdict(as_few, FAILS, floor)]
    controls = _controls(section, family, suffix)
    is_matched = any(control["control"] in _IGNORANT and control["value"] is not None for control in controls)
    told = "".join(
        f", {_CONTROLS[each['control']]} {'at no budget' if each['value'] is None else f'on {percent(each, 1)}'}"
        for each in controls
    )
    measured = f"on {percent(row, 1)}{told.replace(',', ';', 1)}"
    reached = HOLDS if ends[0] <= paper.MATCHING_SHARE else FAILS
    return [
        Verdict(fewer, OPEN if ends[1] >= 1 else IN_PART if is_matched else HOLDS, measured, _seen(row, _share)),
        Verdict(as_few, UNTESTED if cheapest > paper.MATCHING_SHARE else reached, floor),
    ]


def _controls(section: Row, family: str, suffix: str) -> list[Row]:
    """On how many layers they match full depth; without a value where most resamples reach it at no budget."""
    rows = [row for row in section["rows"] if row["metric"] == f"matching_share{suffix}"]
    return [row for row in rows if row.get("family") == family and row.get("control") in _CONTROLS]


def _equal_depth(summary: Summary) -> list[Verdict]:
    claim = "the oracle's gain comes of depth"
    section, found = _section(summary, "oracle"), []
    for row in findings.equal_depth(section):
        low, high = bounds(row) or (0.0, 1.0)
        if low <= 0:
            verdict = OPEN if high >= 1 else HOLDS
        elif high < 1:
            verdict = IN_PART
        else:
            verdict = FAILS if low > _MOST else OPEN
        score = "log-likelihood" if row["metric"].endswith("_nats") else "ROUGE-L"
        rows = select(section, metric=row["metric"], family=row["family"], control=row["control"])
        shares = ", ".join(f"{percent(each)} of it at a mean of {each['at']:g} layers" for each in rows)
        per_token = find(section, metric=row["metric"], family=row["family"], control="equal depth per token")
        tokens = "" if per_token is None else f"; among as many for each token {percent(per_token)}"
        measured = f"a choice among as many {findings.paths_of_one_depth(row)} has {shares}{tokens}"
        found.append(Verdict(f"{claim}, in {score}", verdict, measured, _seen(row, _share)))
    return found or [Verdict(claim, UNTESTED, "no control of one depth")]


def _router(summary: Summary) -> list[Verdict]:
    claim = "whether what reads the prompt alone can stand in for the oracle"
    best = findings.best_router(_section(summary, "router"))
    if best is None:
        return [Verdict(claim, UNTESTED)]
    told = f"the best of {best.num} routers captures {percent(best.row)} of its gain"
    return [Verdict(claim, BESIDE, told, _seen(best.row, _share))]


def _length(summary: Summary) -> list[Verdict]:
    """By either score: the depths that it chooses need not be alike."""
    section, found = _section(summary, "depth"), []
    claim = "the depth that the oracle chooses does not follow the response's length"
    for suffix, score in SCORES:
        rows = select(section, metric=f"pearson{suffix}", feature="response_length")
        known = [row for row in rows if bounds(row) is not None]
        if not known:
            continue
        adjusted = holm([1.0 if (p := p_value(row)) is None else p for row in known])
        row, p = min(zip(known, adjusted, strict=True), key=lambda pair: pair[1])
        small = all(max(map(abs, bounds(each) or (1.0,))) < claims.SMALL_CORRELATION for each in known)
        low, high = paper.DEPTH_LENGTH_PEARSON
        measured = f"Pearson's r {signed(row)}; the paper's is in [{number(low)}, {number(high)}]"
        verdict = FAILS if p < 0.05 else HOLDS if small else OPEN
        found.append(Verdict(f"{claim}, in {score}", verdict, measured, _seen(row, number)))
    return found or [Verdict(claim, UNTESTED)]


_CLAIMS: tuple[Callable[[Summary], list[Verdict]], ...] = (
    _hidden_states,
    _static,
    _controllers,
    _oracle,
    _equal_depth,
    _router,
    _length,
)
