"""Folders as LayerSkip's checkpoints are published: Llama in shards, whose config is one of transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import cut_family, family_hf
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, word_tokenizer
from transformers import AutoModelForCausalLM

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.models.config import Rotary

LENGTHS = [7, 1, 12, 4]
EXITS = [LayerPath.early_exit(NUM_LAYERS, budget) for budget in (1, 3, 5, NUM_LAYERS)]
# The keys of config.json in the checkpoints from Llama 2 and from Llama 3.2, at sizes that take no time.
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {
        **COMMON,
        "_name_or_path": "facebook/layerskip-llama2-7B",
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.45.2",
    },
    "llama3.2": {
        **COMMON,
        "_name_or_path": "facebook/layerskip-llama3.2-1B",
        "head_dim": 8,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        },
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.45.2",
    },
}


def published(folder: Path, name: str) -> Path:
    """``folder`` with random weights in shards, the config ``name``, and where generation may leave the layers."""
    values = CONFIGS[name]
    sizes = {key: values[key] for key in ("num_key_value_heads", "tie_word_embeddings")}
    family_hf("llama", **sizes).save_pretrained(folder, max_shard_size="16KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    (folder / "config.json").write_text(json.dumps(values))
    generation = {"bos_token_id": 0, "eos_token_id": 2, "assistant_early_exit": 3, "transformers_version": "4.45.2"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_exit_paths_are_transformers_first_layers(name: str, tmp_path: Path) -> None:
    folder = published(tmp_path, name)
    llm = LLM(str(folder), dtype="float32")
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert llm.model.decoder_config.is_head_tied == CONFIGS[name]["tie_word_embeddings"]
    assert llm.model.num_layers == NUM_LAYERS and llm.model.eos_token_ids == (2,)
    prompts = random_prompts(LENGTHS)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), paths=EXITS)
    texts = set()
    for prompt, path, output in zip(prompts, EXITS, outputs, strict=True):
        assert len(output.token_ids) == 8
        row = torch.tensor([[*prompt, *output.token_ids]])
        with torch.no_grad(), cut_family(hf_model, path):
            expected = hf_model(row, use_cache=False).logits
        assert list(output.token_ids) == expected[0, len(prompt) - 1 : -1].argmax(-1).tolist(), str(path)
        torch.testing.assert_close(llm.model(row, paths=path).logits, expected, rtol=1e-4, atol=1e-4)
        texts.add(tuple(output.token_ids))
    assert len(texts) == len(EXITS)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_come_back(name: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "published", name)
    llm = LLM(str(folder))
    assert llm.model.dtype == torch.bfloat16
    rotary, plain = llm.model.decoder_config.rotary, Rotary.plain(8, CONFIGS[name]["rope_theta"])
    assert rotary is not None
    is_plain = rotary.frequencies == pytest.approx(plain.frequencies, rel=1e-6)
    assert is_plain == (CONFIGS[name]["rope_scaling"] is None)
    llm.model.save_pretrained(tmp_path / "saved")
    saved, before = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (tmp_path / "saved", folder)
    )
    assert saved.config.rope_parameters == before.config.rope_parameters
    for key, weight in before.state_dict().items():
        assert torch.equal(saved.state_dict()[key], weight), key
