"""What `bench/drafts.py` measures: every row at tiny shapes, weights scaled to an acceptance, rows kept one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from models import cpu_backend
from streams import guess_three

from bench import drafts
from bench.report.drafts import in_short, key_table, page
from bench.speculation.beside_transformers import TransformersDrafts
from bench.speculation.cells import Cell, mini_cells, random_cells, transformers_cells
from bench.speculation.predicted import predicted_gain
from bench.speculation.scaled import Scaled, measured_agreements
from dynskip import CausalLM, LayerPath
from dynskip.costs.layer_costs import Curve, LayerCosts
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.drafting import _LEARNT, Drafting, forget_acceptance
from dynskip.measure.agreement import Gate, NearTies
from dynskip.measure.machine import describe
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.hf_model import only_layers
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import Candidate, DraftLengths

SHAPE = drafts.QUICK_SHAPES["transformers"]


@pytest.fixture
def hf_model() -> Any:
    return random_hf_model(hf_config(SHAPE), dtype=torch.float32)


def prompts(count: int) -> list[list[int]]:
    return drafts._random_prompts(count, SHAPE.vocab_size)


# What is measured


def test_rows_cover_acceptances_batches_and_streams() -> None:
    cells = [*random_cells(24), *mini_cells(), *transformers_cells(16)]
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for wanted in (0.6, 0.7, 0.8, 0.9, 0.0):
        own = [cell for cell in cells if cell.part == "random" and cell.wanted == wanted]
        assert {1, 4, 64} <= {cell.batch for cell in own if not cell.is_stream}
        assert any(cell.is_stream for cell in own)
    targets = {cell.name: cell.target for cell in cells}
    assert targets["random-0.8-none-1"] == targets["random-0.8-all-1"] == 1.4
    assert (targets["random-0.8-none-4"], targets["random-0.8-all-8"], targets["mini-own-4"]) == (1.25, 1.12, 1.0)
    assert targets["random-0-none-1-cold"] == targets["mini-own-4-cold"] == 0.98
    assert targets["random-0-none-64"] == targets["random-0.8-none-4-stream"] == targets["mini-path-1"] == 0.98


def test_outputs_of_a_stream_end_at_different_times() -> None:
    draft = Draft(LayerPath.full(4))
    assert Cell("random", "none", draft, 4, 8, 32, 0.0).output_lens() == [32, 24, 16, 8] * 2
    assert Cell("random", "none", draft, 1, 3, 32, 0.0).output_lens() == [32] * 3
    assert Cell("random", "none", draft, 4, 4, 32, 0.0).output_lens() == [32] * 4


def test_rows_are_chosen_by_pattern() -> None:
    names = [cell.name for cell in drafts.select(random_cells(24), ["random-0-*-16*", "random-0.9-none-1"])]
    assert names == ["random-0-none-16", "random-0-none-16-stream", "random-0.9-none-1"]


# Weights that agree as often as wanted


@pytest.mark.parametrize("wanted", [0.8, 0.0])
def test_weights_are_scaled_until_the_draft_agrees_as_often(hf_model: Any, wanted: float) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    draft = Draft(LayerPath.early_exit(8, 2), "path")
    before = fmean(measured_agreements(model, draft, prompts(4), 16))
    factor, rates = Scaled(model).seek(draft, wanted, prompts(4), 16)
    assert len(rates) == 4 and abs(fmean(rates) - wanted) < 0.1 and before < 0.5
    assert rates == measured_agreements(model, draft, prompts(4), 16), "the model is left at the factor it returns"
    assert (factor < 1) == (wanted == 0.8)


def test_both_models_have_the_weights_of_one_factor(hf_model: Any) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    scaled = Scaled(model)
    scaled.scale([0, 1], 0.5)
    scaled.scale([0, 1], 0.125)
    theirs = TransformersDrafts(hf_model, 2)
    theirs.scale(0.125)
    ids = torch.tensor(prompts(2))
    for path in (LayerPath.full(8), LayerPath.early_exit(8, 2)):
        with torch.no_grad(), only_layers(hf_model, path):
            expected = hf_model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, paths=path).logits, expected, rtol=1e-4, atol=1e-4)


def test_agreement_of_entries_that_a_pass_does_not_make_is_refused(hf_model: Any) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    with pytest.raises(AssertionError, match="reads entries of its own"):
        measured_agreements(model, Draft(LayerPath.of(8, [0, 2]), "path"), prompts(1), 4)


def test_what_other_weights_have_shown_is_forgotten(hf_model: Any) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    forget_acceptance(model)  # of which nothing is known
    cell = Cell("random", "all", Draft(LayerPath.early_exit(8, 2), "path"), 1, 1, 12, 0.0)
    _, _, engine = drafts.run(model, drafts.known_costs(model), cell, prompts(1), cell.draft)
    engine.execution.drafting.acceptance._pairs[LayerPath.full(8), cell.draft] = object()  # type: ignore[assignment]
    forget_acceptance(model)
    _, _, engine = drafts.run(model, drafts.known_costs(model), cell, prompts(1), None)
    assert not engine.execution.drafting.acceptance._pairs


# What is predicted


def test_a_run_is_predicted_with_its_ragged_end(hf_model: Any) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    # A layer and the head take a millisecond each, whatever the rows.
    flat = Curve((1, 2), (1.0, 1.0))
    costs = StepCosts(8, LayerCosts(flat, flat, 0.0), LayerCosts(flat, flat, 0.0))
    draft = Draft(LayerPath.early_exit(8, 2), "path")

    def gain(batch: int, rates: list[float], num_requests: int, num_tokens: int = 145) -> float:
        return predicted_gain(model, costs, Cell("random", "all", draft, batch, num_requests, num_tokens), rates, 32)

    # Nine tokens for eight guesses of three milliseconds and a step of nine, or of seven behind the draft's layers.
    assert 9 * 9 / (8 * 3 + 9) * 0.9 < gain(1, [1.0], 1, num_tokens=2001) < 9 * 9 / (8 * 3 + 7)
    assert gain(1, [0.0], 1) == 1.0
    alone, together = gain(1, [0.7], 4), gain(4, [0.7], 4)
    assert 1.0 < together < alone, "a closed batch ends with its slowest sequence"
    assert gain(4, [0.9, 0.5], 4) < together, "the more so the more they differ"

    learnt = DraftLengths(costs, 48)
    path = LayerPath.full(8)
    cell = Cell("random", "all", draft, 1, 1, 2001)
    for _ in range(40):  # plain steps take twice as long as costs say, guesses three and verifications four times
        none, some = (learnt.of_lengths([Candidate(path, draft, 1.0, 8)], (), [length]) for length in (0, 8))
        learnt.observe(none, 1, 0.0, 2 * none.verify_ms)
        learnt.observe(some, 1, 3 * some.guess_ms, 4 * some.verify_ms)
    before = learnt.ratios(1)
    slower = predicted_gain(model, costs, cell, [1.0], 32, learnt)
    assert slower == pytest.approx(9 * 9 / (8 * 3 * before.guess + 9 * before.verify), rel=0.1)
    assert learnt.ratios(1) == before, "an engine's own are not changed"


# transformers beside it


def test_transformers_guesses_along_the_first_layers_and_is_counted(hf_model: Any) -> None:
    theirs = TransformersDrafts(hf_model, 2)
    theirs.scale(0.125)
    prompt = prompts(1)[0]
    plain = theirs.generate(prompt, 12, None)
    with theirs.counting() as counted:
        assert theirs.generate(prompt, 12, 3) == plain
    assert len(plain) == 12
    assert counted.num_drafted <= 3 * counted.num_verifications
    assert 0 < counted.num_accepted <= counted.num_looked_at <= counted.num_drafted
    assert counted.num_accepted + counted.num_verifications >= 12, "each gives one token more"
    model = CausalLM.from_hf(hf_model, backend="torch")
    (agreement,) = measured_agreements(model, Draft(LayerPath.early_exit(8, 2), "path"), [prompt], 12)
    assert counted.acceptance == pytest.approx(agreement, abs=0.2)


def test_texts_may_part_at_near_ties_alone(hf_model: Any) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    ties = NearTies(model, Gate(hf_model, [LayerPath.full(8)]))
    prompt = prompts(1)[0]
    tokens = TransformersDrafts(hf_model, 2).generate(prompt, 6, None)
    assert ties.num_equal("these", prompt, tokens, tokens) == 6
    logits = model(torch.tensor([[*prompt, *tokens[:3]]])).logits[0, -1]
    others = [*tokens[:3], int(logits.argmin()), *tokens[4:]]
    with pytest.raises(RuntimeError, match="these must choose the same tokens but for near-ties, got token 3"):
        ties.num_equal("these", prompt, tokens, others)
    ties.allowed = 1e9
    assert ties.num_equal("these", prompt, tokens, others) == 3


# The program


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "results"


def read(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    assert path.stem == describe()["machine"]
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("part", ["random", "transformers"])
def test_a_rehearsal_measures_its_rows(part: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--only", part, "--row", "random-0.8-*-[14]", "--row", "random-0-none-4*"]
    assert drafts.main([*options, "--row", "transformers-0.8-*", "--out", str(out)]) == 0
    conditions, *rows = read(out)
    assert conditions["part"] == "conditions"
    names = {
        "random": [
            "random-0.8-all-1",
            "random-0.8-all-4",
            "random-0.8-none-1",
            "random-0.8-none-4",
            "random-0-none-4",
            "random-0-none-4-cold",
        ],
        "transformers": ["transformers-0.8-all-1"],
    }[part]
    assert [row["row"] for row in rows if not row["row"].endswith("stream")] == names
    for row in rows:
        assert row["same_outputs"] == row["requests"] and row["gain"] > 0 and row["model"] == "quick"
        assert row["factor"] > 0 and row["commit"] and row["took_s"] > 0
        assert ("over_transformers" in row) == (part == "transformers")
    (path,) = out.glob("*.md")
    text = path.read_text()
    assert all(f"| {row['row']} " in text for row in rows)
    assert text.strip() in capsys.readouterr().out
    assert ("assistant_early_exit" in text) == (part == "transformers")


def test_rows_that_are_there_are_not_measured_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def rows(cells: Any, options: Any) -> Iterator[dict[str, Any]]:
        for cell in cells:
            measured.append(cell.name)
            if len(measured) == 3:
                raise KeyboardInterrupt
            yield _row(cell)

    monkeypatch.setitem(drafts.PARTS, "mini", rows)
    options = ["--only", "mini", "--row", "mini-*-[146]", "--row", "mini-own-16", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        drafts.main(options)
    assert [row["row"] for row in read(out)[1:]] == ["mini-own-1", "mini-own-4"]
    assert drafts.main(options) == 0
    assert measured == ["mini-own-1", "mini-own-4", "mini-own-16", "mini-own-16", "mini-path-1"]
    assert drafts.main(["--only", "mini", "--out", str(out), "--again", "--row", "mini-own-4"]) == 0
    assert measured[5:] == ["mini-own-4"] and len(read(out)) == 5
    capsys.readouterr()
    assert drafts.main([*options, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["mini-own-1", "mini-own-4", "mini-own-16", "mini-path-1"]
    assert all(" there, " in line for line in listed)


def _row(cell: Cell) -> dict[str, Any]:
    return {
        "draft": str(cell.draft.path), "entries": cell.draft.entries, "batch": cell.batch,
        "requests": cell.num_requests, "same_outputs": cell.num_requests, "target": cell.target, "acceptance": 0.5,
        "guesses": 2.0, "given": 1.5, "gain": 1.1, "low": 1.0, "high": 1.2, "predicted": 1.1,
        "predicted_of": "run", "rounds": 3,
    }  # fmt: skip


def test_a_draft_that_changes_an_output_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM.from_hf(random_hf_model(hf_config(SHAPE)), backend=cpu_backend("native"))
    cell = next(iter(transformers_cells(8)))
    run, calls = drafts.run, []

    def spoiled(*arguments: Any) -> Any:
        seconds, tokens, engine = run(*arguments)
        calls.append(1)
        return seconds, [[len(calls), *each] for each in tokens], engine

    monkeypatch.setattr(drafts, "run", spoiled)
    with pytest.raises(RuntimeError, match=r"outputs of transformers-0.8-all-1 must be the same .* got 0 of 1 before"):
        drafts.measure(model, cell, prompts(1), 1, None)
    assert len(calls) == 3, "nothing was timed"


@pytest.mark.parametrize("is_cold", [True, False])
def test_a_first_run_knows_nothing_of_those_before(
    is_cold: bool, hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    begin = Draft(LayerPath.early_exit(8, 2), "path")
    run, began = drafts.run, []

    def noted(model: CausalLM, costs: StepCosts, cell: Cell, prompts: Any, draft: Draft | None) -> Any:
        if draft is not None:
            known = _LEARNT.get(model)
            began.append(known is None or (not known.acceptance._pairs and known.lengths is None))
        return run(model, costs, cell, prompts, draft)

    monkeypatch.setattr(drafts, "run", noted)
    row = drafts.measure(model, Cell("random", "all", begin, 1, 1, 12, 0.0, is_cold), prompts(1), 2, None)
    assert row["rounds"] == (6 if is_cold else 2)
    assert began == ([True] * 7 if is_cold else [True, *[False] * 4]), "three runs before any is timed, or one"
    assert (row["predicted"] is None) == row["is_cold"] == is_cold
    assert 0 < row["low"] <= row["gain"] <= row["high"]


def test_the_page_says_what_is_met(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = _row(next(mini_cells())) | {"model": "m", "commit": "c", "date": "d", "acceptance_seen": 0.75}
    older = {"predicted_of": "steps"}
    reached = {"gain": 0.96, "low": 0.9, "high": 0.984, "target": 0.98}
    rows = [
        row | {"row": "median", "target": 1.1},
        row | older | {"row": "above", "target": 1.15, "predicted": 1.3},
        row | reached | {"row": "reached", "predicted": 1.0, "guesses": 0.0},
        row | reached | {"row": "below", "high": 0.979, "predicted": 0.8},
        row | reached | {"row": "first-cold", "predicted": None, "is_cold": True},
        row | {"row": "five", "rounds": 5, "gains": [0.9, 1.1, 1.1, 1.1, 1.3]},
        row | {"row": "many", "rounds": 6, "gains": [1.0, 1.1, 1.1, 1.1, 1.1, 1.2]},
    ]
    with pytest.raises(SystemExit, match=r"drafts: --out must hold rows for --page, got none"):
        drafts.main(["--page", "--out", str(out)])
    conditions = {"part": "conditions", "cpu": "Test", "num_cores": 2, "num_threads": 2, "versions": {}}
    out.mkdir()
    for machine in ("here", "there"):
        (out / f"{machine}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [conditions, *rows]))
    assert drafts.main(["--page", "--out", str(out)]) == 0
    text = (out / "here.md").read_text()
    assert text == (out / "there.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    header, *found = [[cell.strip() for cell in line] for line in lines]
    columns = [header.index(name) for name in ("row", "seen by the engine", "target", "predicted", "over measured")]
    assert [[line[column] for column in columns] for line in found] == [
        ["median", "0.75", ">= 1.10x", "1.10x", "1.00"],
        ["above", "0.75", ">= 1.15x (missed)", "1.30x (steps)", "1.18 (missed)"],
        ["reached", "-", ">= 0.98x", "1.00x", "1.04"],
        ["below", "0.75", ">= 0.98x (missed)", "0.80x", "0.83 (missed)"],
        ["first-cold", "0.75", ">= 0.98x", "-", "-"],
        *([name, "0.75", ">= 1.30x (missed)", "1.10x", "1.00"] for name in ("five", "many")),
    ]
    assert "first runs" in text and "first runs" not in page(conditions, rows[:4])
    gains = [line[header.index("gain (interval)")] for line in found]
    assert gains == [
        *["1.10x (1.00 to 1.20)"] * 2,
        *["0.96x (0.90 to 0.98)"] * 2,
        "0.96x (0.90, 0.98)",
        "1.10x (0.90 to 1.30)",
        "1.10x (1.00, 1.20)",
    ], "an interval, or the lowest and the highest round"


@pytest.mark.parametrize(
    "path", sorted((drafts.ROOT / "bench" / "results" / "drafts").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_the_page_that_is_kept_is_that_of_its_rows(path: Path) -> None:
    results = drafts.Results(path)
    assert results.rows and path.stem == results.conditions["machine"]
    assert "not looked into" not in results.page(), "each target that is missed has what a profile says"
    assert (
        results.path.with_suffix(".md").read_text()
        == results.page()
        == page(results.conditions, list(results.rows.values()))
    )


def test_the_table_of_key_figures_has_a_line_for_each_draft_and_acceptance() -> None:
    row = {"model": "b", "draft": "6/24 layers {0-5}", "entries": "own", "gain": 1.4, "target": 1.3}
    row |= {"low": 1.3, "high": 1.5, "rounds": 3}
    rows = [
        row | {"row": "r-0.8-none-1", "batch": 1, "acceptance": 0.79},
        row | {"row": "r-0.8-none-8", "batch": 8, "acceptance": 0.814, "gain": 0.97},
        row | {"row": "r-0.8-none-4-stream", "batch": 4, "acceptance": 0.8, "gain": 9.0},
        row | {"row": "r-0.8-none-4-cold", "batch": 4, "acceptance": 0.8, "gain": 9.0, "rounds": 7},
        row | {"row": "r-0-none-8", "batch": 8, "acceptance": 0.0, "gain": 0.97, "high": 0.99, "target": 0.98},
        row | {"row": "m-path-1", "batch": 1, "acceptance": 0.5, "model": "a", "entries": "path"},
    ]
    other = [row | {"row": "r-0.8-none-1", "batch": 1, "acceptance": 0.79, "gain": 1.2, "rounds": 5}]
    machines = [({"cpu": name, "num_threads": 2}, each) for name, each in (("Test", rows), ("Other", other))]
    found = key_table(machines)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("| ")]
    assert lines == [
        ["model", "CPU", "layers of the draft", "entries", "acceptance", "batch 1", "batch 8"],
        ["a", "Test", "6/24", "path", "0.50", "1.40x", ""],
        ["b", "Test", "6/24", "own", "0.00", "", "0.97x"],
        ["b", "Other", "6/24", "own", "0.79", "1.20x (missed)", ""],
        ["b", "Test", "6/24", "own", "0.79-0.81", "1.40x", "0.97x (missed)"],
    ]
    assert "medians of 3 or 5 interleaved rounds, bfloat16, 2 threads" in " ".join(found.split())


def test_in_short_are_the_gains_with_weights_that_exist_and_how_many_rows_miss() -> None:
    row = {"model": "opt-mini", "gain": 1.4, "target": 1.3, "low": 1.3, "high": 1.5, "rounds": 3, "batch": 1}
    row["predicted"] = None
    rows = [
        row | {"row": "mini-own-4", "batch": 4, "gain": 0.9, "predicted": 1.0},
        row | {"row": "mini-own-1"},
        row | {"row": "mini-own-1-cold", "gain": 9.0},
        row | {"row": "random-0-none-1", "gain": 1.0},
    ]
    found = " ".join(in_short([({"cpu": "Test"}, rows), ({"cpu": "Other"}, rows[3:])]).split())
    assert found.startswith("Decode seconds without a draft over those with one, of opt-mini")
    assert ": on Test 1.40x at batch 1, 0.90x (missed) at batch 4. Of 5 rows, " in found
    assert found.endswith("3 miss their target, and the gain that is predicted is off by more than a tenth in 1.")


def test_the_picture_shows_each_guess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    accepted = Drafting.accepted
    guess_three(monkeypatch)  # by what steps take beside other work none may pay
    assert drafts.main(["--picture", str(tmp_path / "run.svg")]) == 0
    svg = (tmp_path / "run.svg").read_text()
    assert svg.startswith("<svg") and svg.count(">verification ") >= 12
    assert Drafting.accepted is accepted
