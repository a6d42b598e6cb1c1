"""What is read of a model folder: every tensor, all end tokens, and no code; or the folder is refused by name."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from api import COSTS
from checkpoints import (
    PEFT_WARNS,
    change_json,
    change_tensors,
    check_untied,
    load,
    other_head,
    same_logits,
    saved_model,
)
from models import stored_state, tiny_hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip import LLM, AsyncLLM, Engine, OPTForCausalLM, SamplingParams
from dynskip.cli import main
from dynskip.models.tokenizer import read_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer, which a test may change."""
    return saved_model(tmp_path / "model")


def test_a_head_of_its_own_beside_a_tied_config(folder: Path, tmp_path: Path) -> None:
    hf_model = tiny_hf()
    head = other_head(hf_model)
    change_tensors(folder, lambda tensors: tensors.update({HEAD: head}))
    hf_model.lm_head.weight = nn.Parameter(head)
    same_logits(load(folder), HFOPTForCausalLM.from_pretrained(folder).eval())
    check_untied(load(folder), hf_model, tmp_path)


@pytest.mark.parametrize("names", ["both", "the head only"])
def test_a_head_that_is_the_embedding_stays_tied(names: str, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone() if names == "both" else tensors.pop(EMBEDDING)

    change_tensors(folder, change)
    model = load(folder)
    same_logits(model, tiny_hf())
    assert model.config.tie_word_embeddings is True


# Files.


def test_pickled_weights_in_one_file_or_in_shards(folder: Path) -> None:
    hf_model = tiny_hf()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    same_logits(load(folder), hf_model)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same_logits(load(folder), hf_model)
    (folder / "pytorch_model.bin").unlink()
    (folder / "shards").mkdir()
    names = sorted(tensors)
    files = {name: f"{'shards/' if index % 2 else ''}part-{index % 2}.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    change_json(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=files)
    same_logits(load(folder), hf_model)
    torch.save(tensors, folder / "part-0.bin")
    with pytest.raises(ValueError, match=r"must hold .* once, got another in part-"):
        load(folder)
    (folder / "part-0.bin").unlink()
    with pytest.raises(ValueError, match=r"must hold every shard of pytorch_model.bin.index.json, got no part-0.bin"):
        load(folder)


def test_a_decoder_saved_without_its_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "decoder.version": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    same_logits(load(folder), tiny_hf())
    change_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"got 1 missing, such as lm_head\.weight"):
        load(folder)


def test_a_hub_id_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    change_json(repository / "snapshots" / commit / "generation_config.json", eos_token_id=[9, 7])
    llm = LLM("some/model", dtype="float32", backend="torch")
    same_logits(llm.model, tiny_hf())
    assert llm.model.config.name_or_path == "some/model" and llm.model.eos_token_ids == (9, 7)
    assert llm.tokenizer is not None
    (repository / "snapshots" / commit / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"some/model must hold one whole model, got an adapter"):
        LLM("some/model")


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "model.decoder.layers.0.fc1.weight_scale",
        "model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
        "model.decoder.final_layer_norm.running_mean",
        "decoder.version",
        "score.weight",
    ],
)
def test_a_tensor_that_the_model_has_no_place_for(name: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    with pytest.raises(ValueError, match=f"must hold the weights of its config only, got 1 more, such as {name}"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_file_of_weights_without_their_scales(dtype: torch.dtype, folder: Path) -> None:
    name = "model.decoder.layers.2.fc2.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(
        ValueError, match=rf"from_pretrained: {name} of .* must be float32, .*Quantised weights are not"
    ):
        load(folder)


def test_wider_weights_are_rounded_once(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({k: tensor.double() for k, tensor in tensors.items()}))
    state = stored_state(load(folder))
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_hf().state_dict().items())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_base(file: str, folder: Path) -> None:
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"must hold one whole model, got an adapter \({file}\)\. Name its base as"):
        load(folder)


@PEFT_WARNS
def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_hf(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold one whole model, got an adapter \(adapter_config.json\)"):
        LLM(tmp_path)


# Code that a folder brings.


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fails where stdin is asked; the path of a file that the folder's code would write."""

    class Unasked(io.StringIO):
        def readline(self, size: int | None = -1) -> str:
            raise AssertionError("stdin was read")

    monkeypatch.setattr(sys, "stdin", Unasked())
    return tmp_path / "ran"


@pytest.mark.parametrize("model_type", ["mine", "opt"])
def test_code_of_a_model_is_never_run(
    model_type: str, folder: Path, silent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"open({str(silent)!r}, 'w')\nfrom transformers import OPTConfig\nclass Mine(OPTConfig): model_type = 'mine'"
    (folder / "mine.py").write_text(code)
    change_json(folder / "config.json", auto_map={"AutoConfig": "mine.Mine"}, model_type=model_type)
    message = r"must describe a plain model, got auto_map {'AutoConfig': 'mine.Mine'}. Code of a model folder is"
    for make in (load, LLM):
        with pytest.raises(ValueError, match=message):
            make(folder)
    assert main(["generate", "--model", str(folder), "w005"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "auto_map" in err
    assert not silent.exists()


@pytest.mark.parametrize("tokenizer_class", ["Mine", "PreTrainedTokenizerFast"])
def test_code_of_a_tokenizer_is_never_run(tokenizer_class: str, folder: Path, silent: Path) -> None:
    code = f"open({str(silent)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Mine"
    (folder / "mine.py").write_text(code)
    auto_map = {"AutoTokenizer": [None, "mine.Mine"]}
    change_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer_class)
    with pytest.raises(ValueError, match=r"LLM: .* must hold a tokenizer that transformers knows, got one of its own"):
        LLM(folder, backend="torch")
    with pytest.raises(ValueError, match=r"^f: .*auto_map .*Code of a folder is never run\.$"):
        read_tokenizer(folder, "f")
    assert not silent.exists()


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_pickled_weights_run_nothing(form: str, folder: Path, silent: Path) -> None:
    (folder / "model.safetensors").unlink()
    file, content = folder / "pytorch_model.bin", {"model.decoder.embed_tokens.weight": Payload(silent)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"must hold readable weights, got in pytorch_model.bin: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and not silent.exists()


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "a/../../outside.safetensors", "/etc/x", "C:\\x", "..\\x", 3]
)
def test_a_shard_outside_the_folder(shard: object, folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    change_json(folder / "model.safetensors.index.json", metadata={}, weight_map={EMBEDDING: shard})
    with pytest.raises(ValueError, match=r"index.json must name files inside its folder, got ") as caught:
        load(folder)
    assert repr(shard) in str(caught.value)


@pytest.mark.parametrize("key", ["quantization_config", "transformers_weights"])
def test_weights_in_a_form_of_their_own(key: str, folder: Path) -> None:
    change_json(folder / "config.json", **{key: "../outside.safetensors"})
    with pytest.raises(ValueError, match=f"config of .* must describe a plain model, got {key} "):
        load(folder)


# End tokens.

ENDS: dict[str, tuple[dict[str, Any] | None, int | list[int] | None, tuple[int, ...]]] = {
    "several": ({"eos_token_id": [9, 7]}, 2, (9, 7)),
    "one": ({"eos_token_id": 9}, [2, 7], (9,)),
    "several in the config": (None, [2, 7], (2, 7)),
    "one in the config": (None, 9, (9,)),
    "a file that names none": ({"temperature": 1.0}, [2, 7], (2, 7)),
    "an empty list": ({"eos_token_id": []}, 2, (2,)),
    "none at all": ({"eos_token_id": None}, None, ()),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens(case: str, folder: Path, tmp_path: Path) -> None:
    generation, config, expected = ENDS[case]
    (folder / "generation_config.json").unlink()
    if generation is not None:
        change_json(folder / "generation_config.json", **generation)
    change_json(folder / "config.json", eos_token_id=config)
    model = load(folder)
    assert model.eos_token_ids == expected
    # Saved over another model, whose ends must not come back.
    shutil.copytree(folder, tmp_path / "saved")
    change_json(tmp_path / "saved" / "generation_config.json", eos_token_id=55)
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").eos_token_ids == expected
    hf_model = HFOPTForCausalLM.from_pretrained(tmp_path / "saved")
    assert OPTForCausalLM.from_hf(hf_model, backend="torch").eos_token_ids == expected
    hf_ends = hf_model.generation_config.eos_token_id
    assert expected == (() if hf_ends is None else (hf_ends,) if isinstance(hf_ends, int) else tuple(hf_ends))


@pytest.mark.parametrize("first", [9, 4])
def test_an_output_ends_where_transformers_ends_it(
    first: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At whichever of several end tokens comes first, wherever that stands among them and whoever generates."""
    prompt, params = [5, 6, 8], SamplingParams(max_tokens=12)
    free = LLM(folder, dtype="float32", backend="torch").generate([prompt], replace(params, ignore_eos=True))
    ends = [free[0].token_ids[first], free[0].token_ids[13 - first]]
    change_json(folder / "generation_config.json", eos_token_id=ends)
    hf_model = HFOPTForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
        expected = hf_model.generate(ids, **options)[0, 3:].tolist()
    assert expected[-1] in ends and len(expected) < 12
    llm = LLM(folder, dtype="float32", backend="torch")
    engine = Engine(llm.model, tokenizer=llm.tokenizer, costs=COSTS)
    engine.add_request(prompt, params)

    async def ask() -> Any:
        async with AsyncLLM(llm, costs=COSTS) as server:
            return await server.generate(prompt, params)

    from_hf = LLM(OPTForCausalLM.from_hf(hf_model, backend="torch"))
    outputs = [*llm.generate([prompt], params), *from_hf.generate([prompt], params), *engine.run(), asyncio.run(ask())]
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [(expected, "stop")] * 4
    command = ["generate", "--model", str(folder), "--dtype", "float32", "--backend", "torch", "--max-tokens", "12"]
    assert main([*command, "--json", "w005 w006 w008"]) == 0
    [shown] = json.loads(capsys.readouterr().out)["outputs"]
    assert (shown["token_ids"], shown["finish_reason"]) == (expected, "stop")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "generation_config.json must be a JSON object, got: "),
        ("[2]", "generation_config.json must be a JSON object, got: "),
        ('{"eos_token_id": "</s>"}', r"eos_token_id in .*generation_config.json must be a token id .* got </s>"),
        ('{"eos_token_id": [2, null]}', "must be a token id or a list of them"),
        ('{"eos_token_id": true}', "must be a token id or a list of them, got True"),
    ],
)
def test_a_damaged_generation_config(text: str, message: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)


# What people pass.


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "torch.float32", "torch.bfloat16"])
def test_dtypes_by_name(name: str, folder: Path) -> None:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert OPTForCausalLM.from_pretrained(folder, dtype=name, backend="torch").dtype == dtype
    llm = LLM(folder, dtype=name, backend="torch")
    assert llm.model.dtype == dtype
    served = AsyncLLM(folder, "lockstep", dtype=name, device="cpu", backend="torch")
    assert served.llm.model.dtype == dtype and served.llm.model.backend.name == "torch"
    with pytest.raises(ValueError, match="AsyncLLM: dtype must be left out with an LLM, got both"):
        AsyncLLM(llm, "lockstep", dtype=name)


def test_home_in_paths(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder.parent / "prompts.txt").write_text("w005 w006\n")
    expected = load(folder).state_dict()
    for source in ("~/model", Path("~/model")):
        state = OPTForCausalLM.from_pretrained(source, dtype="float32", backend="torch").state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    llm = LLM("~/model", tokenizer="~/model", backend="torch")
    assert llm.tokenizer is not None
    llm.model.save_pretrained("~/saved")
    assert (folder.parent / "saved" / "config.json").is_file()
    options = ["--backend", "torch", "--ignore-eos", "--max-tokens", "2"]
    assert main(["generate", "--model=~/model", "--file=~/prompts.txt", *options]) == 0
    assert capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"'.*/nowhere' must be a directory, got no such directory"):
        OPTForCausalLM.from_pretrained("~/nowhere")
