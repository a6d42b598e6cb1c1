"""Where found paths are kept, by which digest, and what is said where no search has run."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from families import FAMILIES, family_hf
from models import NUM_LAYERS, tiny_hf, tiny_model

from dynskip import LLM, CausalLM, LayerPath, SamplingParams
from dynskip.assets import ADAPTED, FOUND_PATHS_FOLDER, OPT_MINI, PACKAGED
from dynskip.engine.drafting import find_draft
from dynskip.found import FOUND_PATHS, FoundDraft, FoundPaths
from dynskip.models.found import place_to_keep
from dynskip.speculation.draft import Draft

FULL = LayerPath.full(NUM_LAYERS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))


def keep(model: CausalLM, **found: object) -> None:
    """Leave what a search would have found."""
    kept = FoundPaths(model.weights_digest, NUM_LAYERS, **found)  # type: ignore[arg-type]  # its fields
    kept.write(place_to_keep(kept.weights, model.config.name_or_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_digest_is_of_all_weights_and_of_nothing_else(family: str) -> None:
    hf_model = family_hf(family)
    model = CausalLM.from_hf(hf_model, backend="torch")
    digest = model.weights_digest
    for same in (
        CausalLM.from_hf(hf_model, backend="torch", pack=False),
        CausalLM.from_hf(copy.deepcopy(hf_model).to(torch.bfloat16), backend="torch"),
    ):
        assert same.weights_digest == digest
    other = CausalLM.from_hf(hf_model, backend="torch", pack=False)
    for name, weight in list(other.named_parameters()):
        with torch.no_grad():
            flat = weight.view(-1)
            before = flat[-1].item()
            flat[-1] = before + 0.5
            assert other.weights_digest != digest, f"{name} counts"
            flat[-1] = before
    assert other.weights_digest == digest


def test_the_digest_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    digest = model.weights_digest
    monkeypatch.setattr("dynskip.causal_lm.weights_digest", lambda *args: pytest.fail("nothing has changed"))
    assert model.weights_digest == digest
    assert copy.deepcopy(digest) == digest


def test_packed_weights_that_were_changed_between_are_others() -> None:
    model = tiny_model()
    digest = model.weights_digest
    model.unpack_()
    assert model.weights_digest == digest
    with torch.no_grad():
        model.decoder.stack()[2].fc1.weight.add_(1.0)
    model.pack_()
    assert model.weights_digest != digest


def test_without_a_search_the_command_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    for ask in (lambda: LayerPath.found(model, 3), lambda: LayerPath.parse("found:3", NUM_LAYERS, model)):
        with pytest.raises(
            ValueError, match=r"LayerPath.found: model must have paths .* got none\. Run `dynskip search "
        ):
            ask()
    with pytest.raises(ValueError, match=r"LayerPath.found: .* got none\. Run `dynskip search /.* --data FILE`"):
        LayerPath.found(tmp_path, 3)
    with pytest.raises(TypeError, match=r"LayerPath.found: model must be a dynskip.CausalLM or a folder, got int"):
        LayerPath.found(3, 3)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match=r"LayerPath.parse: path must be full, .* or layers:I,J,..., got 'found:3'"):
        LayerPath.parse("found:3", NUM_LAYERS)
    with pytest.raises(ValueError, match=r"find_draft: model must have paths .* got none\. Run `dynskip search"):
        LLM(model).generate([[5, 6]], draft="auto")


def test_a_budget_that_was_not_searched_is_an_error_and_so_is_a_name_that_is_none() -> None:
    model = tiny_model()
    keep(model, layers={3: (0, 2, 5), 2: (0, 5)})
    assert LayerPath.found(model, 3).layers == (0, 2, 5) and LayerPath.found(model, 6) == FULL
    with pytest.raises(
        ValueError, match=r"LayerPath.found: budget must be one that was searched \(2, 3\), got 4\. Run"
    ):
        LayerPath.found(model, 4)
    with pytest.raises(ValueError, match=r"LayerPath.found: budget must lie in 1\.\.6, got 7"):
        LayerPath.found(model, 7)
    with pytest.raises(ValueError, match=r"LayerPath.parse: path must be .*, found:B or layers:I,J,..., got 'found:x'"):
        LayerPath.parse("found:x", NUM_LAYERS, model)
    with pytest.raises(
        ValueError, match=r"find_draft: model must have a draft .* got paths only\. Run .*--score speed`"
    ):
        LLM(model).generate([[5, 6]], draft="auto")


def test_a_draft_is_for_the_full_path_only() -> None:
    model = tiny_model()
    keep(model, draft=FoundDraft((0, 4), "path", 0.8, 1.2, "here"), searched_draft=True)
    assert find_draft(model, FULL) == Draft(LayerPath.of(NUM_LAYERS, [0, 4]), "path")
    assert find_draft(model, LayerPath.uniform(NUM_LAYERS, 3)) is None


def test_other_weights_have_found_nothing() -> None:
    keep(tiny_model(), layers={3: (0, 2, 5)})
    assert tiny_model().found_paths is not None
    assert tiny_model(seed=1).found_paths is None


def test_what_searches_have_found_is_put_together() -> None:
    draft = FoundDraft((0, 4), "path", 0.8, 1.2, "here")
    old = FoundPaths("a", 6, {3: (0, 2, 5), 2: (0, 5)}, draft, True, {"paths": 1, "draft": 2})
    new = FoundPaths("a", 6, {3: (0, 1, 5)}, conditions={"paths": 3})
    both = FoundPaths("a", 6, {3: (0, 1, 5), 2: (0, 5)}, draft, True, {"paths": 3, "draft": 2})
    assert old.updated(new) == both
    none_pays = FoundPaths("a", 6, searched_draft=True)
    assert old.updated(none_pays) == dataclasses.replace(old, draft=None)


def test_what_is_shipped_is_of_a_model_that_the_package_knows() -> None:
    shipped = {path.stem: FoundPaths.read(path) for path in FOUND_PATHS_FOLDER.glob("*.json")}
    assert set(shipped) <= {*PACKAGED, OPT_MINI}
    beside = {path.parent.name for path in FOUND_PATHS_FOLDER.parent.glob(f"*/{FOUND_PATHS}")}
    assert beside <= set(ADAPTED), "paths of an adapted model lie with its adapter"
    assert "smollm2-135m-instruct" in shipped
    assert {27, 25, 20, 15} <= set(shipped["smollm2-135m-instruct"].layers)


def test_the_model_that_is_shipped_has_a_draft() -> None:
    llm = LLM()
    draft = find_draft(llm.model, LayerPath.full(24))
    assert draft is not None and draft.entries == "own" and 0.5 < draft.agreement < 1
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt = llm.chat_prompt("Name three kinds of cheese.")
    [output], [plain] = (llm.generate([prompt], params, draft=each) for each in ("auto", None))
    assert output.token_ids == plain.token_ids and output.draft == draft


def test_a_damaged_file_is_an_error() -> None:
    model = CausalLM.from_hf(tiny_hf(), backend="torch")
    place = place_to_keep(model.weights_digest, model.config.name_or_path)
    place.parent.mkdir(parents=True)
    place.write_text("{")
    with pytest.raises(ValueError, match=r"FoundPaths.read: path must hold found paths of format 1, got .*Remove it"):
        LayerPath.found(model, 3)
