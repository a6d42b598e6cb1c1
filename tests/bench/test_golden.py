"""Two states compared: what differs is found and named, and the interval of a ratio says what the rounds say."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_hf
from torch import Tensor

from bench.golden import golden, probe, sides
from bench.golden.golden import Expected, compare, known, split_expected
from bench.golden.sides import Side, make_side
from bench.golden.speed import Ratio, Row, abba, rows_of, write
from dynskip import OPTForCausalLM
from dynskip.engine.request import OutputSequence
from dynskip.sampling import Choice

VALUES = {"logits/a bits": "0f", "generate/b": [{"samples": [[[5, 6], "length"]]}], "engine/c": {"steps": [1, 2]}}
TENSORS = {"logits/a": torch.tensor([1.0, -2.0])}


def copy(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(VALUES)), **changes}


def test_a_state_does_not_differ_from_itself() -> None:
    assert compare((VALUES, TENSORS), (copy(), {"logits/a": torch.tensor([1.0, -2.0])})) == ({}, {}, {})


@pytest.mark.parametrize(
    ("values", "name", "text"),
    [
        (copy(**{"logits/a bits": "1f"}), "logits/a bits", 'old "0f", new "1f"'),
        (copy(**{"generate/b": [{"samples": [[[5, 7], "length"]]}]}), "generate/b > 0 > samples > 0 > 0 > 1", "new 7"),
        (copy(**{"engine/c": {}}), "engine/c > steps", "only in the old state"),
        (copy(**{"engine/c": {"steps": [1]}}), "engine/c > steps", "old [1, 2], new [1]"),
        (copy(**{"engine/d": 1}), "engine/d", "only in the new state"),
        (copy(**{"engine/c": {"error": "ValueError: x"}}), "engine/c > error", "only in the new state"),
    ],
)
def test_a_value_that_differs_is_named(values: dict[str, Any], name: str, text: str) -> None:
    found, remarks, _ = compare((VALUES, TENSORS), (values, TENSORS))
    assert text in found[name] and not remarks


def test_a_missing_case_is_a_difference() -> None:
    values = copy()
    del values["generate/b"]
    found, _, _ = compare((VALUES, TENSORS), (values, {}))
    assert found == {"generate/b": "only in the old state", "logits/a": "old float32 [2], new nothing"}


def test_a_case_that_fails_in_both_states_is_no_agreement() -> None:
    failed = {"engine/c": {"error": "ValueError: x"}}
    found, _, _ = compare((failed, {}), (dict(failed), {}))
    assert found == {"engine/c": "fails in both: ValueError: x"}


@pytest.mark.parametrize(("change", "is_rounding"), [(2.0**-22, True), (2.0**-12, False), (math.nan, False)])
def test_rounding_is_a_remark_and_more_is_a_difference(change: float, is_rounding: bool) -> None:
    found, remarks, _ = compare((VALUES, TENSORS), (VALUES, {"logits/a": torch.tensor([1.0, -2.0 + change])}))
    assert list(remarks if is_rounding else found) == ["logits/a"]
    assert not (found if is_rounding else remarks)


def test_an_expected_difference_is_told_apart_and_says_why() -> None:
    found = {"engine/c > x": "old 1, new 2", "logits/a": "y"}
    unnamed, named = split_expected(found, {}, {"engine/*": Expected("another tie")})
    assert unnamed == {"logits/a": "y"} and named == {"engine/c > x": "old 1, new 2 (another tie)"}


@pytest.mark.parametrize(
    ("change", "ulps", "is_expected"),
    [(2.0**-12, 2000.0, True), (2.0**-12, 0.0, False), (2.0**-2, 2000.0, False), (math.nan, math.inf, False)],
)
def test_an_expectation_of_tensors_says_how_far(change: float, ulps: float, is_expected: bool) -> None:
    found, _, apart = compare((VALUES, TENSORS), (VALUES, {"logits/a": torch.tensor([1.0, -2.0 + change])}))
    unnamed, named = split_expected(found, apart, {"logits/*": Expected("another norm", ulps)})
    assert list(named if is_expected else unnamed) == ["logits/a"]
    assert not (unnamed if is_expected else named)


def test_an_expectation_ends_where_the_old_state_has_it(tmp_path: Path) -> None:
    far = {"why": "3", "ulps": 100}
    for name, patterns in (("old", {"a": "1"}), ("new", {"a": "1", "b": "2", "c": far})):
        path = tmp_path / name / golden.EXPECTED
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(patterns), encoding="utf-8")
    old, new = (Side(name, tmp_path / name, "0") for name in ("old", "new"))
    added = {"b": Expected("2"), "c": Expected("3", 100)}
    assert known(new, old) == added
    assert known(new, Side("older", tmp_path / "older", "0")) == {"a": Expected("1"), **added}


def test_what_git_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="OLD must be a commit, got 'no-such-commit'"):
        make_side("old", "no-such-commit")


def test_states_with_equal_sources_share_an_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "FOLDER", tmp_path / "kept")
    roots = [tmp_path / name for name in ("built", "same", "other")]
    for root in roots:
        (root / "csrc").mkdir(parents=True)
        (root / "dynskip").mkdir()
        (root / "setup.py").write_text("raise SystemExit('no compiler here')")
        (root / "csrc" / "x.cpp").write_text("// other" if root.name == "other" else "// x")
    (roots[0] / "dynskip" / "_C.abi3.so").write_text("built")
    (tmp_path / "kept").mkdir()
    for root in roots[:2]:
        sides._build(root)
        assert (root / "dynskip" / "_C.abi3.so").read_text() == "built"
    with pytest.raises(RuntimeError, match="other must build, got:\nno compiler here"):
        sides._build(roots[2])


def records(tmp_path: Path, name: str, num_cases: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """What the first cases of the probe compute here."""
    out = tmp_path / name
    out.mkdir()
    cases = itertools.chain(
        itertools.islice(probe.forward(quick=True), num_cases),
        itertools.islice(probe.generation(quick=True), 2),
        [("engine/little memory", lambda: probe.serve("cohort", True, "torch", 130))],
        [("fails", lambda: 1 / 0)],
    )
    probe.record(cases, out, Path("root"))
    return golden.read(out)


def test_the_probe_repeats_itself_and_sees_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = records(tmp_path, "once")
    found, remarks, _ = compare(once, records(tmp_path, "again"))
    assert found == {"fails": "fails in both: ZeroDivisionError: division by zero"} and not remarks
    served = once[0]["engine/little memory"]
    assert sum(step["num_preempted"] for step in served["steps"]) and any(step["tokens"] for step in served["steps"])
    monkeypatch.setattr(probe, "PATHS", probe.PATHS[::-1])
    found, _, _ = compare(once, records(tmp_path, "other"))
    assert {name.split(" ")[0].split("/")[0] for name in found} == {"logits", "generate", "engine", "fails"}


def test_other_noise_is_seen_in_what_is_drawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expectations of other noise name draws of engines, and nothing else of them."""
    name = "engine/cohort/native/fast/130"
    once = {name: probe.repeatable(probe.serve("cohort", False, "torch", 130))}
    choice_of = OutputSequence.choice_of

    def other_choice_of(self: OutputSequence, position: int) -> Choice:
        choice = choice_of(self, position)
        return choice._replace(seed=choice.seed + 1)

    monkeypatch.setattr(OutputSequence, "choice_of", other_choice_of)
    found, _, _ = compare((once, {}), ({name: probe.repeatable(probe.serve("cohort", False, "torch", 130))}, {}))
    expected = json.loads((sides.ROOT / golden.EXPECTED).read_text("utf-8"))
    patterns = [pattern for pattern in expected if pattern.startswith("engine")]
    unnamed, named = split_expected(found, {}, {pattern: Expected("noise") for pattern in patterns})
    assert named and not unnamed
    for place in ("steps > 3 > tokens", "ended > 2 > samples > 0"):
        assert not any(fnmatchcase(f"{name} > {place}", pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("ratio", "noise", "is_slower"), [(1.0, 0.0, False), (1.0, 0.05, False), (1.05, 0.005, True), (1.029, 0.0, False)]
)
def test_the_interval_of_a_ratio(ratio: float, noise: float, is_slower: bool) -> None:
    draw = random.Random(0)
    rounds = [(old := draw.uniform(1, 2), old * ratio * draw.uniform(1 - noise, 1 + noise)) for _ in range(9)]
    found = Ratio.of(rounds)
    assert found.low <= found.value <= found.high and abs(found.value - ratio) <= noise + 1e-9
    assert found.low - 1e-9 <= ratio <= found.high + 1e-9
    assert found.is_slower == is_slower


def test_one_bad_round_makes_nothing_slower() -> None:
    assert not Ratio.of([(1.0, 1.0)] * 8 + [(1.0, 9.0)]).is_slower
    assert Ratio.of([(1.0, 1.2)] * 8 + [(9.0, 1.0)]).is_slower


def test_turns_are_abba_so_that_drift_cancels() -> None:
    turns: list[str] = []

    def ask(name: str, slower: float) -> Any:
        def answer(row: Row, amount: int) -> tuple[float, str]:
            turns.append(name)
            return amount * slower * (1 + 0.01 * len(turns)), "tokens"

        return answer

    rounds, amount = abba(Row("decode", "decode", "m", 1), {"old": ask("old", 1), "new": ask("new", 1.1)}, 9, 8.0)
    assert amount == 8 and len(rounds) == 9
    assert turns == ["old", "new"] * 2 + ["old", "new", "new", "old"] * 9
    assert [new / old for old, new in rounds] == pytest.approx([1.1] * 9)


def test_other_tokens_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="decode must have the same tokens in both states"):
        abba(Row("decode", "decode", "m", 1), {name: lambda *_, n=name: (1.0, n) for name in ("old", "new")}, 9, 1.0)


@pytest.mark.parametrize("kind", ["decode", "prefill", "stream"])
def test_a_worker_repeats_its_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The worker is a script beside the probe, so that PYTHONPATH is free for the state that it imports.
    monkeypatch.syspath_prepend(str(Path(probe.__file__).parent))
    monkeypatch.delitem(sys.modules, "probe", raising=False)
    import speed_worker

    turns = speed_worker.Turns()
    turns.models["tiny"] = OPTForCausalLM.from_hf(tiny_hf(max_position_embeddings=256), backend="torch")
    row = {"kind": kind, "model": "tiny", "batch": 3, "path": "random:3:SEED", "policy": "cohort", "requests": 5}
    answers = []
    for _ in range(2):
        answers.append(turns.run(row, 2))
        turns.end()
    assert answers[0][1] == answers[1][1] and min(seconds for seconds, _ in answers) > 0


def test_the_rows_are_those_of_the_tables_and_are_written(tmp_path: Path) -> None:
    rows = rows_of("folder", 24)
    assert len({row.name for row in rows}) == len(rows) == 27
    lines = [
        {"row": row.name, "old_ms": 1.0, "new_ms": 1.1, "ratio": 1.1, "low": 1.05, "high": 1.2, "is_slower": True}
        for row in rows[:2]
    ]
    text = write(tmp_path, lines, {"old": "0123", "new": "4567+"})
    assert "| decode, full depth, batch 1 | 1.000 | 1.100 | 1.100 | 1.050 .. 1.200 **slower**|" in text
    written = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text("utf-8").splitlines()]
    assert [line["row"] for line in written] == [row.name for row in rows[:2]] and written[0]["new"] == "4567+"
