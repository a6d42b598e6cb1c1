"""The data of a sweep: the paper's splits, rows that cannot be scored, and data that is no Alpaca."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from evaluation_models import rows, save_checkpoint, tiny_setup
from families import FAMILIES
from gguf_files import tiny_model, write_model
from models import word_tokenizer

from dynskip.data.corpus import Instruction, split_instructions
from dynskip.evaluation.sweep.checkpoints import Checkpoint, check_tokenizer
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.dataset import duplicates, encode_prompts, read_splits
from dynskip.evaluation.sweep.setup import Setup, scaled
from dynskip.evaluation.tasks.prompt_facts import template_heads

pytest.importorskip("datasets", reason="datasets is not installed")

ALPACA = os.environ.get("DYNSKIP_ALPACA")
# By split: rows, place in the file of the first and the last row, and both rows themselves.
SPLITS = {
    "train": (36_401, 51_176, 9_864, "968759d5e9501434", "bc8e32d9fe287fb2"),
    "validation": (7_800, 25_841, 24_230, "e096790b11919f6a", "2192836728a45bb5"),
    "test": (7_801, 34_978, 45_187, "266c51be40ef6229", "1e9633075dba09b9"),
}


def row_hash(row: Instruction) -> str:
    return hashlib.sha256("\x1f".join((row.instruction, row.input, row.output)).encode()).hexdigest()[:16]


def test_the_split_is_the_papers_by_place() -> None:
    numbered = [Instruction(str(place), "", "x") for place in range(52_002)]
    for part, (size, first, last, _, _) in zip(split_instructions(numbered), SPLITS.values(), strict=True):
        assert (len(part), part[0].instruction, part[-1].instruction) == (size, str(first), str(last))


@pytest.mark.skipif(not ALPACA, reason="DYNSKIP_ALPACA names no alpaca_data.json of tatsu-lab/stanford_alpaca")
def test_the_split_is_the_papers_by_content() -> None:
    assert ALPACA, "else it was skipped"
    splits = read_splits(Path(ALPACA))
    for name, (size, _, _, first, last) in SPLITS.items():
        part = splits[name]
        assert (len(part), row_hash(part[0]), row_hash(part[-1])) == (size, first, last)
    assert set(duplicates(splits).values()) == {0}


def test_rows_that_cannot_be_scored_are_counted() -> None:
    tokenizer = word_tokenizer()
    good = Instruction("w010 w011", "", "w012 w013")
    instructions = [good, Instruction("w010", "", " \n"), Instruction("w010 " * 60, "", "w012"), good, good]
    prompts = encode_prompts(instructions, tokenizer, 64, max_tokens=8, template="short", num_prompts=2)
    assert [row.index for row in prompts.rows] == [0, 3] and (prompts.empty, prompts.too_long) == (1, 1)
    row = prompts.rows[0]
    assert row.response_ids[-1] == tokenizer.eos_token_id and row.reference == "w012 w013"
    with pytest.raises(ValueError, match=r"prompts must be at most the 3 rows .* got 4 \(1 rows have no response, 1"):
        encode_prompts(instructions, tokenizer, 64, 8, "short", 4)
    with pytest.raises(ValueError, match="template must be one of alpaca, chat, short, got 'long'"):
        encode_prompts(instructions, tokenizer, 64, 8, "long", 1)


def test_a_prompt_may_stand_in_the_tokenizers_own_template() -> None:
    tokenizer = word_tokenizer()
    with_input = Instruction("w010 w011", "w020", "w012")
    with pytest.raises(ValueError, match="template must be alpaca or short with a tokenizer that has no chat template"):
        encode_prompts([with_input], tokenizer, 64, 8, "chat", 1)
    tokenizer.chat_template = "{% for message in messages %}w050 {{ message['content'] }} w051{% endfor %}"
    (row,) = encode_prompts([with_input], tokenizer, 64, 8, "chat", 1).rows
    wanted = [tokenizer.convert_tokens_to_ids(word) for word in ("w050", "w010", "w011", "w020", "w051")]
    assert [token for token in row.prompt_ids if token in wanted] == wanted
    heads = template_heads(tokenizer, "chat")
    assert all(head[0] == wanted[0] for head in heads)


def test_rows_in_two_splits_are_reported() -> None:
    row, other = Instruction("a", "b", "c"), Instruction("a", "b", "d")
    found = duplicates({"train": [row], "validation": [other], "test": [row, row, other]})
    assert found["rows of test in train"] == 2 and found["prompts of test in train"] == 3
    assert found["rows of validation in train"] == 0 and found["prompts of validation in train"] == 1
    assert found["rows of test in validation"] == 1


@pytest.mark.parametrize("changed", [{"output": None}, {"instruction": 5}, "output", "instruction"])
def test_data_without_the_fields_is_named(tmp_path: Path, changed: Any) -> None:
    table: list[dict[str, Any]] = list(rows(10))
    if isinstance(changed, str):
        del table[3][changed]
    else:
        table[3].update(changed)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(table))
    read_splits.cache_clear()
    with pytest.raises(ValueError, match=r"data.json must hold .* instruction, input and output, .* for row 3"):
        read_splits(path)


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model")
    llm_config = Checkpoint.of(directory)
    assert llm_config.num_layers == 6
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    tokenizer = word_tokenizer()
    check_tokenizer(tokenizer, config, directory)
    with pytest.raises(ValueError, match="must come with a tokenizer, got none"):
        check_tokenizer(None, config, directory)
    config.eos_token_id = 7
    with pytest.raises(ValueError, match="must end texts with the model's token 7, got 2"):
        check_tokenizer(tokenizer, config, directory)
    config.vocab_size = 50
    with pytest.raises(ValueError, match="must know token ids below the model's 50, got 100"):
        check_tokenizer(tokenizer, config, directory)


def test_a_checkpoint_may_be_of_any_architecture(tmp_path: Path) -> None:
    for family in FAMILIES:
        assert Checkpoint.of(save_checkpoint(tmp_path / family, family=family)).num_layers == 6
    write_model(tmp_path / "a.gguf", tiny_model("llama"))
    found = Checkpoint.of(tmp_path / "a.gguf")
    assert (found.directory, found.num_layers) == (tmp_path / "a.gguf", 2)
    write_model(tmp_path / "b.gguf", tiny_model("llama"), general__description="another")
    assert Checkpoint.of(tmp_path / "b.gguf").hash != found.hash
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match=r"Checkpoint.of: .* must hold a model of type opt, .*, got model_type 'bert'"):
        Checkpoint.of(tmp_path / "llama")


def test_a_sweep_refuses_such_a_checkpoint(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    config_path = tmp_path / "model" / "generation_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "eos_token_id": 9}))
    with pytest.raises(ValueError, match="must end texts with the model's token 9, got 2"):
        Context(tiny_setup(tmp_path)).llm(Checkpoint.of(tmp_path / "model").hash)
    assert setup.checkpoint.hash != Checkpoint.of(tmp_path / "model").hash


def test_a_sibling_with_other_words_is_named(tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["another"] = vocab.pop("w050")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    setup = tiny_setup(tmp_path, siblings={2: str(other)})
    with pytest.raises(ValueError, match=r"sibling .*other must have the vocabulary"):
        Context(setup).prompts(setup.siblings[0][1].hash, "test")


def test_the_hash_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    first, second = save_checkpoint(tmp_path / "first"), save_checkpoint(tmp_path / "second")
    assert Checkpoint.of(first).hash == Checkpoint.of(second).hash
    assert Checkpoint.of(save_checkpoint(tmp_path / "third", seed=1)).hash != Checkpoint.of(first).hash
    (second / "notes.txt").write_text("notes are no part of a model")
    assert Checkpoint.of(first).hash == Checkpoint.of(second).hash


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"budgets": (2, 7)}, "budgets must lie in 1..6, the layers of the model, got 7"),
        ({"candidates": (0,)}, "candidates must lie in 1..6, the layers of the model, got 0"),
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"split": "dev"}, "split must be one of train, validation, test, got 'dev'"),
        ({"template": "long"}, "template must be one of alpaca, chat, short, got 'long'"),
    ],
)
def test_what_a_model_cannot_do_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_setup(tmp_path, **changes)


def test_missing_files_are_named(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    with pytest.raises(FileNotFoundError, match="data must be a file"):
        Setup.of(str(tmp_path / "model"), tmp_path / "nothing.json", {})
    with pytest.raises(FileNotFoundError, match="must be a directory, got no such directory"):
        Setup.of(str(tmp_path / "nothing"), setup.data, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json and weights, got no config\.json and no weig"):
        Setup.of(str(tmp_path / "empty"), setup.data, {})


def test_a_sibling_has_the_depth_of_the_model_or_its_budget(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path, siblings={2: str(tmp_path / "model")})
    assert setup.siblings[0][1] == setup.checkpoint
    with pytest.raises(ValueError, match=r"sibling must have a budget in 1\.\.6, got 8"):
        tiny_setup(tmp_path, siblings={8: str(tmp_path / "model")})


def test_budgets_of_fewer_layers_are_shares_of_24() -> None:
    assert scaled((4, 8, 12, 16, 20), 24) == scaled((4, 8, 12, 16, 20), 32) == (4, 8, 12, 16, 20)
    assert scaled((4, 8, 12, 16, 20), 12) == (2, 4, 6, 8, 10)
    assert scaled((4, 8, 12, 16, 20), 6) == (1, 2, 3, 4, 5)
    assert scaled((4, 8, 12, 16, 20), 4) == (1, 2, 3)
