"""Hidden states of skipping models against transformers' own, cut to the path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_models import tiny_setup
from models import cut, tiny_hf, tiny_model, word_tokenizer

from dynskip import LLM, LayerPath
from dynskip.data.corpus import Instruction
from dynskip.evaluation.experiments import hidden_states
from dynskip.evaluation.experiments.hidden_states import compare_states
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.sweep.dataset import Row
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.strategies import strategy_path

ROW = Instruction("", "", "")
ROWS = [
    Row(0, ROW, (2, 10, 11, 12), (20, 21, 2)),
    Row(1, ROW, (2, 30), (40, 41, 42, 43, 44, 2)),
    Row(5, ROW, (2, 50, 51, 52, 53, 54, 55), (60,)),
]


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected", "no-final-norm"])
def test_states_and_logits_are_those_of_transformers(variant: str) -> None:
    llm = LLM(tiny_model(variant), tokenizer=word_tokenizer())
    found = compare_states(llm, ROWS, ["uls:3", "exit:2", "uls:6"], seed=0)
    assert found["rows"] == [0, 1, 5] and found["num_tokens"] == [3, 6, 1]
    hf = tiny_hf(variant)
    for strategy, path in (("uls:3", LayerPath.uniform(6, budget=3)), ("exit:2", LayerPath.early_exit(6, budget=2))):
        skipping = cut(hf, path)
        for index, row in enumerate(ROWS):
            ids = torch.tensor([row.prompt_ids + row.response_ids])
            scored = slice(len(row.prompt_ids) - 1, ids.shape[1] - 1)
            finals, logits = [], []
            for model in (hf, skipping):
                seen: list[torch.Tensor] = []
                hook = model.lm_head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                with torch.no_grad():
                    logits.append(model(ids).logits[0, scored].double())
                hook.remove()
                finals.append(seen[0][0, scored])
            cosine = torch.cosine_similarity(*finals, dim=-1).mean()
            metrics = {name: values[index] for name, values in found["strategies"][strategy].items()}
            distance = (1 - torch.cosine_similarity(*finals, dim=-1)).clamp_min(1e-7).log10().mean()
            assert metrics["log_distance"] == pytest.approx(float(distance), abs=1e-3)
            nats = torch.nn.functional.cross_entropy(logits[1], torch.tensor(row.response_ids))
            assert metrics["nats"] == pytest.approx(float(nats), rel=1e-4)
            assert metrics["cosine_final"] == pytest.approx(float(cosine), abs=1e-5)
            kl = torch.nn.functional.kl_div(
                logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none"
            )
            assert metrics["kl"] == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
            same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
            assert metrics["same_token"] == pytest.approx(float(same))
    whole = found["strategies"]["uls:6"]
    assert whole["cosine_final"] == pytest.approx([1.0] * 3) and whole["cosine_layers"] == pytest.approx([1.0] * 3)
    assert whole["kl"] == pytest.approx([0.0] * 3, abs=1e-6) and whole["same_token"] == [1.0] * 3


def test_inner_states_are_compared_behind_the_final_norm() -> None:
    """Early exit repeats the state it left with: layer by layer the mean has the full model's own states."""
    llm = LLM(tiny_model(), tokenizer=word_tokenizer())
    found = compare_states(llm, ROWS[:1], ["exit:2"], seed=0)
    hf = tiny_hf()
    ids = torch.tensor([ROWS[0].prompt_ids + ROWS[0].response_ids])
    with torch.no_grad():
        # transformers puts the final norm behind the last of them itself.
        *inputs, last = hf(ids, output_hidden_states=True).hidden_states
        states = [hf.model.decoder.final_layer_norm(state)[0, 3:6] for state in inputs[1:]] + [last[0, 3:6]]
    exit_state = states[1]
    ours = [states[0], *[exit_state] * 5]
    expected = torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in zip(ours, states, strict=True)]).mean()
    assert found["strategies"]["exit:2"]["cosine_layers"][0] == pytest.approx(float(expected), abs=1e-5)
    trajectory = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in zip(ours, states, strict=True)]
    assert found["trajectories"]["exit:2"] == pytest.approx(trajectory, abs=1e-5)


def test_company_changes_nothing() -> None:
    llm = LLM(tiny_model(), tokenizer=word_tokenizer())
    strategies = ["uls:3", "rls:3", "rls-first:2"]
    together = compare_states(llm, ROWS, strategies, seed=3)["strategies"]
    for index, row in enumerate(ROWS):
        alone = compare_states(llm, [row], strategies, seed=3)["strategies"]
        for strategy in strategies:
            for metric in ("cosine_final", "kl"):
                value = alone[strategy][metric][0]
                assert together[strategy][metric][index] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_drawn_paths_have_the_budget_and_repeat() -> None:
    drawn = {strategy_path("rls", 3, 6, seed, row) for seed in (1, 2) for row in range(30)}
    assert len(drawn) > 10 and {path.budget for path in drawn} == {3}
    assert strategy_path("rls", 3, 6, 1, 7) == strategy_path("rls", 3, 6, 1, 7)
    first = [strategy_path("rls-first", 3, 6, 1, row) for row in range(30)]
    assert all(0 in path.layers for path in first) and not all(0 in path.layers for path in drawn)
    assert strategy_path("uls", 4, 24, 0, 0).layers == (0, 6, 12, 18)
    assert strategy_path("exit", 4, 24, 0, 0).layers == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="strategy must be one of uls, exit, rls, rls-first, got 'best'"):
        strategy_path("best", 4, 24, 0, 0)


def test_the_section_is_a_mean_over_tokens(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path, prompts=4, state_prompts=6, seeds=2, resamples=50)
    with ItemStore(tmp_path / "items") as store:
        items = hidden_states.plan(setup, store)
        assert [item.seed for item in items] == [0, 1, 2]
        for item in items:
            strategies = {
                strategy: {
                    metric: [float(item.seed + row + (strategy == "uls:2")) for row in range(6)]
                    for metric in hidden_states.METRICS
                }
                for strategy in item.path.split()
            }
            result = {"rows": [0] * 6, "num_tokens": [1, 1, 1, 1, 1, 5], "strategies": strategies}
            result["trajectories"] = {strategy: [1.0, 0.5 + 0.1 * item.seed] for strategy in strategies}
            store.add(item, result, 1.0)
        section = hidden_states.summarise(setup, store)
    assert section["n"] == 6 and section["num_tokens"] == 10
    # Every strategy against every other, with a correction for how many there are.
    pairs = [row for row in section["rows"] if row["metric"] == "kl" and " - " in row["strategy"]]
    assert len(pairs) == 6 * 2 and all(0 <= row["p"] <= row["q"] + 1e-6 <= 1.1 for row in pairs)
    paths = [row for row in section["rows"] if row["metric"] == "trajectory" and row["strategy"] == "rls"]
    assert [row["value"] for row in paths if row["budget"] == 2] == pytest.approx([1.0, 0.65])  # seeds 1 and 2
    values = {(row["strategy"], row["budget"], row["metric"]): row["value"] for row in section["rows"]}
    mean = (0 + 1 + 2 + 3 + 4 + 5 * 5) / 10
    assert values["exit", 2, "kl"] == pytest.approx(mean)
    assert values["uls", 2, "kl"] == pytest.approx(mean + 1)
    assert values["rls", 4, "kl"] == pytest.approx(mean + 1.5)  # seeds 1 and 2
    assert values["uls - exit", 2, "cosine_final"] == pytest.approx(1.0)
    (ends, *_) = section_sentences({"conditions": {}, "hidden_states": section}, "hidden_states")
    assert "is closer to the full model than early exit at 2 layers; not told apart from early exit at 4 layers" in ends
