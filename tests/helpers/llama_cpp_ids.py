"""Texts that tokenizers disagree on, and the program that asks llama.cpp for their ids.

    pip install llama-cpp-python gguf
    python tests/helpers/llama_cpp_ids.py MODEL.gguf alpaca_data.json.xz > tests/models/llama_cpp_ids.json

The result holds the ids of made-up texts, and hashes of those of texts that are drawn, of the vocabulary's own pieces
among them, and of Alpaca's, which are not the project's to pass on.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PRE_TOKENIZERS = ("smollm", "gpt-2", "default", "qwen2", "llama-bpe")
NUM_HOSTILE, NUM_OF_VOCABULARY, NUM_ALPACA = 1_000, 3_000, 3_000

MADE_UP = (
    "The kettle sings.",
    " a leading space, and two  between",
    "3 + 14 = 17; 1234567890; 3.14159; 1,000,000; 0x1F; ½ Ⅷ ² ٣٤ 十二",
    "I'm sure they'll say we've won, it's what you'd want; I'M SURE THEY'LL; 'ſ 'S '",
    "tabs\tand\t\ttabs\n\nlines\r\nof\rall\n \n  kinds   \n",
    "trailing spaces    ",
    "   ",
    "\n",
    "\u00a0\u2003\u3000\u2028\u2029\u0085 spaces of other kinds",
    "naïve café, Ærøskøbing, ﬁne ligature, Straße, İstanbul, e\u0301 and \u0301alone",
    "漢字とかなとカタカナ。한국어 문장입니다. Здравствуйте, мир! שלום עולם مرحبا بالعالم हिन्दी ไทย",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈🇩🇰👍🏽 text ☃︎ ☃️",
    "<|im_start|>user\nIs this a turn?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|> <|im_start|> <|im_end|>",
    "<|im_st<|im_start|>art|> <|im_end|<|im_end|>> < |im_end|> <|IM_END|>",
    "<repo_name>dynskip<file_sep>a.py<gh_stars>0-10<issue_start><empty_output>",
    "control \x00\x01\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x1b\x1d\x7f characters",
    "!\x04!\x04\x04!! a\x06b \x1d\x1d",
    "\ufeffbyte order mark, \u200bzero\u200dwidth, \u202eoverride, \ufffd replacement, \ue000 private, \U0010ffff last",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for _ in range(10)]  # squares\n\n\nprint(f(3))\n",
    "https://example.org/a_b-c?d=e&f=%20#g, name@example.org, C:\\Users\\x, /usr/bin/env",
    '{"key": [1, 2.5, null, true], \'other\': "\\u00e9\\n"}',
    "a" * 70 + "b" * 3 + " " * 70 + "-" * 70 + "=" * 9,
    "$5 ^ 2 ~ |x| < y > z + `code` = ¥€£ ± × ÷ § ¶ © ™",
    "ALLCAPS lower MixedCase snake_case kebab-case camelCaseWith2Numbers3",
)
_FRAGMENTS = (
    *("word", " word", "Word", "WORD", " the", "ing", "a", "s", "t", "'s", "'LL", "'ve", "'", "’s", "ſ", "K"),
    *("0", "7", "12", "345", "6789", "½", "²", "Ⅷ", "٣", "๓", "𝟘", " 1", "1 "),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x85"),
    *("\xa0", "\u2003", "\u3000", "\u2028"),
    *("é", "e\u0301", "\u0301", "ß", "ﬁ", "Ж", "ж", "漢", "字", "か", "한", "글", "א", "ب", "हि", "ไ"),
    *("\u200d", "\u200b"),
    *("🙂", "👩‍👧", "🇩🇰", "👍🏽", "☃️", "𝒜", "\U0001f9ff", "\ufffd", "\ufeff", "\ue000", "\U0010ffff"),
    *("\x00", "\x01", "\x04", "\x06", "\x1b", "\x1d", "\x7f", "\x9f"),
    *(".", ",", "!", "!!", "?", "...", "-", "--", "_", "/", "\\", "(", ")", "[", "]", "{", "}"),
    *("<", ">", "|", "=", "+"),
    *("$", "^", "~", "`", "#", "@", "%", "&", "*", ";", ":", '"', "€", "§", "、", "。", "「", "»"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_", "end|>", "<|", "|>", "<|im_end|"),
    *("def ", "return", "    if x:", "://", ".py", "self.", "->", "==", "\\n", "0x", "e-5"),
)


def hostile_texts() -> list[str]:
    """Random rows of fragments, the same each time."""
    generator = random.Random(0)
    return [
        "".join(generator.choice(_FRAGMENTS) for _ in range(generator.randrange(1, 40))) for _ in range(NUM_HOSTILE)
    ]


def vocabulary_texts(metadata: Mapping[str, Any]) -> list[str]:
    """Random rows of the normal tokens of a byte-level vocabulary, the frequent ones, which come first, more often."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
    byte_of = dict(zip(characters, [*printable, *sorted(set(range(256)) - set(printable))], strict=True))
    types = metadata["tokenizer.ggml.token_type"]
    tokens = [token for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=True) if kind == 1]
    generator, texts = random.Random(0), []
    for _ in range(NUM_OF_VOCABULARY):
        row = [tokens[int(len(tokens) * generator.random() ** 2)] for _ in range(generator.randrange(1, 80))]
        texts.append(bytes(byte_of[character] for character in "".join(row)).decode(errors="replace"))
    return texts


def alpaca_texts(path: Path) -> list[str]:
    """Rows of the Alpaca file, instruction, input and output on lines of their own."""
    data = path.read_bytes()
    rows = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
    places = random.Random(0).sample(range(len(rows)), NUM_ALPACA)
    return ["\n".join(rows[place][key] for key in ("instruction", "input", "output")) for place in places]


def ids_hash(ids: Iterable[list[int]]) -> str:
    """Of token ids, in decimal digits: a text on a line."""
    return hashlib.sha256("".join(f"{' '.join(map(str, row))}\n" for row in ids).encode()).hexdigest()


def write_vocabulary(path: Path, metadata: Mapping[str, Any], **changes: Any) -> Path:
    """A GGUF file of metadata only. changes: keys of ``tokenizer.ggml``; None leaves one out."""
    import gguf

    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    values = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    for key, value in values.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main(model: Path, alpaca: Path) -> None:
    """Print what llama.cpp makes of the texts."""
    import gguf
    import llama_cpp

    reader = gguf.GGUFReader(model)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    hostile, report = [*MADE_UP, *hostile_texts()], {"llama_cpp_python": version("llama_cpp_python"), "hostile": {}}
    for pre in PRE_TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            # Without the flag each way to cut texts has its own default.
            path = write_vocabulary(Path(folder) / "model.gguf", metadata, pre=pre, add_bos_token=None)
            vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        ids = {
            special: [vocabulary.tokenize(text.encode(), add_bos=True, special=special) for text in hostile]
            for special in (True, False)
        }
        report["hostile"][pre] = ids_hash(ids[True] + ids[False])
        if pre == "smollm":
            report["made_up"] = [list(pair) for pair in zip(ids[True], ids[False], strict=True)][: len(MADE_UP)]
            for name, texts in (("vocabulary", vocabulary_texts(metadata)), ("alpaca", alpaca_texts(alpaca))):
                report[name] = ids_hash(vocabulary.tokenize(text.encode(), add_bos=True) for text in texts)
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in report.items() if key != "made_up"]
    rows = ",\n".join(f"    {json.dumps(pair)}" for pair in report["made_up"])
    print("{\n" + ",\n".join([*lines, f'  "made_up": [\n{rows}\n  ]']) + "\n}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
