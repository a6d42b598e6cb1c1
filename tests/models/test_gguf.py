"""What is read of a GGUF file: every tensor as transformers has it, and the config of its model; or it is refused."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import cpu_backend, within_budget
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dynskip import CausalLM
from dynskip.assets import PACKAGED, packaged_file
from dynskip.models.gguf import read_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
from gguf_files import metadata, stored_tensors, tiny_model, write_gguf, write_model  # noqa: E402  # needs gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")
IDS = torch.arange(24).view(2, 12) * 7 % 71


def config_of(values: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**values)


def model_of(path: Path) -> Any:
    """transformers' model with the config and the tensors that are read of a file, all of them and no others."""
    read = read_gguf(path, "test")
    model = AutoModelForCausalLM.from_config(config_of(read.config)).eval()
    tensors = dict(read.tensors)
    if read.config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def same_logits(model: Any, other: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_as_it_was_written(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    path = write_model(tmp_path / "model.gguf", model)
    read = read_gguf(path, "test")
    written = model.state_dict()
    if tied:
        del written["lm_head.weight"]
    assert read.architecture == architecture and read.path == path and len(read.tensors) == len(written)
    for name, tensor in read.tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and torch.equal(tensor, written[name]), name
        assert read.tensors.shape(name) == tensor.shape
    for key, value in read.config.items():
        if (key, architecture) not in (("head_dim", "qwen2"), ("attention_bias", "qwen2")):  # Qwen2 has no such option
            assert getattr(model.config, key) == value, key
    same_logits(model_of(path), model)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_class_computes_the_logits_of_transformers(architecture: str, kind: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model(architecture), kind)
    theirs = model_of(path)
    with torch.no_grad():
        expected, exact = theirs(IDS).logits, theirs.double()(IDS).logits
    for backend in ("torch", "native"):
        ours = CausalLM.from_pretrained(path, dtype="float32", backend=cpu_backend(backend))
        within_budget(ours(IDS).logits, expected, exact)


def test_a_tensor_is_the_callers_own(tmp_path: Path) -> None:
    tensors = read_gguf(write_model(tmp_path / "model.gguf", tiny_model("llama")), "test").tensors
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        before = tensors[name].clone()
        tensors[name].zero_()
        assert torch.equal(tensors[name], before)
    with pytest.raises(KeyError):
        tensors["lm_head.bias"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_biases_of_attention_are_found(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, attention_bias=True)
    path = write_model(tmp_path / "model.gguf", model)
    assert read_gguf(path, "test").config["attention_bias"] is True
    same_logits(model_of(path), model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same(architecture: str, kind: str, tmp_path: Path) -> None:
    # transformers does not ask a file for the size of Qwen3's heads.
    changes = {"head_dim": 128} if architecture == "qwen3" else {}
    model = tiny_model(architecture, tie_word_embeddings=True, **changes)
    path = write_model(tmp_path / "model.gguf", model, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    read = read_gguf(path, "test")
    for name, tensor in read.tensors.items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    names = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings", "eos_token_id")
    for name in names:
        assert getattr(theirs.config, name) == read.config[name], name


def known_kinds() -> list[str]:
    """The names of the types that are dequantised, those of plain numbers apart."""
    found = []
    for kind, (_, num_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return found


@pytest.mark.parametrize("kind", known_kinds())
def test_every_quantisation_of_the_format_is_read(kind: str, tmp_path: Path) -> None:
    """Random bytes: of the matrices of a layer, of one that is cut into heads, and of one that is not."""
    quant = gguf.GGMLQuantizationType[kind]
    block, num_bytes = gguf.GGML_QUANT_SIZES[quant]
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    tensors, generator = stored_tensors(model), np.random.default_rng(0)
    raw, numbers = {}, {}
    for name in ("blk.1.attn_k.weight", "blk.0.ffn_up.weight"):
        rows, columns = tensors.pop(name).shape
        data = generator.integers(0, 256, (rows, columns // block * num_bytes), np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):
            numbers[name] = torch.from_numpy(np.array(gguf.dequantize(data, quant), np.float32))
        raw[name] = (data.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)), kind)
    path = write_gguf(tmp_path / "model.gguf", "llama", metadata(model), tensors, raw=raw)
    read = read_gguf(path, "test").tensors

    def same_bits(tensor: Tensor, expected: Tensor) -> bool:
        return torch.equal(tensor.view(torch.int32), expected.contiguous().view(torch.int32))

    assert same_bits(read["model.layers.0.mlp.up_proj.weight"], numbers["blk.0.ffn_up.weight"])
    heads = numbers["blk.1.attn_k.weight"].view(2, 32, 2, 256).transpose(1, 2).reshape(128, 256)
    assert same_bits(read["model.layers.1.self_attn.k_proj.weight"], heads)


ROPE = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}),
    "linear without a type": ({"rope_type": "linear", "factor": 2.0}, {"scaling.factor": 2.0}),
    "linear of old files": ({"rope_type": "linear", "factor": 2.0}, {"scale_linear": 2.0}),
    "none": ({"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": 2.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64},
    ),
    "yarn in full": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 64,
            "scaling.yarn_beta_fast": 20.0,
            "scaling.yarn_beta_slow": 2.0,
            "scaling.yarn_attn_factor": 1.25,
        },
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ROPE)
def test_scaled_rotations(name: str, architecture: str, tmp_path: Path) -> None:
    parameters, keys = ROPE[name]
    model = tiny_model(architecture, rope_parameters={"rope_theta": 5e4, **parameters})
    changes = {f"{architecture}.rope.{key}".replace(".", "__"): value for key, value in keys.items()}
    path = write_model(tmp_path / "model.gguf", model, **changes)
    assert read_gguf(path, "test").config["rope_parameters"] == {"rope_theta": 5e4, **parameters}
    same_logits(model_of(path), model)


def llama3_factors(factor: float, low: float, high: float, positions: int, theta: float, size: int) -> Tensor:
    """What the converter writes as rope_freqs, term for term as there."""
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wavelength = 2 * math.pi / frequency
        if wavelength < positions / high:
            factors.append(1)
        elif wavelength > positions / low:
            factors.append(factor)
        else:
            smooth = (positions / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotation_of_llama_3(factor: float, tmp_path: Path) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", max_position_embeddings=16384, rope_parameters=parameters, head_dim=64)
    factors = llama3_factors(factor, 1.0, 4.0, 8192, 5e5, 64)
    assert len(set(factors.tolist())) > 3, "some frequencies are blended"
    tensors = {**stored_tensors(model), "rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "model.gguf", "llama", metadata(model), tensors)
    read = read_gguf(path, "test")
    assert read.config["rope_parameters"] == parameters and "rope_freqs.weight" not in read.tensors
    same_logits(model_of(path), model)
    # All ones divide nothing; others are of no known scaling.
    tensors["rope_freqs.weight"] = torch.ones(32)
    path = write_gguf(tmp_path / "ones.gguf", "llama", metadata(model), tensors)
    assert read_gguf(path, "test").config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    for other in (factors[:-1], factors * 1.001, llama3_factors(factor, 1.0, 4.0, 4096, 5e5, 64)):
        tensors["rope_freqs.weight"] = other.contiguous()
        path = write_gguf(tmp_path / "other.gguf", "llama", metadata(model), tensors)
        with pytest.raises(ValueError, match=r"test: .*other.gguf must hold the rope_freqs of Llama 3, 32 factors"):
            read_gguf(path, "test")
    tensors["rope_freqs.weight"] = factors
    path = write_gguf(tmp_path / "both.gguf", "llama", {**metadata(model), "llama.rope.scaling.factor": 2.0}, tensors)
    with pytest.raises(ValueError, match=r"must hold rope_freqs or llama.rope.scaling, got both"):
        read_gguf(path, "test")


def test_fewer_words_than_rows(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_model(tmp_path / "model.gguf", model, tokenizer__ggml__tokens=[f"w{word}" for word in range(60)])
    assert read_gguf(path, "test").config["vocab_size"] == 71
    same_logits(model_of(path), model)
    ours = CausalLM.from_pretrained(path, dtype="float32")
    assert ours(torch.tensor([[70, 4, 60]])).logits.shape == (1, 3, 71)
    with pytest.raises(ValueError, match=r"must hold token ids in 0\.\.70, got 71"):
        ours(torch.tensor([[71, 4]]))


def test_several_ends(tmp_path: Path) -> None:
    model = tiny_model("llama")
    changes: dict[str, Any] = {"tokenizer__ggml__eot_token_id": 5, "tokenizer__ggml__eom_token_id": 6}
    config = read_gguf(write_model(tmp_path / "a.gguf", model, **changes), "test").config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 5, 6], 3)
    changes = {"tokenizer__ggml__eot_token_id": 2}
    assert read_gguf(write_model(tmp_path / "b.gguf", model, **changes), "test").config["eos_token_id"] == 2
    none: dict[str, Any] = {f"tokenizer__ggml__{name}_token_id": None for name in ("bos", "eos", "padding")}
    config = read_gguf(write_model(tmp_path / "c.gguf", model, **none), "test").config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "gemma3"}, "of architecture llama, qwen2, qwen3, got 'gemma3'"),
        ({"split__count": 2}, "must hold a whole model, got one of 2 parts. Merge them with llama-gguf-split"),
        ({"llama__attention__head_count": [4, 2]}, r"llama.attention.head_count of .* must be int, got \[4, 2\]"),
        ({"llama__attention__head_count": 0}, "num_attention_heads of .* must be at least 1, got 0"),
        ({"llama__attention__head_count_kv": 3}, "heads of an even size, as many or a multiple .* got 4 of 32 and 3"),
        ({"llama__attention__key_length": 16}, "llama.attention.value_length of .* must be the size of a head, 16"),
        ({"llama__rope__dimension_count": 16}, "llama.rope.dimension_count of .* must be the size of a head, 32"),
        ({"llama__block_count": None}, "must hold llama.block_count, got none. Convert the model anew"),
        ({"llama__block_count": 3}, "must hold every tensor of its config, got no blk.2.attn_q.weight"),
        ({"llama__block_count": 1}, "must hold the tensors of its config only, got 9 more, such as blk.1.attn_k.weig"),
        ({"llama__block_count": 4_000_000_000}, "must hold tensors for each of its 4000000000 layers, got 21 in all"),
        (
            {"llama__feed_forward_length": 95},
            r"must hold blk.0.ffn_gate.weight in the shape \[95, 128\] of its config, got \[96, 128\]",
        ),
        ({"llama__vocab_size": 70}, "an embedding for each token, got 71 for a vocab_size of 70 and 0 tokens"),
        ({"tokenizer__ggml__tokens": [f"w{word}" for word in range(72)]}, "got 71 for a vocab_size of 71 and 72 tok"),
        ({"tokenizer__ggml__eos_token_id": 71}, "the eos token of .* must be below the vocabulary's 71, got 71"),
        ({"llama__rope__scaling__type": "longrope"}, "a llama.rope.scaling.type of none, linear or yarn, got 'longr"),
        ({"llama__rope__scaling__factor": 0.5}, "a llama.rope.scaling.factor of at least 1, got 0.5"),
        ({"llama__rope__scaling__factor": math.inf}, "a llama.rope.scaling.factor of at least 1, got inf"),
        ({"llama__rope__freq_base": "1e4"}, "llama.rope.freq_base of .* must be float, got '1e4'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    architecture = changes.pop("general__architecture", "llama")
    named = {key.replace("__", "."): value for key, value in changes.items()}
    path = write_gguf(tmp_path / "model.gguf", architecture, {**metadata(model), **named}, stored_tensors(model))
    with pytest.raises(ValueError, match=f"^test: .*{message}"):
        read_gguf(path, "test")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("attention.scale", 0.5),
        ("attention.sliding_window", 64),
        ("attention.clamp_kqv", 8.0),
        ("attention.logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.25),
        ("logit_scale", 0.125),
        ("expert_count", 8),
        ("rope.scaling.alpha", 1000.0),
        ("rope.scaling.attn_factor", 0.5),
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("rope.scaling.yarn_log_multiplier", 0.1),
    ],
)
def test_values_that_would_change_results_are_refused(key: str, value: float | bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(
        tmp_path / "model.gguf", "llama", {**metadata(model), f"llama.{key}": value}, stored_tensors(model)
    )
    with pytest.raises(ValueError, match=rf"must hold llama\.{key} .* or none, got .*\. It is not supported"):
        read_gguf(path, "test")


def test_types_without_quantisation_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = stored_tensors(model)
    norm = tensors.pop("output_norm.weight")
    raw = {"output_norm.weight": (norm.to(torch.int32).numpy(), "I32")}
    path = write_gguf(tmp_path / "model.gguf", "llama", metadata(model), tensors, raw=raw)
    with pytest.raises(ValueError, match=r"test: output_norm.weight of .* must be of a type that gguf dequantises"):
        read_gguf(path, "test")


def test_a_file_that_is_cut_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "model.gguf", tiny_model("llama", num_hidden_layers=1)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (*range(0, 2000, 13), len(whole) // 2, len(whole) - 128):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^test: .*cut.gguf must (be|lie within)"):
            read_gguf(cut, "test")


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """One byte of the header is another: what is read then is a model of its config, or nothing is."""
    whole = write_model(tmp_path / "model.gguf", tiny_model("llama", num_hidden_layers=1)).read_bytes()
    damaged, generator, messages = tmp_path / "damaged.gguf", random.Random(0), []
    for _ in range(400):
        place = generator.randrange(2000)
        damaged.write_bytes(whole[:place] + bytes([generator.randrange(256)]) + whole[place + 1 :])
        try:
            read = read_gguf(damaged, "test")
        except ValueError as error:
            messages.append(str(error))
        else:
            assert all(tensor.shape == read.tensors.shape(name) for name, tensor in read.tensors.items())
    assert len(messages) > 200 and all(message.startswith("test: ") for message in messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a GGUF file, got one that does not begin with GGUF"),
        (b"PK\x03\x04 an archive", "must be a GGUF file, got one that does not begin with GGUF"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "must be a whole GGUF file, got version 1 where version 2 or 3"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "must be a whole GGUF file, got a big-endian file where version 2 or 3"),
    ],
)
def test_what_is_no_gguf_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_gguf(path, "test")


def test_a_path_without_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(FileNotFoundError, match=r"test: .* must be a GGUF file, got no such file"):
            read_gguf(path, "test")


def test_without_the_package_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"test: a GGUF file .* Use pip install 'dynskip\[gguf\]'"):
        read_gguf(path, "test")


def test_the_config_of_a_real_model() -> None:
    """Its tensors are held against transformers' own reading in test_smollm2."""
    name = "smollm2-135m-instruct"
    try:
        path = packaged_file(name)
    except FileNotFoundError:
        pytest.skip(f"{PACKAGED[name][0]} is not installed")
    read = read_gguf(path, "test")
    assert len(read.tensors) == 272
    assert read.config == {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
        "attention_bias": False,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
