"""Saved tiny models that a test may change, and whether what is loaded from them computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ragged_batch, tiny_hf, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip import OPTForCausalLM

INPUT_IDS, ATTENTION_MASK = ragged_batch([5, 3], "left")


# peft still asks transformers by names that are deprecated.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS, attention_mask=ATTENTION_MASK).logits[ATTENTION_MASK.bool()]


def same_logits(model: OPTForCausalLM, hf_model: Any) -> None:
    torch.testing.assert_close(logits(model), logits(hf_model), rtol=1e-4, atol=1e-4)


def saved_model(directory: Path) -> Path:
    """``directory``, with a tiny model and its tokenizer in it."""
    tiny_hf().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


def load(folder: Path) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(folder, dtype="float32", backend="torch")


def other_head(hf_model: Any) -> Tensor:
    return hf_model.lm_head.weight.detach().roll(1, 0).contiguous()


def check_untied(model: OPTForCausalLM, hf_model: Any, tmp_path: Path) -> None:
    same_logits(model, hf_model)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "saved")
    same_logits(OPTForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32", backend="torch"), hf_model)
    same_logits(model, HFOPTForCausalLM.from_pretrained(tmp_path / "saved").eval())
    model.unpack_()
    assert model.lm_head.weight is not model.decoder.embed_tokens.weight
