"""The report in short: a sentence for each question, each with one number, the strongest evidence first."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from dynskip.evaluation.report import claims, sentences
from dynskip.evaluation.report.evidence import detectable, direction, negated
from dynskip.evaluation.report.figures import FAMILIES
from dynskip.evaluation.report.numbers import interval, number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, distinct, families_of, find, select


def in_short(summary: Summary) -> list[str]:
    """The sentences, for those sections that the summary has."""
    told: list[tuple[str, Callable[[Row, Summary], list[str]]]] = [
        ("oracle", lambda section, summary: [sentences.paper_null()]),
        ("oracle", _floor),
        ("oracle", _surviving),
        ("oracle", lambda section, summary: sentences.oracle_in_nats(section)[:1]),
        ("router", _router),
        ("router", lambda section, summary: sentences.router_in_nats(section)[:1]),
        ("controllers", _controllers),
        ("hidden_states", _hidden_states),
        ("static", _loss),
        ("static", _loss_in_nats),
        ("depth", _depth),
        ("static", _time),
    ]
    present = [(name, tell) for name, tell in told if (summary.get(name) or {}).get("rows")]
    return [text for name, tell in present for text in tell(summary[name], summary)]


def _floor(section: Row, summary: Summary) -> list[str]:
    found = [(family, claims.floor(summary, family)) for family in families_of(section, metric="mean")]
    known = [(family, floor) for family, floor in found if floor is not None]
    if not found:
        return []
    if not known:
        return ["Here the oracle matches full depth at no budget."]
    family, floor = max(known, key=lambda pair: float(pair[1].matching["value"]))
    where = "near" if floor.near else "above"
    return [
        f"Here, with {FAMILIES.get(family, family)}, the oracle matches full depth at "
        f"{number(floor.matching['value'], 1)} of {floor.num_layers} layers, {where} the floor of "
        f"{floor.cheapest}, the cheapest path."
    ]


def _surviving(section: Row, summary: Summary) -> list[str]:
    lines = []
    for family in families_of(section):
        found = claims.surviving(section, family)
        if found is None:
            continue
        of = f"With {FAMILIES.get(family, family)}, a choice by expected scores"
        if found.none_known:
            lines.append(
                f"{of} need not keep anything of the oracle's gain: its ceiling is {percent(found.ceiling)} of it."
            )
        else:
            lines.append(f"{of} would keep {percent(found.ceiling)} of the oracle's gain.")
    return lines


def _router(section: Row, summary: Summary) -> list[str]:
    found = [claims.Routers(section, family) for family in families_of(section, metric="gain")]
    sizes = [size for each in found for row in each.shares if (size := detectable(row)) is not None]
    num_routers, above = sum(len(each.gains) for each in found), sum(each.above for each in found)
    if not num_routers:
        return []
    if above:
        return [f"{above} of {num_routers} prompt-only routers gain something, with uncorrected intervals."]
    if not sizes:
        return [f"None of {num_routers} prompt-only routers is seen to gain anything."]
    return [
        f"No prompt-only router is seen to gain anything; half of them could not have shown a share under "
        f"{percent({'value': median(sizes)})} of the oracle's gain (80 % power)."
    ]


def _controllers(section: Row, summary: Summary) -> list[str]:
    found = claims.Controllers(section)
    if found.recipes:
        return sentences.controllers(section, summary)[:1]
    if found.verdict == "tested":
        return sentences.controllers(section, summary)
    why = (
        f": {len(found.beyond)} of {len(found.names)} comparisons lie beyond the layers that their baseline reaches"
        if found.beyond
        else ""
    )
    return [f"Whether hidden states help to choose layers is **untested**{why}."]


def _hidden_states(section: Row, summary: Summary) -> list[str]:
    found = claims.Strategies(summary, distinct(select(section), "weights")[0])
    if not found.uniform:
        return []
    first = min(found.uniform)
    words = {1: "closer to the full model", -1: "farther from the full model", 0: "as far from the full model"}
    ends = words[direction(found.uniform[first])]
    random = {-1: "farther", 1: "closer", 0: "as far"}[found.random.get(first, 0)]
    along = not_along = ""
    if found.trained is not None:
        along, not_along = ", along which the weights were trained,", ", along which they were not"
    lines = [
        f"Uniform skipping{along} ends {ends} than early exit{not_along}: {signed(found.uniform[first])} in cosine at "
        f"{first} layers; random skipping ends {random}, and whether skipping as such does is **untested**."
    ]
    turned = {
        budget: row for budget, row in found.uniform.items() if direction(row) * direction(found.uniform[first]) < 0
    }
    if turned:
        deepest = max(turned)
        lines.append(
            f"At {deepest} layers uniform skipping ends {words[direction(turned[deepest])]} than early exit: "
            f"{signed(turned[deepest])}."
        )
    behind = [budget for budget, sign in found.random_first.items() if sign < 0]
    if behind:
        lines.append(
            f"At {max(behind)} layers random skipping that keeps layer 0 ends farther from the full model than early "
            f"exit, too: a cosine of {interval(found.first[max(behind)])} to {interval(found.exit[max(behind)])}."
        )
    return lines


def _loss(section: Row, summary: Summary) -> list[str]:
    lines = []
    for family in [name for name in families_of(section) if name != "untuned"]:
        rows = select(section, metric="rouge_l - full", family=family)
        if len(rows) < 2:
            continue
        first = min(rows, key=lambda row: row["budget"])
        told = {-1: "lower", 1: "higher", 0: "not told apart"}[direction(first)]
        than = "than" if direction(first) else "from that"
        lines.append(
            f"With {FAMILIES.get(family, family)}, ROUGE-L at {first['budget']} layers is {told} {than} at full depth: "
            f"{signed(first, 4)}."
        )
    return lines


def _loss_in_nats(section: Row, summary: Summary) -> list[str]:
    """Where nothing was generated: what is lost along the paths, what tuning changes, which rule loses least."""
    if select(section, metric="rouge_l"):
        return []
    losses = sentences.losses_in_nats(section, summary["conditions"].get("num_layers"))
    return [*losses[:1], *sentences.tuning(section), *sentences.rules(section)[-1:]]


def _depth(section: Row, summary: Summary) -> list[str]:
    found = claims.Correlations(section)
    if not found.rows:
        return []
    if not found.ties:
        return [
            f"{len(found.kept)} of {len(found.rows)} correlations of the oracle's depth stay after the correction by "
            f"{found.correction}, ties left out."
        ]
    return [
        f"{len(found.kept)} of {len(found.rows)} correlations of the oracle's depth stay after Holm's correction; how "
        "much of them ties make is **untested**."
    ]


def _time(section: Row, summary: Summary) -> list[str]:
    saved = select(section, metric="ms_saved")
    if not saved:
        return []
    first = min(saved, key=lambda row: row["budget"])
    full = find(section, metric="ms_per_token", family=first["family"], budget=summary["conditions"].get("num_layers"))
    of = "" if full is None else f" of {number(full['value'])}"
    if first["value"] < 0:
        return [f"A token at {first['budget']} layers costs {interval(negated(first))} ms more{of}."]
    return [f"A token at {first['budget']} layers saves {interval(first)}{of} ms in a batch of {first.get('batch')}."]
