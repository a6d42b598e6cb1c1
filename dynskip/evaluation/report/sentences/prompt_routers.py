"""What routers that see the prompt alone say."""

from __future__ import annotations

from statistics import median

from dynskip.evaluation.report import claims
from dynskip.evaluation.report.evidence import detectable
from dynskip.evaluation.report.figures import FAMILIES
from dynskip.evaluation.report.numbers import number, percent, signed
from dynskip.evaluation.report.oracle_figures import READS
from dynskip.evaluation.report.rows import Row, Summary, families_of


def router(section: Row, summary: Summary) -> list[str]:
    """How many routers gain, how many choose at all, and which share they could have shown."""
    lines = []
    for family in families_of(section, metric="gain"):
        found = claims.Routers(section, family)
        of = f"With {FAMILIES.get(family, family)}"
        lines.append(
            f"{of}, {found.above} of {len(found.gains)} prompt-only routers gain more than random assignment of the "
            f"same depths with an interval above zero; {found.num_shallow} run at most {claims.SAME_DEPTH:g} layers "
            "more than the shallowest, and so choose next to nothing."
        )
        if len(found.shares) < len(found.gains):
            lines.append(
                f"{of}, {len(found.gains) - len(found.shares)} of them leave no share to capture, and are in no figure."
            )
        seen = [size for row in found.shares if (size := detectable(row)) is not None]
        if seen:
            lines.append(
                f"{of}, the median router that has a share could have shown {percent({'value': median(seen)})} of the "
                f"oracle's gain (80 % power)."
            )
        if found.best is not None:
            lines.append(
                f"{of}, the one that gains most (picked as such, so its share flatters it), {found.best['predictor']} "
                f"at a budget of {found.best['at']:g}, captures {percent(found.best)} of the oracle's gain."
            )
    return lines + router_in_nats(section)


def router_in_nats(section: Row) -> list[str]:
    """By log-likelihood: the routers that learned from most prompts, the one that gains most, and the cascade."""
    lines = []
    for family in families_of(section, metric="captured_share_nats"):
        found = claims.RoutersInNats(section, family)
        if found.best is not None:
            lines.append(
                f"By log-likelihood, with {FAMILIES.get(family, family)}, {found.above} of {len(found.shares)} routers "
                f"that learned from {found.size:,} prompts capture a share of the oracle's gain above zero after "
                f"control of false discoveries; the one that captures most (picked as such, so its share flatters it), "
                f"{found.best['predictor']} on {_read(found.best)}, captures {percent(found.best)} of it and "
                f"gains {signed(found.over_static)} nats a token over the best mix of fixed depths."
            )
        if found.shares:
            lines.append(_more_prompts(found, family))
        if found.cascade is not None:
            lines.append(
                "A cascade, the shallowest path first and full depth where it is unsure, captures "
                f"{percent(found.cascade)}."
            )
    return lines


def _read(row: Row) -> str:
    return str(READS.get(row["features"], row["features"]))


def _more_prompts(found: claims.RoutersInNats, family: str) -> str:
    """Whether routers capture more once they have learned from more prompts, and which change would have been seen."""
    of = f"with {FAMILIES.get(family, family)}"
    if not found.more_prompts:
        return (
            f"Whether more prompts to learn from help is **untested** {of}: the run has no paired "
            "comparison of shares at two numbers of them."
        )
    fewest = min(row["fewest"] for row in found.more_prompts)
    most = max(found.more_prompts, key=lambda row: abs(row["value"]))
    seen = [size for row in found.more_prompts if (size := detectable(row)) is not None]
    power = f"; the median router could have shown a change of {number(median(seen))} (80 % power)" if seen else ""
    return (
        f"From {fewest:,} to {found.size:,} prompts learned from, {of}, the share that a router captures moves for "
        f"{len(found.moved) or 'none'} of {len(found.more_prompts)} after control of false discoveries; it moves most "
        f"for {most['predictor']} on {_read(most)}, by {signed(most)} of the "
        f"oracle's gain{power}."
    )
