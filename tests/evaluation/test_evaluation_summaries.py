"""Sections of setups whose siblings are not those of the paper: no sentence may lean on a budget that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_models import tiny_setup
from made_up_results import made_up_setup, summary_of

from dynskip.evaluation.registry import EXPERIMENTS, section_name
from dynskip.evaluation.report.evidence import ceiling
from dynskip.evaluation.report.numbers import percent
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.run_folder import RunFolder
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.generations import generate_items

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install dynskip[eval]")

# The others say nothing where no controllers, or no siblings with full depth, were given.
ALWAYS = [name for name in EXPERIMENTS if name not in ("controllers", "siblings")]
OWN_WEIGHTS = "With weights of their own per budget, "


def rows_of(section: dict[str, Any], **labels: Any) -> list[dict[str, Any]]:
    return [row for row in section["rows"] if all(row.get(name) == value for name, value in labels.items())]


def told_of(section: dict[str, Any], name: str) -> list[str]:
    name = section_name(name)
    return section_sentences({"conditions": {"num_layers": 24}, name: section}, name)


@pytest.mark.parametrize(
    ("siblings", "at", "place"), [((4, 8, 12, 24), 8, "third"), ((8, 24), 12, "half"), ((12, 24), 24, "full")]
)
def test_the_oracles_sentences_name_budgets_that_the_family_has(
    siblings: tuple[int, ...], at: int, place: str, tmp_path: Path
) -> None:
    section = summary_of(made_up_setup(siblings), "oracle", tmp_path)
    told = [text for text in told_of(section, "oracle") if text.startswith(OWN_WEIGHTS)]
    (share,) = rows_of(section, family="siblings", metric="surviving_share", control="cross-fitted", place=place)
    survives = f"{percent(share, 1)} of the oracle's gain on one draw survives at a mean of {at} layers"
    kept = f"a choice by expected scores would then keep {percent(ceiling(share))} of it"
    assert all(any(part in text for text in told) for part in (survives, kept))
    # Budgets that leave nothing to choose are no rows: what survives of nothing is not a number.
    assert all(row["at"] > min(siblings) for row in rows_of(section, family="siblings", metric="gain"))
    assert all(row["value"] is not None for row in rows_of(section, metric="surviving_share"))


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("siblings", [(24,), (16, 24), (4, 8)])
def test_any_siblings_make_every_section(name: str, siblings: tuple[int, ...], tmp_path: Path) -> None:
    section = summary_of(made_up_setup(siblings, budgets=(4, 16)), name, tmp_path)
    assert section["rows"] and told_of(section, name)
    families = {row["family"] for row in section["rows"] if "family" in row}
    alone = siblings == (16, 24)  # full depth is all that the oracle may choose: no choice
    if name in ("oracle", "router", "depth"):
        assert families == ({"paths", "siblings"} if siblings == (4, 8) else {"paths"})
        assert ("siblings: left out, only one of its budgets is among the candidates." in section["notes"]) == alone


@pytest.mark.parametrize(("name", "label"), [("static", "budget"), ("oracle", "mix"), ("router", "predictor")])
def test_what_is_timed_says_what_it_saves(name: str, label: str, tmp_path: Path) -> None:
    section = summary_of(made_up_setup((4, 24)), name, tmp_path)
    savings = rows_of(section, metric="ms_saved")
    assert savings and all(row["low"] <= row["value"] <= row["high"] for row in savings)
    for row in savings:
        labels = {name: row[name] for name in ("family", label, "at") if name in row}
        (own,) = rows_of(section, metric="ms_per_token", **labels)
        # A full pass takes 2.01 ms in the made-up rounds, and every round grows by as much.
        assert row["value"] == pytest.approx(2.01 - own["value"], abs=1e-6)
        if name == "oracle" and row["family"] == "paths":
            path = {"4": "uniform:4", "8": "uniform:8", "12": "uniform:12", "24": "full"}.get(row["mix"])
            assert row["path"] == own["path"] == path


def test_the_routers_answer_is_a_share_with_its_interval(tmp_path: Path) -> None:
    section = summary_of(made_up_setup((4, 24)), "router", tmp_path)
    told = "\n".join(told_of(section, "router"))
    for family in ("siblings", "paths"):
        shares = {
            (row["predictor"], row["at"]): row for row in rows_of(section, metric="captured_share", family=family)
        }
        # One path for all is its own random assignment: it has no share, and is not the best even where others lose.
        gains = {key: rows_of(section, metric="gain", family=family, predictor=key[0], at=key[1])[0] for key in shares}
        best = max(gains, key=lambda key: gains[key]["value"])
        assert f"{best[0]} at a budget of {best[1]:g}, captures {percent(shares[best])} of the oracle's gain." in told


def test_a_run_that_says_its_draws_may_grow(tmp_path: Path) -> None:
    four, six = tiny_setup(tmp_path), tiny_setup(tmp_path, draws=6)
    assert [list(setup.sample_seeds) for setup in (four, six)] == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    more = tiny_setup(tmp_path, draws=6, prompts=20)
    assert more.guarded() == six.guarded()
    few, many = (set(generate_items(setup, setup.checkpoint, ["full"])) for setup in (six, more))
    assert few < many, "12 prompts are 3 shards of 4, whole ones of the longer run"
    for first, second in ((four, six), (six, four)):
        RunFolder(tmp_path / f"run-{first.draws}", first).close()
        with pytest.raises(ValueError, match=r"eval: the setup must be that of the run in .* the run has prompts"):
            RunFolder(tmp_path / f"run-{first.draws}", second)


def test_more_candidates_than_draws_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        setup = made_up_setup(candidates=(4, 8, 12, 16))
        with pytest.raises(ValueError, match="candidates must be at most the 4 draws of each prompt, got 5 with the"):
            EXPERIMENTS["oracle"].plan(setup, store)
        assert EXPERIMENTS["oracle"].plan(made_up_setup(candidates=(4, 8, 12, 16), seeds=2), store)


@pytest.mark.parametrize("name", ["budgets", "candidates"])
def test_budgets_that_leave_nothing_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"eval: {name} must hold a budget below the 24 layers of the model, got 24"):
        made_up_setup(**{name: (24,)})
