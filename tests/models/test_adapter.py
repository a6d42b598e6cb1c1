"""LoRA adapters that are merged at load: what peft merges for every architecture, wherever one is given."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import WEIGHTS, adapted, adapted_llama, change_factors, load, undecided
from checkpoints import PEFT_WARNS, saved_model
from families import FAMILIES, convert_, family_hf
from models import ragged_batch, stored_state, tiny_hf, tiny_model, within_budget
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynskip import LLM, AsyncLLM, CausalLM, LayerPath, SamplingParams
from dynskip.cli import main
from dynskip.found import FOUND_PATHS, FoundPaths
from dynskip.models import adapter as adapter_module
from dynskip.models.found import place_to_keep

pytestmark = [PEFT_WARNS]

INPUT_IDS, ATTENTION_MASK = ragged_batch([7, 1, 12, 4], "left")
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    keep = ATTENTION_MASK.bool()
    rows = zip(INPUT_IDS, keep, strict=True)
    return torch.cat([model(ids[mask][None]).logits[0] for ids, mask in rows])


def merged_state(wrapped: Any) -> dict[str, Tensor]:
    """What peft merges in float64, and rounds to float32 once; the head by its names in checkpoints, too."""
    wide = convert_(copy.deepcopy(wrapped), torch.float64).merge_and_unload()
    state = {name: tensor.float() for name, tensor in wide.state_dict().items()}
    return {"embed_out.weight": state["lm_head.weight"], **state}


def same_weights(model: CausalLM, expected: dict[str, Tensor]) -> None:
    state = stored_state(model)
    for name, tensor in state.items():
        # One unit in the last place: sums in float64 come in another order.
        torch.testing.assert_close(tensor, expected[name], rtol=2**-23, atol=0, msg=lambda text, name=name: name + text)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, Path, Path]:
    """peft's model of a tiny Llama, the folder of its base, and that of its adapter."""
    return adapted_llama(tmp_path)


# What is computed.


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_peft_does(family: str, tmp_path: Path) -> None:
    hf_model = family_hf(family)
    hf_model.save_pretrained(tmp_path / "base")
    wrapped = adapted(hf_model, tmp_path / "adapter")
    model = load(tmp_path / "base", tmp_path / "adapter")
    same_weights(model, merged_state(wrapped))
    exact = logits_of(convert_(copy.deepcopy(wrapped), torch.float64))
    assert not torch.allclose(exact.float(), logits_of(hf_model), atol=0.1), "the adapter counts"
    ours = model(INPUT_IDS, ATTENTION_MASK).logits[ATTENTION_MASK.bool()]
    within_budget(ours, logits_of(wrapped), exact)
    within_budget(ours, logits_of(wrapped.merge_and_unload()), exact)
    halves = load(tmp_path / "base", tmp_path / "adapter", dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in stored_state(model).items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in stored_state(halves).items())


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-stabilised": ("opt", {"use_rslora": True, "r": 3}),
    "patterns": (
        "opt",
        {
            "rank_pattern": {"q_proj": 2, r"model\.decoder\.layers\.[13]\.fc1": 5},
            "alpha_pattern": {r"layers\.0\.fc2": 1.5, "^model.decoder.layers.2.self_attn.k_proj": 9},
        },
    ),
    "a fraction for alpha": ("qwen2", {"lora_alpha": 0.3, "r": 1}),
    "some layers": ("llama", {"layers_to_transform": [1, 4], "layers_pattern": "layers"}),
    "but for some": ("llama", {"exclude_modules": ["gate_proj"]}),
    "names by a pattern": ("qwen3", {"target_modules": r"model\.layers\.\d\.(self_attn\.v_proj|mlp\.up_proj)"}),
    "whole names": ("gpt_neox", {"target_modules": ["gpt_neox.layers.3.attention.query_key_value"]}),
    "a rank above the size": ("bloom", {"r": 40, "lora_dropout": 0.5}),
    "gaussian": ("phi", {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_peft(setting: str, tmp_path: Path) -> None:
    family, changes = SETTINGS[setting]
    hf_model = family_hf(family)
    hf_model.save_pretrained(tmp_path / "base")
    wrapped = adapted(hf_model, tmp_path / "adapter", **changes)
    same_weights(load(tmp_path / "base", tmp_path / "adapter"), merged_state(wrapped))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`")
@pytest.mark.parametrize(
    ("family", "variant", "targets"),
    [
        ("opt", {"tie_word_embeddings": False, "word_embed_proj_dim": 16}, ["project_in", "project_out", "lm_head"]),
        ("gpt_neox", {}, ["lm_head", "dense"]),
        ("gpt2", {"tie_word_embeddings": False}, ["lm_head", "c_attn"]),
    ],
)
def test_heads_and_projections(family: str, variant: dict[str, Any], targets: list[str], tmp_path: Path) -> None:
    hf_model = family_hf(family, **variant)
    hf_model.save_pretrained(tmp_path / "base")
    wrapped = adapted(hf_model, tmp_path / "adapter", target_modules=targets)
    same_weights(load(tmp_path / "base", tmp_path / "adapter"), merged_state(wrapped))
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    with pytest.raises(
        ValueError, match=r"lora_A and lora_B of matrices only, got .*lm_head.base_layer.weight\. Merge"
    ):
        load(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_other_dtypes(dtype: torch.dtype, llama: tuple[Any, Path, Path]) -> None:
    wrapped, base, adapter = llama
    change_factors(adapter, lambda held: held.update({key: tensor.to(dtype) for key, tensor in held.items()}))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    same_weights(load(base, adapter), merged_state(wrapped))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_base_of_a_gguf_file(architecture: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    from gguf_files import tiny_model as gguf_model
    from gguf_files import write_model

    from dynskip.models.gguf import read_gguf

    hf_model = gguf_model(architecture)
    path = write_model(tmp_path / "model.gguf", hf_model, kind)
    hf_model.load_state_dict(dict(read_gguf(path, "test").tensors))  # dequantised
    wrapped = adapted(hf_model, tmp_path / "adapter")
    same_weights(load(path, tmp_path / "adapter"), merged_state(wrapped))


def test_a_matrix_is_merged_once_and_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = family_hf("gpt2")  # query, key and value are one matrix
    hf_model.save_pretrained(tmp_path / "base")
    adapted(hf_model, tmp_path / "adapter")
    calls: list[tuple[int, ...]] = []
    merged = adapter_module._merged

    def counted(*given: Any) -> Tensor:
        calls.append(tuple(given[0].shape))
        return merged(*given)

    monkeypatch.setattr(adapter_module, "_merged", counted)
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it would raise
    load(tmp_path / "base", tmp_path / "adapter")
    assert len(calls) == len(load_file(tmp_path / "adapter" / WEIGHTS)) // 2 == 6 * 4


def test_a_change_in_many_blocks_is_the_same(llama: tuple[Any, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped, base, adapter = llama
    monkeypatch.setattr(adapter_module, "_BLOCK_ROWS", 7)
    same_weights(load(base, adapter), merged_state(wrapped))


# Where it is given.


def test_llm_and_async_llm_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = saved_model(tmp_path / "base"), tmp_path / "adapter"
    wrapped = adapted(tiny_hf(), adapter)
    options: dict[str, Any] = {"dtype": "float32", "backend": "torch"}
    llm = LLM(base, **options, adapter=adapter)
    prompt = llm.encode("w005 w017 w042")
    [output] = llm.generate([prompt], PARAMS)
    with torch.no_grad():
        logits = wrapped(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    assert output.token_ids == logits.argmax(-1).tolist()
    assert output.token_ids != LLM(base, **options).generate([prompt], PARAMS)[0].token_ids
    assert LLM(str(base), **options, adapter=str(adapter)).generate([prompt], PARAMS)[0].token_ids == output.token_ids

    async def ask() -> list[int]:
        async with AsyncLLM(base, **options, adapter=adapter, costs=None) as server:
            return (await server.generate(prompt, PARAMS)).token_ids

    with pytest.warns(UserWarning, match="No costs were measured"):
        assert asyncio.run(ask()) == output.token_ids
    command = ["--model", str(base), "--adapter", str(adapter), "--dtype", "float32", "--backend", "torch"]
    assert main(["generate", *command, "--max-tokens", "8", "--ignore-eos", "--quiet", "w005 w017 w042"]) == 0
    assert capsys.readouterr().out.strip() == (output.text or "").strip()


def test_info_says_what_was_merged(llama: tuple[Any, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, base, adapter = llama
    assert load(base, adapter).config.adapter == str(adapter)
    assert not hasattr(CausalLM.from_pretrained(base).config, "adapter")
    assert main(["info", "--model", str(base), "--adapter", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["adapter"] == str(adapter)
    assert main(["info", "--model", str(base), "--adapter", str(adapter)]) == 0
    assert f"merged with the adapter in {adapter}" in capsys.readouterr().out
    assert main(["info", "--model", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["adapter"] is None


def test_what_is_saved_is_the_merged_model(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    wrapped, base, adapter = llama
    model = load(base, adapter)
    model.save_pretrained(tmp_path / "saved")
    assert "adapter" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    again = CausalLM.from_pretrained(tmp_path / "saved", dtype="float32", backend="torch")
    assert not hasattr(again.config, "adapter")
    expected = merged_state(wrapped)
    for name, tensor in stored_state(again).items():
        assert torch.equal(tensor, theirs[name]) and torch.equal(tensor, stored_state(model)[name])
        torch.testing.assert_close(tensor, expected[name], rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "--adapter", "x"], "--adapter must come with --model: --shape makes"),
        (["info", "--adapter", "x"], "--adapter must come with --model, the base"),
        (["generate", "--adapter", "/no/such/folder", "x"], "adapter must be a folder, got '/no/such/folder'"),
        (["search", "opt-mini", "--data", __file__, "--adapter", "/no/such/folder"], "adapter must be a folder"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "search":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_objects_have_theirs_already(llama: tuple[Any, Path, Path]) -> None:
    _, base, adapter = llama
    with pytest.raises(ValueError, match=r"LLM: adapter must be left out with a model object, got both"):
        LLM(load(base, adapter), adapter=adapter)
    with pytest.raises(ValueError, match=r"AsyncLLM: adapter must be left out with an LLM, got both"):
        AsyncLLM(LLM(tiny_model()), adapter=adapter)


# What was found for the weights.


def test_the_digest_is_of_the_merged_weights(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, base, adapter = llama
    model = load(base, adapter, backend="native")
    digest = model.weights_digest
    assert digest != CausalLM.from_pretrained(base).weights_digest
    assert load(base, adapter, dtype="bfloat16").weights_digest == digest
    assert copy.deepcopy(model).weights_digest == digest == model.unpack_().weights_digest
    model.save_pretrained(tmp_path / "saved")
    assert CausalLM.from_pretrained(tmp_path / "saved").weights_digest == digest


def test_no_order_of_sums_changes_the_digest(llama: tuple[Any, Path, Path]) -> None:
    _, base, adapter = llama
    assert undecided(base, adapter) == 0


def test_what_was_found_lies_beside_the_adapter(
    llama: tuple[Any, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    _, base, adapter = llama
    model, plain = load(base, adapter), CausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=rf"Run `dynskip search {base} --adapter {adapter} --data FILE`"):
        LayerPath.found(model, 3)
    with pytest.raises(ValueError, match=rf"Run `dynskip search {base} --data FILE`"):
        LayerPath.found(plain, 3)
    for of, layers in ((plain, (0, 1, 5)), (model, (0, 2, 5))):
        FoundPaths(of.weights_digest, 6, {3: layers}).write(place_to_keep(of.weights_digest, of.weights_folder))
    assert (base / FOUND_PATHS).is_file() and (adapter / FOUND_PATHS).is_file()
    assert LayerPath.found(model, 3).layers == LayerPath.found(adapter, 3).layers == (0, 2, 5)
    assert LayerPath.found(plain, 3).layers == LayerPath.found(base, 3).layers == (0, 1, 5)
    assert load(base, adapter, dtype="bfloat16").found_paths == model.found_paths
    with pytest.raises(ValueError, match=r"find_draft: model must have a draft .* --adapter .* --score speed`"):
        LLM(model).generate([[5, 6]], draft="auto")
    family_hf("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be of the weights beside it, got one .* adapter with another base"):
        _ = load(tmp_path / "other", adapter).found_paths


def test_a_search_of_an_adapted_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from searches import data_file

    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    base, adapter = saved_model(tmp_path / "base"), tmp_path / "adapter"
    adapted(tiny_hf(), adapter)
    rows = ["--data", str(data_file(tmp_path)), "--rows", "2", "--judge-rows", "2", "--quiet"]
    model = ["--adapter", str(adapter), "--dtype", "float32", "--backend", "torch"]
    assert main(["search", str(base), *model, *rows, "--budget", "4", "--method", "influence"]) == 0
    assert f"holds to {adapter / FOUND_PATHS}" in capsys.readouterr().out
    found = FoundPaths.read(adapter / FOUND_PATHS)
    assert found.conditions["paths"]["adapter"] == "adapter" and found.conditions["paths"]["model"] == "base"
    command = ["generate", "--model", str(base), *model, "--path", "found:4", "--json", "--max-tokens", "2", "w005"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == list(found.layers[4])


# Pages.


def test_the_pages_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    pages = ("README.md", "docs/models.md", "docs/search.md")
    readme, models, search = ((root / page).read_text(encoding="utf-8") for page in pages)
    assert "`adapter=`" in readme and all("`--adapter FOLDER`" in page for page in (readme, models, search))
    for command in ("generate", "info", "search", "calibrate"):
        assert main([command, "--help"]) == 0
        assert "--adapter FOLDER" in capsys.readouterr().out
        assert re.search(rf"`--adapter FOLDER`[^.]*`{command}`", models.replace("\n", " ")), command
