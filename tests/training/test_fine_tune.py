"""Fine-tunes: the paper's protocol as presets, one set of batches however many processes, resumed after any kill."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra 'train' (accelerate)")
pytest.importorskip("datasets", reason="the split of Alpaca needs the extra 'train' (datasets)")

from families import cut_family
from training_runs import (
    CPU,
    IGNORE_LIBRARIES,
    SHAPE,
    checkpoint,
    data,
    examples_of_lengths,
    family_checkpoint,
    made_up_rows,
    run_script,
    small_config,
)
from transformers import AutoModelForCausalLM, OPTForCausalLM

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.cli import main
from dynskip.data.batches import IGNORED, StepPlan, pad_examples
from dynskip.data.corpus import split_instructions
from dynskip.data.examples import encode_examples
from dynskip.data.templates import CHAT_TEMPLATES, alpaca_prompt, prompt_text
from dynskip.evaluation.sweep.dataset import encode_prompts
from dynskip.models.hf_model import hf_layers, only_layers
from dynskip.models.tokenizer import check_vocabulary
from dynskip.training.fine_tune import checkpoint_run
from dynskip.training.fine_tune.checkpoint_run import load_for_training, load_tokenizer
from dynskip.training.fine_tune.config import paper, released_code
from dynskip.training.fine_tune.run import FineTuneRun, stages
from dynskip.training.fine_tune.trainer import evaluations_since_best
from dynskip.training.resumable import latest_checkpoint
from dynskip.training.stage import write_curves

__all__ = ["checkpoint", "data"]  # fixtures
# Rotary positions and shared key-value heads, learned positions and transposed matrices, ALiBi, windows, norms of
# queries and keys, two residuals at a time.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("bloom", {}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen3", {}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("phi", {}),
]


def weights(directory: Path) -> Mapping[str, torch.Tensor]:
    return OPTForCausalLM.from_pretrained(directory).state_dict()


def test_presets_are_the_papers() -> None:
    ours, theirs = paper(), released_code()
    assert (ours.model, ours.learning_rate, ours.num_epochs, ours.batch_size) == ("facebook/opt-1.3b", 5e-5, 6, 64)
    assert ours.patience is not None and ours.template == theirs.template == "alpaca"
    assert (theirs.model, theirs.learning_rate, theirs.max_tokens) == ("facebook/opt-iml-1.3b", 2e-5, 512)
    assert theirs.max_prompt_tokens == 128 and theirs.gradient_checkpointing
    assert theirs.steps(36_401, full=True) == 1138  # the number of steps that the public code took
    assert [stage.name for stage in stages(ours)] == ["full", "uniform-12", "uniform-8", "uniform-4"]
    both = dataclasses.replace(ours, paths=("full",), menu=("full", "uniform:8"))
    assert [(stage.name, stage.source) for stage in stages(both)] == [
        ("full", None),
        ("full-continued", "full"),
        ("menu", "full"),
    ]


def test_split_has_the_papers_sizes() -> None:
    parts = split_instructions(made_up_rows(52_002))
    assert [len(part) for part in parts] == [36_401, 7_800, 7_801]


def test_templates_write_the_preamble_and_the_input() -> None:
    text = alpaca_prompt("Name a bird.", "by the water")
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nName a bird.\n\n### Input:\nby the water\n\n### Response:\n")
    assert alpaca_prompt("Name a bird.").endswith("request.\n\n### Instruction:\nName a bird.\n\n### Response:\n")


@pytest.mark.parametrize(("name", "write"), [("alpaca", alpaca_prompt), ("short", prompt_text)])
def test_chat_templates_write_the_same_prompt(name: str, write: Any, checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Name a bird."}], tokenize=False)
    assert chat == tokenizer.bos_token + write("Name a bird.")


def test_long_prompts_are_left_out(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    rows = made_up_rows(30)
    every = encode_examples(tokenizer, rows, 64)
    longest = sorted(len(example.prompt_ids) for example in every)[10]
    kept = encode_examples(tokenizer, rows, 64, max_prompt_tokens=longest)
    assert kept == [example for example in every if len(example.prompt_ids) <= longest]
    assert 0 < len(kept) < len(every)
    with pytest.raises(ValueError, match=r"encode_examples: template must be one of alpaca, chat, short, got 'vicuna'"):
        encode_examples(tokenizer, rows, 64, template="vicuna")


def test_chat_prompts_are_those_that_are_judged(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    rows = made_up_rows(5)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="template must be alpaca or short with a tokenizer that has no chat template"):
        encode_examples(tokenizer, rows, 64, template="chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    examples = encode_examples(tokenizer, rows, 64, template="chat")
    judged = encode_prompts(rows, tokenizer, 64, 1, "chat", len(rows)).rows
    assert [(example.prompt_ids, example.response_ids) for example in examples] == [
        (row.prompt_ids, row.response_ids) for row in judged
    ]
    assert all(example.prompt_ids[-1] == tokenizer.eos_token_id for example in examples), "the template's own end"


def make_plan(rank: int = 0, num_processes: int = 1, micro_batch_size: int = 8) -> StepPlan:
    return StepPlan(
        examples_of_lengths([3 + index % 20 for index in range(50)]),
        pad_id=0,
        batch_size=16,
        micro_batch_size=micro_batch_size,
        num_steps=10,
        seed=5,
        rank=rank,
        num_processes=num_processes,
    )


def rows_of(batch: Mapping[str, torch.Tensor]) -> list[tuple[int, ...]]:
    return sorted(tuple(row[row != 0].tolist()) for row in batch["input_ids"])


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 4), (2, 4), (4, 2), (2, 8)])
def test_processes_share_the_same_batch(num_processes: int, micro_batch_size: int) -> None:
    whole = make_plan(micro_batch_size=16)
    plans = [make_plan(rank, num_processes, micro_batch_size) for rank in range(num_processes)]
    assert plans[0].num_micro_batches * num_processes * micro_batch_size == 16
    for step in range(10):
        parts = [
            row
            for plan in plans
            for micro in range(plan.num_micro_batches)
            for row in rows_of(plan[step * plan.num_micro_batches + micro])
        ]
        assert sorted(parts) == rows_of(whole[step])


def test_a_plan_passes_over_all_rows_and_can_be_entered_late() -> None:
    plan, late = make_plan(), make_plan()
    seen = [row for step in range(25) for row in plan.rows(step)]
    assert all(seen.count(row) == 8 for row in range(50))  # 25 steps of 16 rows are 8 passes
    late.first_step = 7
    assert torch.equal(plan[14]["input_ids"], late[0]["input_ids"])
    assert len(late) == len(plan) == 20
    with pytest.raises(IndexError, match=r"StepPlan: item must lie in 0..19, got 20"):
        plan[20]


def test_a_plan_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"StepPlan: batch_size must be a multiple of micro_batch_size \* processes"):
        make_plan(num_processes=3)
    with pytest.raises(ValueError, match=r"StepPlan: examples must not be empty"):
        StepPlan([], pad_id=0, batch_size=2, micro_batch_size=1, num_steps=1, seed=0)


def test_the_loss_is_that_of_transformers_on_response_tokens(checkpoint: Path) -> None:
    examples = encode_examples(load_tokenizer(str(checkpoint)), made_up_rows(5), 64)
    batch = pad_examples(examples, 0, response_only=True)
    ours = load_for_training(str(checkpoint), CPU)(**batch)["loss"]
    theirs = OPTForCausalLM.from_pretrained(checkpoint)(**batch).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    num_tokens = int((batch["labels"] != IGNORED).sum())
    summed = load_for_training(str(checkpoint), CPU)(**batch, num_items_in_batch=1)["loss"]
    torch.testing.assert_close(summed, theirs * num_tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "changes"), OTHERS)
def test_the_loss_of_other_architectures_is_that_of_transformers(
    family: str, changes: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    source = family_checkpoint(tmp_path, checkpoint, family, **changes)
    batch = pad_examples(encode_examples(load_tokenizer(str(source)), made_up_rows(5), 64), 0, response_only=True)
    model = load_for_training(str(source), CPU)
    theirs = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    config, numbers = model.config.to_dict(), [getattr(m, "layer_idx", None) for m in model.modules()]
    for path in (LayerPath.full(4), LayerPath.of(4, [1, 2]), LayerPath.of(4, [3])):
        with cut_family(theirs, path):
            expected = theirs(**batch, use_cache=False).loss
        with only_layers(model, path):
            loss = model(**batch)["loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    trained = [any(p.grad is not None for p in layer.parameters()) for layer in hf_layers(model)]
    assert trained == [False, False, False, True]
    assert model.config.to_dict() == config
    assert [getattr(m, "layer_idx", None) for m in model.modules()] == numbers


def test_no_layer_is_dropped_in_training(checkpoint: Path, tmp_path: Path) -> None:
    dropping = OPTForCausalLM.from_pretrained(checkpoint)
    dropping.config.layerdrop = 0.9
    dropping.save_pretrained(tmp_path)
    batch = pad_examples(encode_examples(load_tokenizer(str(checkpoint)), made_up_rows(5), 64), 0, response_only=True)
    model = load_for_training(str(tmp_path), CPU)
    expected = model.eval()(**batch)["loss"]
    assert all(torch.equal(model.train()(**batch)["loss"], expected) for _ in range(4))


@IGNORE_LIBRARIES
@pytest.mark.parametrize(("family", "changes"), OTHERS)
def test_other_architectures_are_tuned(
    family: str, changes: dict[str, Any], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    source = family_checkpoint(tmp_path / "source", checkpoint, family, **changes)
    config = small_config(source, num_steps=2, num_path_steps=1, eval_every=1, gradient_checkpointing=True)
    models = FineTuneRun(config, data, tmp_path / "out", CPU, progress=False).train()
    full, tuned = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("full", "uniform-2"))
    changed = {
        index
        for index, (before, after) in enumerate(zip(hf_layers(full), hf_layers(tuned), strict=True))
        if any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    }
    path = LayerPath.uniform(4, budget=2)
    assert changed == set(path.layers)
    assert tuned.config.architectures == [type(tuned).__name__] and tuned.config.num_hidden_layers == 4
    llm = LLM(models["uniform-2"], dtype="float32")
    prompt = [5, 9, 30]
    output = llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True), path)[0]
    with torch.no_grad(), cut_family(tuned, path):
        logits = tuned(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    assert output.token_ids == [int(logits.argmax())]


def test_left_padding_changes_no_loss(checkpoint: Path) -> None:
    examples = encode_examples(load_tokenizer(str(checkpoint)), made_up_rows(5), 64)
    right = pad_examples(examples, 0, response_only=True)
    width = right["input_ids"].shape[1]
    left = {"input_ids": torch.zeros(5, width, dtype=torch.long), "labels": torch.full((5, width), IGNORED)}
    attention_mask = torch.zeros(5, width, dtype=torch.long)
    for row, example in enumerate(examples):
        for name, tensor in left.items():
            tensor[row, width - example.num_tokens :] = right[name][row, : example.num_tokens]
        attention_mask[row, width - example.num_tokens :] = 1
    theirs = OPTForCausalLM.from_pretrained(checkpoint)(**left, attention_mask=attention_mask).loss
    torch.testing.assert_close(load_for_training(str(checkpoint), CPU)(**right)["loss"], theirs, rtol=1e-5, atol=1e-6)


@IGNORE_LIBRARIES
def test_stages_start_from_full_depth_and_leave_skipped_layers_alone(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    config = small_config(checkpoint, paths=("uniform:2", "full"), menu=("uniform:2", "full"))
    models = FineTuneRun(config, data, tmp_path, CPU, progress=False).train()
    assert list(models) == ["full", "uniform-2", "full-continued", "menu"]
    start, full, shallow = weights(checkpoint), weights(models["full"]), weights(models["uniform-2"])
    assert any(not torch.equal(full[name], start[name]) for name in start)
    assert LayerPath.uniform(4, budget=2).layers == (0, 2)
    for name, tensor in full.items():
        skipped = ".layers.1." in name or ".layers.3." in name
        trained = ".weight" in name and not skipped and "embed_positions" not in name
        assert not skipped or torch.equal(shallow[name], tensor), name
        assert not trained or not torch.equal(shallow[name], tensor), name
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["counts"]["rows"] == {"train": 84, "validation": 18, "test": 18}
    assert set(record["data"]) == {data.name} and record["versions"]["torch"] == torch.__version__
    history = json.loads((tmp_path / "menu" / "curves.json").read_text())
    assert {entry["num_layers"] for entry in history if "loss" in entry} <= {2, 4}
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 4]
    for entry in evaluated:
        mean = (entry["eval_loss_2_layers"] + entry["eval_loss_4_layers"]) / 2
        assert entry["eval_loss"] == pytest.approx(mean)
    result = json.loads((models["uniform-2"] / "fine_tune.json").read_text())
    assert result["paths"] == ["uniform:2"] and result["template"] == "short"
    paths = LayerPath.uniform(4, budget=2)
    output = LLM(models["uniform-2"]).generate(["Where?"], SamplingParams(max_tokens=3), paths)
    assert len(output[0].token_ids) <= 3


@IGNORE_LIBRARIES
def test_skipped_layers_are_not_computed(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    calls = {"full": 0, "skipped": 0}

    class Counting(FineTuneRun):
        """Counts the passes through each kind of layer in the stage of uniform:2."""

    original = checkpoint_run.load_for_training

    def load(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        for index, layer in enumerate(model.model.decoder.layers):
            kind = "full" if index in (0, 2) else "skipped"
            layer.register_forward_pre_hook(lambda *_, kind=kind: calls.__setitem__(kind, calls[kind] + 1))
        return model

    FineTuneRun(small_config(checkpoint), data, tmp_path, CPU, progress=False).train()
    (tmp_path / "uniform-2" / "done.json").unlink()
    for folder in (tmp_path / "uniform-2").glob("checkpoint-*"):
        (folder / "complete.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_run, "load_for_training", load)
        Counting(small_config(checkpoint), data, tmp_path, CPU, progress=False).train()
    assert calls["full"] > 0 and calls["skipped"] == 0


# Trains with small_config and kills itself: in its nth forward pass, or in the middle of writing its nth checkpoint.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import training_runs
from dynskip.training.fine_tune.run import FineTuneRun
from dynskip.training import response_loss as step_model
out, checkpoint, data, where, number = sys.argv[1:]
num_calls = 0
def killer(original):
    def call(*args, **kwargs):
        global num_calls
        num_calls += 1
        if num_calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
if where == "step":
    step_model.head_loss = killer(step_model.head_loss)
else:
    os.fsync = killer(os.fsync)
config = training_runs.small_config(Path(checkpoint))
FineTuneRun(config, Path(data), Path(out), torch.device("cpu"), progress=False).train()
"""


@pytest.fixture(scope="module")
def whole_run(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    out = tmp_path_factory.mktemp("whole")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    FineTuneRun(small_config(checkpoint), data, out, CPU, progress=False).train()
    torch.set_num_threads(num_threads)
    return out


@IGNORE_LIBRARIES
@pytest.mark.parametrize(
    ("where", "number", "stage", "resumes_at"), [("step", 10, "full", 4), ("save", 8, "uniform-2", 1)]
)
def test_a_killed_run_resumes_to_the_same_weights(
    where: str, number: int, stage: str, resumes_at: int, checkpoint: Path, data: Path, whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = run_script(KILLED, out, checkpoint, data, where, number)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = latest_checkpoint(out / stage)
    assert left is not None and left.name == f"checkpoint-{resumes_at}"
    assert not (out / stage / "done.json").exists()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    FineTuneRun(small_config(checkpoint), data, out, CPU, progress=False).train()
    torch.set_num_threads(num_threads)
    for name in ("full", "uniform-2"):
        resumed, uninterrupted = weights(out / name / "model"), weights(whole_run / name / "model")
        assert all(torch.equal(resumed[key], tensor) for key, tensor in uninterrupted.items())
        curves = [json.loads((folder / name / "curves.json").read_text()) for folder in (out, whole_run)]
        assert curves[0] == curves[1]
    assert len(json.loads((out / "run.json").read_text())["resumed"]) == 1


@IGNORE_LIBRARIES
def test_a_full_disk_ends_a_run_that_can_go_on(checkpoint: Path, data: Path, whole_run: Path, tmp_path: Path) -> None:
    original, num_calls = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device"):
            FineTuneRun(small_config(checkpoint), data, tmp_path, CPU, progress=False).train()
    left = latest_checkpoint(tmp_path / "full")
    assert left is not None and left.name == "checkpoint-2"
    FineTuneRun(small_config(checkpoint), data, tmp_path, CPU, progress=False).train()
    torch.set_num_threads(num_threads)
    resumed, uninterrupted = weights(tmp_path / "full" / "model"), weights(whole_run / "full" / "model")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in uninterrupted.items())


IN_PROCESSES = """
import os
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import training_runs
from dynskip.training.fine_tune.run import FineTuneRun
from dynskip.training.stage import end_processes
out, checkpoint, data = sys.argv[1:]
menu = ("uniform:2", "uniform:1")
config = training_runs.small_config(Path(checkpoint), micro_batch_size=2, menu=menu, save_every_s=600.0)
FineTuneRun(config, Path(data), Path(out), torch.device("cpu"), progress=False).train()
if os.environ["RANK"] == "0":
    print(torch.distributed.get_world_size())
end_processes()
threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
if left := [name for name in threads if "gloo" in name]:
    sys.exit(f"connections are up still: {left}")
"""


# accelerate calls any two processes of a machine multi_gpu; without a GPU in it they talk by gloo.
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": (
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


@pytest.fixture(scope="module")
def by_one_process(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process that those of several are held against."""
    out = tmp_path_factory.mktemp("processes") / "one"
    config = small_config(checkpoint, micro_batch_size=2, menu=("uniform:2", "uniform:1"), save_every_s=600.0)
    FineTuneRun(config, data, out, CPU, progress=False).train()
    return out


@IGNORE_LIBRARIES
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_does(
    launcher: str, checkpoint: Path, data: Path, by_one_process: Path, tmp_path: Path
) -> None:
    two = run_script(IN_PROCESSES, tmp_path / "two", checkpoint, data, launcher=LAUNCHERS[launcher])
    assert two.returncode == 0, two.stderr
    assert two.stdout.split() == ["2"], "one process speaks, of two"
    for stage in ("full", "uniform-2", "menu"):
        curves = [json.loads((out / stage / "curves.json").read_text()) for out in (by_one_process, tmp_path / "two")]
        assert len(curves[0]) == len(curves[1])
        for single, shared in zip(*curves, strict=True):
            assert single.keys() == shared.keys()
            # Two processes add the same gradients in another order.
            assert all(shared[name] == pytest.approx(single[name], rel=1e-4) for name in single)


@IGNORE_LIBRARIES
def test_a_stage_ends_when_validation_stops_improving(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    config = small_config(checkpoint, learning_rate=0.5, num_steps=20, eval_every=1, patience=2, paths=())
    FineTuneRun(config, data, tmp_path, CPU, progress=False).train()
    result = json.loads((tmp_path / "full" / "done.json").read_text())
    history = json.loads((tmp_path / "full" / "curves.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert result["num_steps"] == result["step"] + 2 < 20
    assert result["step"] == min(losses, key=losses.__getitem__)


def test_evaluations_since_best_counts_from_the_first_best() -> None:
    assert evaluations_since_best([]) == 0
    assert evaluations_since_best([{"loss": 9.0}, {"eval_loss": 2.0}, {"eval_loss": 3.0}, {"eval_loss": 2.0}]) == 2
    assert evaluations_since_best([{"eval_loss": 3.0}, {"eval_loss": 2.0}]) == 0


@IGNORE_LIBRARIES
def test_another_config_in_the_same_folder_is_named(checkpoint: Path, data: Path, whole_run: Path) -> None:
    other = small_config(checkpoint, learning_rate=2e-3)
    message = r"record_start: config must equal .*, got learning_rate 0.001 there, 0.002 asked"
    with pytest.raises(ValueError, match=message):
        FineTuneRun(other, data, whole_run, CPU, progress=False).train()
    FineTuneRun(small_config(checkpoint, micro_batch_size=2), data, whole_run, CPU, progress=False).train()


def test_other_data_in_the_same_folder_is_named(checkpoint: Path, whole_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "alpaca_data.json"
    data.write_text(json.dumps([dataclasses.asdict(row) for row in made_up_rows(119)]))
    with pytest.raises(ValueError, match=r"record_start: config must equal .* got data \{'alpaca_data.json': "):
        FineTuneRun(small_config(checkpoint), data, whole_run, CPU, progress=False).train()


def test_rows_longer_than_the_positions_are_refused_before_data_is_read(checkpoint: Path, tmp_path: Path) -> None:
    config = small_config(checkpoint, max_tokens=SHAPE.max_positions + 1)
    message = rf"train: --max-length must be at most {SHAPE.max_positions}, the positions of .*, got \d+\. Pass"
    with pytest.raises(ValueError, match=message):
        FineTuneRun(config, tmp_path / "no such file", tmp_path / "run", CPU, progress=False).train()
    assert not (tmp_path / "run").exists()


def test_a_foreign_tokenizer_is_refused(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    with pytest.raises(ValueError, match=r"train: tokenizer of here must know token ids below .* 300, got 319"):
        check_vocabulary(tokenizer, 300, "here", "train")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"load_for_training: .* must hold a model of type .*, got model_type 'bert'"):
        load_for_training(str(tmp_path), CPU)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_tokenizer: .* must hold a tokenizer, got: "):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "vicuna"}, r"FineTuneConfig: template must be one of alpaca, chat, short, got 'vicuna'"),
        ({"precision": "float16"}, r"FineTuneConfig: precision must be one of bfloat16, float32, got 'float16'"),
        ({"learning_rate": 0.0}, r"FineTuneConfig: learning_rate must be positive, got 0.0"),
        ({"weight_decay": -1.0}, r"FineTuneConfig: weight_decay must be at least 0, got -1.0"),
    ],
)
def test_configs_are_checked(changes: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(checkpoint, **changes)


def test_curves_are_written(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 3.0, "learning_rate": 0.1}, {"step": 1, "eval_loss": 2.5}]
    paths = write_curves(tmp_path, history)
    with (tmp_path / "curves.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["loss"] for line in lines] == ["3.0", ""] and lines[1]["eval_loss"] == "2.5"
    for path in paths:
        assert path.stat().st_size > 0


@IGNORE_LIBRARIES
def test_the_command_trains(checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint), "--data", str(data), "--out", str(tmp_path), "--template", "short"]
    bounds = ["--steps", "full=2", "--steps", "paths=1", "--batch-size", "8", "--max-length", "64"]
    assert main(["train", "--preset", "paper", *arguments, *bounds, "--path", "exit:2", "--quiet"]) == 0
    out = capfd.readouterr().out
    assert str(tmp_path / "full" / "model") in out and str(tmp_path / "exit-2" / "model") in out
    assert OPTForCausalLM.from_pretrained(tmp_path / "exit-2" / "model").config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "paper", "--muon-lr", "0.1"], "train: --muon-lr must be left out with the preset paper, got 0.1"),
        (["--lr", "0.1"], "train: --lr must be left out with the preset opt-mini, got 0.1"),
        (["--preset", "paper", "--steps", "pretrain=3"], "train: --steps must be full=N or paths=N with N > 0"),
        (["--preset", "paper", "--lr", "-1"], "FineTuneConfig: learning_rate must be positive, got -1.0"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(data), "--out", str(tmp_path), *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_an_unknown_preset_is_refused(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "papers", "--data", str(data), "--out", str(tmp_path)]) == 2
    assert "invalid choice: 'papers'" in capfd.readouterr().err
