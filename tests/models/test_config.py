"""What a decoder is, as data: read from configs, known by name, and the sizes that follow."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import draws
from families import ALL_VARIANTS, FAMILIES, family_config
from models import VARIANTS, tiny_hf
from transformers import OPTConfig

from dynskip import OPTForCausalLM
from dynskip.costs.layer_costs import ModelBytes
from dynskip.measure.random_models import hf_config
from dynskip.models.config import Rotary
from dynskip.models.opt import opt_shape
from dynskip.models.registry import decoder_config, read_decoder_config
from dynskip.models.shapes import SHAPES


def test_a_model_is_a_known_shape_or_a_folder(tmp_path: Path) -> None:
    shape = read_decoder_config("opt-1.3b")
    assert shape.layer_matrices == {
        "fc1": (8192, 2048),
        "fc2": (2048, 8192),
        "qkv": (6144, 2048),
        "out_proj": (2048, 2048),
    }
    assert shape.head_matrix == (50272, 2048) and shape.kv_entry_size == 4096
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "vocab_size": 48}
    config = {"model_type": "opt", "word_embed_proj_dim": 32, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_decoder_config(str(tmp_path)) == replace(opt_shape(2, 32, 2, 64), vocab_size=48)
    with pytest.raises(ValueError, match=r"read_decoder_config: model must be one of opt-1.3b, .*, got 'opt-9b'"):
        read_decoder_config("opt-9b")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config must describe a model of type opt, .*, got model_type 'bert'"):
        read_decoder_config(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, FAMILIES[family][name]) for family, name in ALL_VARIANTS),
        *((drawn.family, drawn.changes) for family in FAMILIES if family != "opt" for drawn in draws(family)),
    ],
)
def test_a_config_comes_back_from_a_decoder(family: str, changes: dict[str, Any]) -> None:
    decoder = decoder_config(family_config(family, **changes))
    if decoder.rotary is not None:
        with pytest.raises(ValueError, match=r"rope_theta: rotary must be Rotary.plain\(.*, got frequencies"):
            hf_config(replace(decoder, rotary=Rotary(decoder.rotary.frequencies, 1.5)))
        decoder = replace(decoder, rotary=Rotary.plain(decoder.rotary_size, 100))
    again = decoder_config(hf_config(decoder))
    if again.rotary is not None:
        assert again.rotary.frequencies == pytest.approx(decoder.rotary.frequencies, rel=1e-5)
        again = replace(again, rotary=decoder.rotary)
    assert again == decoder


def test_heads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads must divide hidden_size 10, got 3"):
        decoder_config(OPTConfig(hidden_size=10, num_attention_heads=3))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_and_its_config_say_the_same(name: str) -> None:
    shape, config = SHAPES[name], decoder_config(hf_config(name))
    if shape.rotary is not None and config.rotary is not None:  # transformers works them out in float32
        assert config.rotary.frequencies == pytest.approx(shape.rotary.frequencies, rel=1e-5)
        config = replace(config, rotary=shape.rotary)
    assert config == shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_those_of_the_weights(variant: str) -> None:
    hf_model = tiny_hf(variant)
    model = OPTForCausalLM.from_hf(hf_model, pack=False)
    config = model.decoder_config
    assert model.num_layers == config.num_layers
    layer = hf_model.model.decoder.layers[0]
    weights = sum(p.numel() for name, p in layer.named_parameters() if p.dim() == 2)
    assert weights == config.layer_size == sum(map(math.prod, config.layer_matrices.values()))
    size = ModelBytes.of(config, model.dtype.itemsize)
    assert size.layer_bytes == weights * model.dtype.itemsize and size.layer_flops_per_row == 2 * weights
    assert size.kv_entry_bytes == model.kv_entry_bytes == 2 * config.hidden_size * model.dtype.itemsize


def test_shapes_need_no_torch() -> None:
    code = "import sys, dynskip.models.shapes; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
