"""Heads of any size run on every backend; a slow one is named beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import cpu_backend, random_prompts, tiny_hf, word_tokenizer

from dynskip import LLM, OPTForCausalLM, SamplingParams
from dynskip.cli import main

NUM_HEADS = 2
HEAD_SIZES = [1, 5, 8, 20, 24, 40, 80, 96]


def model_of(head_size: int) -> Any:
    """transformers' model of two layers whose heads have that size."""
    hidden_size = NUM_HEADS * head_size
    sizes = {"hidden_size": hidden_size, "word_embed_proj_dim": hidden_size, "num_attention_heads": NUM_HEADS}
    return tiny_hf(num_hidden_layers=2, **sizes)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_model_generates_what_transformers_does(head_size: int, backend: str) -> None:
    hf_model = model_of(head_size)
    model = OPTForCausalLM.from_hf(hf_model, backend=cpu_backend(backend))
    prompts = random_prompts([9, 4])
    found = LLM(model, word_tokenizer()).generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    for prompt, output in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, hf_model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert list(output.token_ids) == ids[0, len(prompt) :].tolist()


# Under Triton's interpreter prompts in bfloat16 overflow, with heads of 16 elements as well.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        ("native", torch.bfloat16),
        ("native", torch.float16),
        ("triton", torch.float16),
    ],
)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_half_precision_decodes_as_whole_prompts_do(head_size: int, dtype: torch.dtype, backend: str) -> None:
    model = OPTForCausalLM.from_hf(model_of(head_size).to(dtype), backend=cpu_backend(backend))
    (prompt,) = random_prompts([7])
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1)
    (found,) = LLM(model, word_tokenizer()).generate([prompt], params)
    with torch.no_grad():
        exact = model_of(head_size)(input_ids=torch.tensor([[*prompt, *found.token_ids]])).logits[0].log_softmax(-1)
    for place, (token, logprobs) in enumerate(zip(found.token_ids, found.logprobs or [], strict=True)):
        expected = exact[len(prompt) - 1 + place, token].item()
        assert abs(logprobs[token] - expected) < 0.1, (place, logprobs, expected)


@pytest.mark.parametrize(("head_size", "expected"), [(20, "native, slower because heads of 20"), (32, "native")])
def test_info_names_the_attention(
    head_size: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu_backend("native")
    model_of(head_size).save_pretrained(tmp_path)
    assert main(["info", "--model", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]["decode_attention"]
    assert found.startswith(expected) and (found == "native") == (head_size % 16 == 0)
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert f"of decode {found}" in capsys.readouterr().out
