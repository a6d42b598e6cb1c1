"""Random LoRA adapters of tiny models, made and saved by peft."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from families import family_hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynskip import CausalLM
from dynskip.models.adapter import read_adapter
from dynskip.models.source_files import read_source
from dynskip.models.weights import Deferred

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_GATED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
# All matrices of a layer.
TARGETS = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _GATED),
    **dict.fromkeys(("gpt_neox", "bloom"), _FUSED),
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def adapted(hf_model: Any, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """peft's model around a copy of transformers', with a random adapter of all matrices that is saved in ``folder``.

    changes: of peft's LoraConfig.
    """
    family = hf_model.config.model_type
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": TARGETS[family],
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": family == "gpt2",
        "init_lora_weights": False,
    }
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(hf_model), peft.LoraConfig(**{**options, **changes})).eval()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def change_factors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def adapted_llama(folder: Path) -> tuple[Any, Path, Path]:
    """peft's model of a tiny Llama, the folder of its base, and that of its adapter."""
    hf_model = family_hf("llama")
    hf_model.save_pretrained(folder / "base")
    return adapted(hf_model, folder / "adapter"), folder / "base", folder / "adapter"


def load(base: Path, adapter: Path | str, **options: Any) -> CausalLM:
    return CausalLM.from_pretrained(base, **{"dtype": "float32", "backend": "torch", **options}, adapter=adapter)


def undecided(base: str | Path, adapter: str | Path) -> int:
    """How many merged weights another order of sums in float64 could round to another number of bfloat16."""
    read, plain = read_adapter(adapter, "test"), read_source(base).tensors
    count = 0
    for module, factors in read.factors.items():
        rank, scale = read.rank_and_scale(module)
        held = plain[f"{module}.weight"]
        weight = (held.read() if isinstance(held, Deferred) else held).double()
        a, b = factors["A"].double(), factors["B"].double()
        # Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; doubled for what it leaves out.
        error = 2 * rank * 2**-53 * (b.abs() @ a.abs())
        least, most = ((weight + scale * (b @ a + sign * error)).float().bfloat16() for sign in (-1, 1))
        for row, column in (least != most).nonzero().tolist():
            count += not _is_exact(b[row], a[:, column], torch.finfo(factors["A"].dtype))
    return count


def _is_exact(left: Tensor, right: Tensor, held_as: torch.finfo) -> bool:
    """Whether the products of two float64 vectors, held as ``held_as``, sum in any order without rounding.

    They do where all of them are multiples of a power of two that is no less than 2**-53 of their sum.
    """
    products = left * right
    used = products != 0
    exponents = torch.frexp(left[used])[1] + torch.frexp(right[used])[1]
    digits = 1 - round(math.log2(held_as.eps))
    return not used.any() or float(products.abs().sum()) < 2.0 ** (int(exponents.min()) - 2 * digits + 53)
