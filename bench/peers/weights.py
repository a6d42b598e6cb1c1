"""The files that peers load: ``python -m bench.peers.weights KIND SHAPE OUT`` writes one of them.

folder: what transformers, vLLM and dynskip read; random bf16 weights, or SmolLM2's, with eight prompts beside them;
those tuned for paths have the adapter merged.
ctranslate2: its export of random weights. gguf: SmolLM2's GGUF file with its matrices in bf16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dynskip.assets import find_model
from dynskip.measure.random_models import hf_config, random_hf_model

SMOLLM2 = "smollm2-135m"
SMOLLM2_PATHS = "smollm2-135m-paths"
_SMOLLM2_NAME = "smollm2-135m-instruct"
PROMPTS_FILE = "prompts.json"
QUESTIONS = (
    "Name three kinds of cheese.",
    "Why does bread rise?",
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "How many days does a week have?",
    "Explain what a transformer is in one sentence.",
    "Give me a recipe for pancakes.",
    "What should a letter to a landlord say?",
)


def write_folder(shape: str, out: Path) -> None:
    """A checkpoint folder in bf16."""
    if shape not in (SMOLLM2, SMOLLM2_PATHS):
        random_hf_model(hf_config(shape)).save_pretrained(out)
        return
    from dynskip.llm import LLM

    llm = LLM(_SMOLLM2_NAME if shape == SMOLLM2 else SMOLLM2_PATHS)
    prompts = [llm.chat_prompt(question) for question in QUESTIONS]
    llm.model.unpack_().save_pretrained(out)
    (out / PROMPTS_FILE).write_text(json.dumps(prompts), encoding="utf-8")


def write_ctranslate2(shape: str, out: Path) -> None:
    """CTranslate2's export of the same random weights."""
    from dynskip.benchmark.ctranslate2_runner import export

    export(random_hf_model(hf_config(shape)), out)


def write_gguf(shape: str, out: Path) -> None:
    """The GGUF file of SmolLM2 with each quantized matrix made dense and rounded to bf16."""
    import gguf

    assert shape == SMOLLM2, shape
    reader = gguf.GGUFReader(smollm2_gguf())
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        # The writer has its own idea of the first ones, and the last two are about the old file.
        if name.startswith("GGUF.") or name in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if dense.ndim == 1:
            writer.add_tensor(tensor.name, dense)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(dense, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2_gguf() -> str:
    """The 4-bit file of SmolLM2 that a package ships."""
    return str(find_model(_SMOLLM2_NAME))


KINDS: dict[str, Any] = {"folder": write_folder, "ctranslate2": write_ctranslate2, "gguf": write_gguf}


def main(kind: str, shape: str, out: str) -> int:
    """Write the file or folder under another name, and rename it once it is whole."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    KINDS[kind](shape, part)
    part.rename(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
