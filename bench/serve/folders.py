"""Checkpoint folders that servers load: those of `bench.peers.weights`, with a tokenizer for every token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.peers.weights import SMOLLM2
from dynskip.assets import opt_mini_directory
from dynskip.llm import LLM
from dynskip.models.registry import read_decoder_config

REHEARSAL = "opt-mini"
_TOKENIZER_FILE = "tokenizer.json"


def served_folder(models: Path, shape: str) -> Path:
    """The folder of ``shape`` below ``models``, made where it is not there.

    Random weights get SmolLM2's tokenizer, with tokens added up to the vocabulary: a server makes text of every token.
    """
    if shape == REHEARSAL:
        return opt_mini_directory()
    folder = models / shape
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "bench.peers.weights", "folder", shape, str(folder)], check=True)
    if not (folder / _TOKENIZER_FILE).exists():
        tokenizer = LLM(f"{SMOLLM2}-instruct").tokenizer
        assert tokenizer is not None, "the file holds one"
        missing = read_decoder_config(str(folder)).vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<extra {number}>" for number in range(missing)])
        tokenizer.save_pretrained(folder)
    return folder
