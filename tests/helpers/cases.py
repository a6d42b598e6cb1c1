"""Cases of parity with transformers: configs, named or drawn over all options, each with a ragged batch along paths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from families import DYNAMIC, FAMILIES, LINEAR, LLAMA3, YARN, family_hf
from models import NUM_LAYERS, VARIANTS, VOCAB_SIZE

from dynskip import LayerPath
from dynskip.models.architecture import ACTIVATIONS

NUM_DRAWS = 6
_SIZES: dict[str, list[Any]] = {
    "vocab_size": [VOCAB_SIZE, 103, 128],
    "num_hidden_layers": [2, 3, 4, 5, 6, 7],
    "num_attention_heads": [1, 2, 3, 4, 6, 8],
    "head_dim": [5, 6, 8, 11, 12, 16],
    "tie_word_embeddings": [False, True],
}
_PLACES = {"max_position_embeddings": [32, 64]}
_KEY_HEADS = {"num_key_value_heads": [1, 2, 3, 8]}  # at most
_FFN_SIZES = [20, 37, 48, 64]
_EPS = [1e-6, 1e-3, 0.1]
_ROTARY: dict[str, list[Any]] = {
    **_PLACES,
    "rope_parameters": [
        {"rope_type": "default"},
        LINEAR,
        DYNAMIC,
        LLAMA3,
        {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 2.0, "mscale_all_dim": 0.5},
        {**YARN, "attention_factor": 1.5},
    ],
    "rope_theta": [20.0, 100.0, 10000.0],
}
_GATED: dict[str, list[Any]] = {
    **_SIZES,
    **_ROTARY,
    **_KEY_HEADS,
    "head_dim": [6, 8, 10, 12, 16, 24],
    "intermediate_size": _FFN_SIZES,
    "hidden_act": list(ACTIVATIONS),
    "rms_norm_eps": _EPS,
}
_WINDOWS: dict[str, list[Any]] = {
    "use_sliding_window": [False, True],
    "sliding_window": [1, 2, 3, 5, 30],
    "max_window_layers": [0, 1, 2],
    "layer_types": [None, "any"],
}
_TURNED_IN_PART: dict[str, list[Any]] = {
    **_SIZES,
    **_ROTARY,
    "head_dim": [16, 24],
    "partial_rotary_factor": [0.25, 0.5, 0.75, 1.0],
    "intermediate_size": _FFN_SIZES,
    "hidden_act": list(ACTIVATIONS),
    "layer_norm_eps": _EPS,
}
# By family the values of every option that changes what is computed, or might; `_possible` adds hidden sizes.
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "opt": {
        **_SIZES,
        **_PLACES,
        "ffn_dim": _FFN_SIZES,
        "word_embed_proj_dim": [None, 8, 20],
        "activation_function": list(ACTIVATIONS),
        "layer_norm_elementwise_affine": [False, True],
        "do_layer_norm_before": [False, True],
        "_remove_final_layer_norm": [False, True],
        "enable_bias": [False, True],
    },
    "llama": {**_GATED, "attention_bias": [False, True], "mlp_bias": [False, True]},
    "mistral": {**_GATED, "sliding_window": [None, 1, 2, 3, 5, 30]},
    "qwen2": {**_GATED, **_WINDOWS},
    "qwen3": {**_GATED, **_WINDOWS, "attention_bias": [False, True]},
    "gpt_neox": {**_TURNED_IN_PART, "attention_bias": [False, True], "use_parallel_residual": [False, True]},
    "bloom": {
        **_SIZES,
        "seq_length": [32, 64],
        "layer_norm_epsilon": _EPS,
        "pretraining_tp": [1, 2],
        "slow_but_exact": [False, True],
    },
    "phi": {**_TURNED_IN_PART, **_KEY_HEADS},
    "gpt2": {
        **_SIZES,
        **_PLACES,
        "n_inner": [None, *_FFN_SIZES],
        "layer_norm_epsilon": _EPS,
        "activation_function": list(ACTIVATIONS),
        "scale_attn_weights": [False, True],
        "scale_attn_by_inverse_layer_idx": [False, True],
        "reorder_and_upcast_attn": [False, True],
    },
}


@dataclass(frozen=True, eq=False)
class Case:
    """A family with changes of its config, and a ragged batch: the length and the path of each sequence."""

    family: str
    name: str
    changes: dict[str, Any]
    lengths: list[int]
    paths: list[LayerPath]

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def hf(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """transformers' model with random weights."""
        return family_hf(self.family, seed, dtype, **self.changes)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.paths[0].num_layers


def named(family: str, name: str) -> Case:
    """A variant of the family."""
    return case(family, name, (VARIANTS if family == "opt" else FAMILIES[family])[name])


def case(family: str, name: str, changes: dict[str, Any]) -> Case:
    """With a random batch: one of its sequences has one token, one runs no layer, one all, and the others some."""
    generator = random.Random(f"batch of {family} {name}")
    num_layers = changes.get("num_hidden_layers", NUM_LAYERS)
    num_some = generator.randint(2, 3)
    lengths = [1, *(generator.randint(2, 12) for _ in range(num_some + 1))]
    sizes = [0, num_layers, *(generator.randint(1, num_layers - 1) for _ in range(num_some))]
    paths = [LayerPath.of(num_layers, generator.sample(range(num_layers), size), allow_empty=True) for size in sizes]
    generator.shuffle(lengths)
    generator.shuffle(paths)
    return Case(family, name, changes, lengths, paths)


def draws(family: str) -> list[Case]:
    """Random configs, over which the values of each option are spread evenly."""
    generator = random.Random(f"draws of {family}")
    columns = {name: _shuffled(generator, values) for name, values in OPTIONS[family].items()}
    rows = [{name: column[index] for name, column in columns.items()} for index in range(NUM_DRAWS)]
    return [case(family, f"draw{index}", _possible(row, generator)) for index, row in enumerate(rows)]


def all_cases(family: str) -> list[Case]:
    """The named variants and the draws."""
    return [*(named(family, name) for name in (VARIANTS if family == "opt" else FAMILIES[family])), *draws(family)]


def deepest(family: str) -> Case:
    """The draw with the most layers."""
    return max(draws(family), key=lambda drawn: drawn.num_layers)


def _shuffled(generator: random.Random, values: list[Any]) -> list[Any]:
    values = generator.sample(values, len(values))
    return generator.sample([values[index % len(values)] for index in range(NUM_DRAWS)], NUM_DRAWS)


def _possible(changes: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """``changes`` with the values that depend on each other."""
    num_heads = changes["num_attention_heads"]
    if "num_key_value_heads" in changes:
        most = changes["num_key_value_heads"]
        changes["num_key_value_heads"] = max(count for count in range(1, most + 1) if num_heads % count == 0)
        changes["hidden_size"] = num_heads * generator.randint(8, 16)
    else:
        changes["hidden_size"] = num_heads * changes.pop("head_dim")
    if changes.get("layer_types"):
        kinds = ["full_attention", "sliding_attention"][: 1 + changes["use_sliding_window"]]
        changes["layer_types"] = generator.choices(kinds, k=changes["num_hidden_layers"])
    if changes.get("pretraining_tp", 1) > 1:
        changes["slow_but_exact"] = False
    if "rope_parameters" in changes:
        outside = {name: changes.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in changes}
        changes["rope_parameters"] = {**changes["rope_parameters"], **outside}
        if "factor" in changes["rope_parameters"]:
            changes["rope_parameters"]["factor"] = generator.choice([1.5, 3.0, 8.0])
    return changes
