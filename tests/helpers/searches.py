"""Searches on tiny models, one of whose layers may do nothing: rows in words that its tokenizer knows, and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_hf, word_tokenizer

from dynskip import CausalLM
from dynskip.search.run import PathSearch, SearchOptions

OPTIONS = SearchOptions((4, 2), num_rows=4, num_judge_rows=4)


def with_useless_layer(layer: int, **options: Any) -> CausalLM:
    """A tiny model whose ``layer`` passes its input on."""
    hf_model = tiny_hf()
    useless = hf_model.model.decoder.layers[layer]
    with torch.no_grad():
        for part in (useless.self_attn.out_proj, useless.fc2):
            part.weight.zero_()
            part.bias.zero_()
    return CausalLM.from_hf(hf_model, **{"backend": "torch", **options})


def data_file(folder: Path, num_rows: int = 40) -> Path:
    """An Alpaca file of random words."""
    lengths = [length for row in range(num_rows) for length in (3, 9 + row % 9)]
    texts = [" ".join(f"w{token:03}" for token in ids) for ids in random_prompts(lengths)]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def search(model: CausalLM, folder: Path, options: SearchOptions = OPTIONS) -> PathSearch:
    """A search in ``folder``, which holds its data as well."""
    return PathSearch(model, word_tokenizer(), data_file(folder), options, folder / "run")


assert NUM_LAYERS == 6 and VOCAB_SIZE == 101, "the options and the words are for such models"
