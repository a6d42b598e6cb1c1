"""Training: the data say each thing once, a run killed and resumed equals one that was left alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import lzma
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("accelerate", reason="training needs the extra 'train' (accelerate)")
pytest.importorskip("datasets", reason="the split of Alpaca needs the extra 'train' (datasets)")

from training_runs import SHAPE, examples_of_lengths, made_up_passages, made_up_rows, small_run, wake_layers
from training_runs import corpora as data
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

from dynskip import LayerPath
from dynskip.cli import main
from dynskip.cli.train import evaluator
from dynskip.data.batches import IGNORED, BatchPlan, group_by_length, group_in_order, pad_examples
from dynskip.data.corpus import (
    Instruction,
    read_corpus,
    read_instructions,
    read_passages,
    split_instructions,
    unique_passages,
)
from dynskip.data.examples import encode_examples, encode_windows
from dynskip.data.templates import INSTRUCTION_MARK, RESPONSE_MARK, prompt_text
from dynskip.models.hf_model import only_layers
from dynskip.training import attention
from dynskip.training.bits_per_byte import bits_per_byte
from dynskip.training.pretrain.config import opt_mini
from dynskip.training.pretrain.optimizer import MuonWithAdamW
from dynskip.training.pretrain.run import TrainingRun, new_model
from dynskip.training.pretrain.tokenizer import train_tokenizer
from dynskip.training.response_loss import head_loss
from dynskip.training.resumable import latest_checkpoint
from dynskip.training.schedule import Clock, LearningRate, PathMenu

__all__ = ["data"]  # a fixture


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for row in made_up_rows(120) for text in (row.instruction, row.output)] + made_up_passages(30)
    return train_tokenizer(texts, SHAPE.vocab_size, SHAPE.max_positions, progress=False)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    return new_model(SHAPE, tokenizer, seed=0)


def test_split_is_70_15_15_and_repeats_itself() -> None:
    rows = made_up_rows(100)
    parts = split_instructions(rows)
    assert [len(part) for part in parts] == [70, 15, 15]
    assert {row.instruction for part in parts for row in part} == {row.instruction for row in rows}
    assert split_instructions(rows) == parts
    assert split_instructions(rows, seed=43) != parts


def test_split_is_the_one_of_datasets() -> None:
    from datasets import Dataset

    rows = made_up_rows(200)
    table = Dataset.from_list([dataclasses.asdict(row) for row in rows])
    first = table.train_test_split(test_size=0.3, seed=42)
    held_out = first["test"].train_test_split(test_size=0.5, seed=42)
    train, validation, test = split_instructions(rows)
    assert [row.instruction for row in train] == list(first["train"]["instruction"])
    assert [row.instruction for row in validation] == list(held_out["train"]["instruction"])
    assert [row.instruction for row in test] == list(held_out["test"]["instruction"])


def test_passages_are_counted_once() -> None:
    passage = "A heron stood in the reeds for most of the morning. Nobody saw it leave. The pond was still."
    news = "The ferry to the northern islands was late again on Tuesday, the harbour master told us."
    texts = [f"Is this true?\n{passage}", f"{passage}\nWhat stood?", "short", f"{passage} {news}<|endoftext|>", news]
    assert unique_passages(texts) == [passage]
    assert unique_passages([news + "<|endoftext|>", passage]) == [news, passage]
    assert unique_passages(texts, min_fresh=0.4) == [passage, f"{passage} {news}"]


def test_corpus_reads_what_the_files_are(data: list[Path]) -> None:
    corpus = read_corpus(data)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (84, 18, 18)
    assert 0 < len(corpus.passages) <= 30
    with pytest.raises(ValueError, match=r"read_corpus: paths must name an Alpaca file, got none"):
        read_corpus(data[1:])


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_byte_order_mark_is_no_data(suffix: str, tmp_path: Path) -> None:
    rows, passages = tmp_path / f"rows.json{suffix}", tmp_path / f"passages.jsonl{suffix}"
    contents = {
        rows: json.dumps([dataclasses.asdict(row) for row in made_up_rows(9)]),
        passages: json.dumps({"prompt": made_up_passages(1)[0], "completion": ""}) + "\n",
    }
    for path, text in contents.items():
        content = text.encode("utf-8-sig")
        path.write_bytes(lzma.compress(content) if suffix else content)
    assert read_instructions(rows) == made_up_rows(9)
    assert read_passages(passages) == unique_passages(made_up_passages(1))


def test_corpus_refuses_other_files(tmp_path: Path) -> None:
    wrong = tmp_path / "rows.json"
    wrong.write_text('[{"question": "?"}]')
    with pytest.raises(ValueError, match=r"read_instructions: rows.json must hold a list of objects"):
        read_corpus([wrong])
    for rows, got in (
        ("[]", "an empty list"),
        ('{"instruction": "a", "output": "b"}', "dict"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}]', ".* for row 1"),
        ('[["a", "b"]]', ".* for row 0"),
    ):
        wrong.write_text(rows)
        with pytest.raises(ValueError, match=rf"read_instructions: rows.json must hold a list of .*, got {got}"):
            read_corpus([wrong])
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "?"}\n')
    with pytest.raises(ValueError, match=r"read_completions: rows.jsonl line 1 must hold prompt and completion"):
        read_corpus([lines])


@pytest.mark.parametrize(
    "text", ["plain words", "  two  spaces\n\n", "naïve café 東京 🦦", "tab\there", "\x00\x7f", ""]
)
def test_tokenizer_keeps_every_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < len(tokenizer) == SHAPE.vocab_size


def test_tokenizer_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = prompt_text("Name one bird of the shore.", "by the water")
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    chat = loaded.apply_chat_template([{"role": "user", "content": "Name one bird of the shore."}], tokenize=False)
    assert (
        loaded(chat, add_special_tokens=False)["input_ids"]
        == tokenizer(prompt_text("Name one bird of the shore."))["input_ids"]
    )


def test_marks_of_the_template_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for mark in (INSTRUCTION_MARK, RESPONSE_MARK):
        assert len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1


def test_tokenizer_needs_room_for_all_bytes() -> None:
    with pytest.raises(ValueError, match=r"train_tokenizer: vocab_size must be at least 261, got 200"):
        train_tokenizer(["text"], 200, 64, progress=False)


def test_examples_count_the_bytes_of_what_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Instruction("Say it.", "", "An otter — une loutre — 川獺.")
    (whole,) = encode_examples(tokenizer, [row], max_tokens=200)
    assert whole.num_bytes == len(row.output.encode())
    assert whole.response_ids[-1] == tokenizer.eos_token_id
    (cut,) = encode_examples(tokenizer, [row], max_tokens=len(whole.prompt_ids) + 5)
    assert cut.response_ids == whole.response_ids[:5]
    assert 0 < cut.num_bytes < whole.num_bytes
    assert encode_examples(tokenizer, [row], max_tokens=len(whole.prompt_ids)) == []


def test_windows_hold_the_stream_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = made_up_passages(5)
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    windows = encode_windows(tokenizer, texts, window=16)
    assert [token for window in windows for token in window] == stream[: len(stream) // 16 * 16]


def test_padding_carries_no_loss() -> None:
    batch = pad_examples(examples_of_lengths([5, 9]), pad_id=0, response_only=True, multiple=8)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, 6, 7, 8] + [IGNORED] * 11
    everything = pad_examples(examples_of_lengths([5]), pad_id=0, response_only=False, multiple=1)
    assert torch.equal(everything["labels"], everything["input_ids"])


@pytest.mark.parametrize("ordered", [True, False])
def test_batches_hold_each_row_once(ordered: bool) -> None:
    generator = random.Random(0)
    lengths = [generator.randint(3, 60) for _ in range(157)]
    batches = group_in_order(lengths, 128) if ordered else group_by_length(lengths, 128, generator)
    assert sorted(index for batch in batches for index in batch) == list(range(157))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 128 for batch in batches)


def make_plan(seed: int = 0, passage_share: float = 0.4) -> BatchPlan:
    return BatchPlan(
        examples_of_lengths([3 + index % 20 for index in range(50)]),
        [tuple(range(start, start + 32)) for start in range(9)],
        pad_id=0,
        tokens_per_batch=64,
        passage_share=passage_share,
        response_only=False,
        seed=seed,
        num_steps=100,
    )


def test_a_plan_entered_late_gives_the_same_batches() -> None:
    whole, late = make_plan(), make_plan()
    late.first_step = 37
    assert len(whole) == len(late) == 100
    assert all(torch.equal(whole[37 + item]["input_ids"], late[item]["input_ids"]) for item in range(20))
    other = make_plan(seed=1)
    assert any(not torch.equal(whole[item]["input_ids"], other[item]["input_ids"]) for item in range(20))


def test_a_plan_needs_windows_for_its_share() -> None:
    with pytest.raises(ValueError, match=r"BatchPlan: windows must not be empty when passage_share is positive"):
        BatchPlan([], [], pad_id=0, tokens_per_batch=8, passage_share=0.5, response_only=False, seed=0, num_steps=1)


def test_menu_draws_by_seed_step_and_weight() -> None:
    menu = opt_mini().phases[0].menu(24)
    assert [path.budget for path in menu.paths] == [24, 12, 8, 4]
    assert menu.paths[0] == LayerPath.full(24)
    drawn = [menu.draw(0, step, 0.5) for step in range(400)]
    assert drawn == [menu.draw(0, step, 0.5) for step in range(400)]
    assert drawn != [menu.draw(1, step, 0.5) for step in range(400)]
    assert set(drawn) == set(menu.paths)
    one_sided = PathMenu(menu.paths[:2], (1.0, 0.0), (0.0, 1.0))
    assert {one_sided.draw(0, step, 0.0) for step in range(50)} == {menu.paths[0]}
    assert {one_sided.draw(0, step, 1.0) for step in range(50)} == {menu.paths[1]}


def test_menu_needs_one_weight_a_path() -> None:
    with pytest.raises(ValueError, match=r"PathMenu: paths, start and end must have one length, got 1, 2 and 1"):
        PathMenu((LayerPath.full(4),), (0.5, 0.5), (1.0,))
    phase = dataclasses.replace(opt_mini().phases[0], budget_weights_end={24: 1.0})
    with pytest.raises(ValueError, match=r"Phase: budget_weights_end must name the budgets of budget_weights_start"):
        phase.menu(24)


def test_learning_rate_rises_then_falls() -> None:
    rate = LearningRate(1.0, 0.2, warmup_steps=10)
    assert rate.factor(0, 0.0) == pytest.approx(0.1)
    assert rate.factor(50, 0.5) == pytest.approx(0.6)
    assert rate.factor(99, 1.0) == rate.factor(150, 1.5) == pytest.approx(0.2)


def test_clock_counts_steps_minutes_and_what_was_before() -> None:
    seconds = [100.0]
    clock = Clock(max_steps=10, max_minutes=1.0, now=lambda: seconds[0])
    clock.start(elapsed_s=15.0)
    assert clock.progress(1) == pytest.approx(0.25)
    seconds[0] += 15
    assert (clock.elapsed_s, clock.progress(1)) == pytest.approx((30.0, 0.5))
    assert clock.progress(8) == pytest.approx(0.8)
    seconds[0] += 1000
    assert clock.progress(8) == 1.0
    with pytest.raises(ValueError, match=r"Clock: max_steps or max_minutes must be given"):
        Clock(None, None)


def test_training_attention_equals_transformers(model: OPTForCausalLM) -> None:
    wake_layers(model).double().eval()
    input_ids = torch.randint(0, SHAPE.vocab_size, (3, 33))
    ours = model(input_ids=input_ids).logits
    assert model.config._attn_implementation == attention.TRAINING_ATTENTION
    model.set_attn_implementation("eager")
    # transformers takes the softmax in fp32 here, whatever the dtype.
    torch.testing.assert_close(ours, model(input_ids=input_ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 7, 600])
def test_head_loss_equals_cross_entropy(num_tokens: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(3, num_tokens, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(40, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 40, (3, num_tokens), generator=generator)
    labels[1:, : num_tokens // 2] = IGNORED
    results = []
    for fused in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)[: 3 if has_bias else 2]]
        if fused:
            loss = head_loss(*leaves[:2], leaves[2] if has_bias else None, labels)
        else:
            logits = functional.linear(*leaves)[:, :-1].flatten(0, 1)
            loss = functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        (3 * loss).backward()
        results.append((loss.detach().double(), *(leaf.grad for leaf in leaves)))
    # Ours takes the softmax in fp32, the other in float64.
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_head_loss_needs_a_labelled_token() -> None:
    labels = torch.tensor([[5, IGNORED, IGNORED]])
    with pytest.raises(ValueError, match=r"head_loss: labels must keep at least one token, got none"):
        head_loss(torch.ones(1, 3, 4), torch.ones(6, 4), None, labels)


def test_only_layers_cuts_the_decoder_and_restores_it(model: OPTForCausalLM) -> None:
    wake_layers(model)
    every_layer = list(model.model.decoder.layers)
    calls: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(every_layer)
    ]
    # A token outside the vocabulary fails inside the context, before the first layer.
    with pytest.raises(IndexError), only_layers(model, LayerPath.of(4, [1])):
        model(input_ids=torch.tensor([[SHAPE.vocab_size]]))
    assert list(model.model.decoder.layers) == every_layer
    with only_layers(model, LayerPath.of(4, [0, 3])):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert calls == [0, 3]
    assert list(model.model.decoder.layers) == every_layer
    for hook in hooks:
        hook.remove()


def test_a_new_model_starts_with_layers_that_change_nothing(model: OPTForCausalLM) -> None:
    input_ids = torch.tensor([[1, 7, 9, 30]])
    full = model(input_ids=input_ids).logits
    with only_layers(model, LayerPath.uniform(4, budget=1)):
        assert torch.equal(model(input_ids=input_ids).logits, full)


def test_optimizer_leaves_skipped_layers_alone(model: OPTForCausalLM) -> None:
    wake_layers(model)
    optimizer = MuonWithAdamW(model, muon_lr=0.01, adamw_lr=0.001, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with only_layers(model, LayerPath.of(4, [1])):
        ids = torch.tensor([[1, 7, 9, 30]])
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in changed if ".layers." in name and ".layers.1." not in name} == set()
    assert {"model.decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc1.bias"} <= changed
    assert "model.decoder.embed_tokens.weight" in changed


def test_optimizer_state_survives_a_round_trip(model: OPTForCausalLM) -> None:
    wake_layers(model)
    ids = torch.tensor([[1, 7, 9, 30]])
    first = MuonWithAdamW(model, muon_lr=0.01, adamw_lr=0.001, weight_decay=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    first.step()
    second = MuonWithAdamW(model, muon_lr=0.5, adamw_lr=0.5, weight_decay=0.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["lr"] for group in second.param_groups] == [0.01, 0.001]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first.step()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    second.step()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match=r"MuonWithAdamW.step: closure must be None"):
        first.step(lambda: 0.0)


# A run that is killed during its fifth step: it saves after every step and looks at the watched rows just before.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import training_runs
from dynskip.training.pretrain.run import TrainingRun
torch.set_num_threads(1)
num_calls = 0
def evaluate(model, examples, pad_id):
    global num_calls
    num_calls += 1
    if num_calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return {{}}
data = [Path(path) for path in {data!r}]
TrainingRun(training_runs.small_run(0.0), data, Path({out!r}), evaluate, progress=False).train()
"""


@pytest.mark.filterwarnings("ignore")  # transformers, accelerate and datasets warn about their own affairs
def test_a_killed_run_resumes_to_the_same_weights(data: list[Path], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = KILLED.format(
        tests=str(Path(__file__).parents[1] / "helpers"), data=[str(path) for path in data], out=str(killed)
    )
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    checkpoint = latest_checkpoint(killed / "pretrain")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    assert len((killed / "pretrain" / "steps.jsonl").read_text().splitlines()) == 5
    # What a kill during saving leaves behind must not be taken for a checkpoint.
    (killed / "pretrain" / "checkpoint-6").mkdir()

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out in (killed, whole):
            TrainingRun(small_run(1e9), data, out, lambda *_: {"score": 1.0}, progress=False).train()
    finally:
        torch.set_num_threads(num_threads)
    for phase, num_steps in (("pretrain", 7), ("finetune", 3)):
        logs = []
        for out in (killed, whole):
            lines = [json.loads(line) for line in (out / phase / "steps.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(num_steps))
            logs.append([{key: value for key, value in line.items() if key != "elapsed_s"} for line in lines])
        assert logs[0] == logs[1]
        assert {line["depth"] for line in logs[0]} <= {2, 4}
    resumed = OPTForCausalLM.from_pretrained(killed / "export").state_dict()
    uninterrupted = OPTForCausalLM.from_pretrained(whole / "export").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in uninterrupted.values())
    record = json.loads((killed / "run.json").read_text())
    assert len(record["resumed"]) == 1 and set(record["data"]) == {path.name for path in data}
    scores = json.loads((whole / "export" / "scores.json").read_text())
    assert scores["num_rows"] == 18 and scores["num_bytes"] > 100 and scores["score"] == 1.0

    other = dataclasses.replace(small_run(1e9), seed=1)
    with pytest.raises(ValueError, match=r"TrainingRun: seed must equal the run's 0, got 1"):
        TrainingRun(other, data, whole, lambda *_: {}, progress=False).train()
    with pytest.raises(ValueError, match=r"TrainingRun: data must be the run's files"):
        TrainingRun(small_run(1e9), data[:1], whole, lambda *_: {}, progress=False).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-file.json"], "train: error: --data must name a file, got 'no-such-file.json'"),
        (["--minutes", "dance=3"], r"train: --minutes must be PHASE=N with a phase of pretrain, finetune"),
        (["--steps", "pretrain=2.5"], r"train: --steps must be PHASE=N"),
        (["--minutes", "pretrain=soon"], r"train: --minutes must be PHASE=N"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--muon-lr", "-1"], r"train: --muon-lr must be positive, got -1.0"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, data: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["train", "--data", str(data[0]), "--out", str(tmp_path), *arguments])
    error = capfd.readouterr().err
    assert status == 2
    assert message in error and len(error.strip().splitlines()) == 1


def test_evaluator_scores_every_path_of_the_menu(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    wake_layers(model)
    examples = encode_examples(tokenizer, made_up_rows(5), SHAPE.max_positions)
    scores = evaluator(progress=False)(model, examples, tokenizer.pad_token_id)
    assert list(scores) == ["full", "uniform:2", "uniform:1"]
    assert len(set(scores.values())) == 3
    with only_layers(model, LayerPath.uniform(4, budget=2)):
        expected = bits_per_byte(lambda ids: model(input_ids=ids).logits, examples, tokenizer.pad_token_id).value
    assert scores["uniform:2"] == pytest.approx(expected, rel=0.02)  # the evaluator runs in bf16


def test_unknown_options_are_rejected(data: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option in ("--datta", "--step"):
        assert main(["train", "--data", str(data[0]), "--out", str(tmp_path), option, "x"]) == 2
        assert "unrecognized arguments" in capfd.readouterr().err


def test_help_shows_examples(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "dynskip train --preset opt-mini --data" in capfd.readouterr().out
