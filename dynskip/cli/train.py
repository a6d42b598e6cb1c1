"""``dynskip train``: small models from scratch, and fine-tunes of OPT checkpoints, as resumable runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dynskip.cli import train_controller
from dynskip.cli.options import file_path, set_threads
from dynskip.cli.train_fine_tune import OPTIONS as FINE_TUNE_OPTIONS
from dynskip.cli.train_fine_tune import add_options, fine_tune_config, is_first_process

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

    from dynskip.data.examples import Example

_EXAMPLES = """examples:
  dynskip train --preset opt-mini --data alpaca_data.json.xz --data t0_train_50k.jsonl.xz --out runs/opt-mini
      everything from the tokenizer to the exported model; killed and started again, it goes on where it was
  dynskip train --preset opt-mini --data ... --out runs/long --minutes pretrain=240 --minutes finetune=60
      the same with more time
  dynskip train --preset opt-mini --data ... --out runs/brief --steps pretrain=200 --steps finetune=50
      bounded by steps, so that two machines do the same work
  dynskip train --preset paper --model facebook/opt-1.3b --data alpaca_data.json.xz --out runs/paper
      the fine-tunes of arXiv 2410.20022: full depth, then from there ULS-12, ULS-8 and ULS-4
  torchrun --nproc-per-node 8 -m dynskip train --preset paper --data alpaca_data.json.xz --out runs/paper
      the same batches on 8 GPUs; `accelerate launch -m dynskip train ...` works as well
  dynskip train --controller hidden --alpha 4 --model runs/paper/full/model --data alpaca_data.json.xz --out runs/hidden
      a controller that reads hidden states, on the frozen model of such a run
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The parser of ``train``, added to ``subparsers``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train models that speak at several depths",
        description="Train small models from scratch, or fine-tune OPT checkpoints, as runs that can be resumed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", choices=["opt-mini", "paper", "released-code"], help="default: opt-mini; with --controller: paper"
    )
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        type=file_path,
        metavar="FILE",
        help="Alpaca as *.json[.xz], T0 as *.jsonl[.xz]; give it once a file",
    )
    parser.add_argument(
        "--out", required=True, type=file_path, metavar="FOLDER", help="run folder, new or to be resumed"
    )
    parser.add_argument(
        "--steps",
        action="append",
        default=[],
        metavar="PHASE=N",
        help="steps of a phase: pretrain or finetune of opt-mini; full or paths of the other presets; or controller",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights, batches and paths")
    parser.add_argument("--save-every", type=float, metavar="S", help="seconds between two checkpoints")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("preset opt-mini")
    group.add_argument("--minutes", action="append", default=[], metavar="PHASE=N", help="training minutes of a phase")
    group.add_argument("--tokens-per-batch", type=int, metavar="N", help="padded tokens of a batch")
    group.add_argument("--muon-lr", type=float, metavar="X", help="learning rate of the layers' matrices")
    group.add_argument("--adamw-lr", type=float, metavar="X", help="learning rate of everything else")
    add_options(parser)
    train_controller.add_options(parser)
    return parser


def _phase_numbers(option: str, pairs: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if name not in names or number <= 0 or (option == "--steps" and number != int(number)):
            raise ValueError(
                f"train: {option} must be PHASE=N with a phase of {', '.join(names)} and N > 0, got {pair!r}."
                f" Write for example {option} {names[0]}=100."
            )
        numbers[name] = number
    return numbers


_MINI_OPTIONS = ("minutes", "tokens_per_batch", "muon_lr", "adamw_lr")


def _refuse(args: argparse.Namespace, options: Iterable[str], where: str | None = None) -> None:
    """Raise ValueError where one of ``options`` is given; ``where``: when it must not be, by default for the preset."""
    where = where or f"with the preset {args.preset}"
    for name in sorted(options):
        value = getattr(args, name)
        if value is not None and value != []:
            raise ValueError(f"train: --{name.replace('_', '-')} must be left out {where}, got {value}.")


def _mini_config(args: argparse.Namespace) -> Any:
    from dynskip.training.pretrain.config import PRESETS

    config = PRESETS[args.preset]()
    names = [phase.name for phase in config.phases]
    minutes = _phase_numbers("--minutes", args.minutes, names)
    steps = _phase_numbers("--steps", args.steps, names)
    phases = []
    for phase in config.phases:
        if phase.name in steps:
            phase = dataclasses.replace(phase, max_steps=int(steps[phase.name]), max_minutes=minutes.get(phase.name))
        elif phase.name in minutes:
            phase = dataclasses.replace(phase, max_minutes=minutes[phase.name])
        phases.append(phase)
    given = {
        "tokens_per_batch": args.tokens_per_batch,
        "muon_lr": args.muon_lr,
        "adamw_lr": args.adamw_lr,
        "save_every_s": args.save_every,
    }
    for name, value in given.items():
        if value is not None and value <= 0:
            option = "--" + name.removesuffix("_s").replace("_", "-")
            raise ValueError(f"train: {option} must be positive, got {value}. Leave it out for the preset's value.")
    changes = {name: value for name, value in {**given, "seed": args.seed}.items() if value is not None}
    return dataclasses.replace(config, phases=tuple(phases), **changes)


def evaluator(progress: bool) -> Callable[[OPTForCausalLM, Sequence[Example], int], dict[str, float]]:
    """A function of model, examples and pad id: bits per byte of the responses along the full path and the uniform
    paths of a half, a third and a sixth of the layers, which are ULS-12, ULS-8 and ULS-4 of 24."""

    def evaluate(model: OPTForCausalLM, examples: Sequence[Example], pad_id: int) -> dict[str, float]:
        import torch
        from tqdm import tqdm

        from dynskip.paths import LayerPath
        from dynskip.training.bits_per_byte import bits_per_byte
        from dynskip.training.response_loss import only_layers

        def logits_of(input_ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast(model.device.type, torch.bfloat16):
                return model(input_ids=input_ids.to(model.device), use_cache=False).logits

        num_layers = model.config.num_hidden_layers
        budgets = sorted({max(1, round(num_layers * share)) for share in (1, 1 / 2, 1 / 3, 1 / 6)}, reverse=True)
        scores: dict[str, float] = {}
        with tqdm(total=len(budgets) * len(examples), desc="evaluate", leave=False, disable=not progress) as bar:
            for budget in budgets:
                with only_layers(model, LayerPath.uniform(num_layers, budget=budget)):
                    score = bits_per_byte(logits_of, examples, pad_id, on_rows=bar.update)
                scores["full" if budget == num_layers else f"uniform:{budget}"] = round(score.value, 4)
        return scores

    return evaluate


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a finished run, 1 after one that diverged; a user's mistake is a ValueError."""
    for path in args.data:
        if not path.is_file():
            raise ValueError(f"train: --data must name a file, got {str(path)!r}. Check the path.")
    set_threads(args.threads)
    if args.preset is None:
        args.preset = "opt-mini" if args.controller is None else "paper"
    is_mini = args.preset == "opt-mini"
    _refuse(args, FINE_TUNE_OPTIONS | {"controller"} if is_mini else _MINI_OPTIONS)
    if args.controller is None:
        _refuse(args, train_controller.OPTIONS, "without --controller")
    else:
        _refuse(args, ("path", "menu"), "with --controller")
    if not is_mini and len(args.data) != 1:
        raise ValueError(f"train: --data must be given once with the preset {args.preset}, got {len(args.data)} files.")
    for package in ("accelerate", "datasets"):
        if find_spec(package) is None:
            raise ValueError(f"train: {package} must be installed. Install it with `pip install dynskip[train]`.")
    if args.quiet or not is_first_process():
        from transformers.utils import logging

        logging.disable_progress_bar()
    from dynskip.training.finite import NotFiniteError
    from dynskip.training.stage import end_processes

    try:
        lines = _train(args)
    except NotFiniteError as error:
        if is_first_process():
            print(f"dynskip train: error: {error}", file=sys.stderr)
        return 1
    if is_first_process():
        print("\n".join(lines))
    end_processes()
    return 0


def _train(args: argparse.Namespace) -> list[str]:
    """What to say of a finished run of checked options: a line for each folder that it has left."""
    progress = not args.quiet
    if args.preset == "opt-mini":
        from dynskip.training.pretrain.run import TrainingRun

        exported = TrainingRun(_mini_config(args), args.data, args.out, evaluator(progress), progress).train()
        return [f"{exported}: model, tokenizer, and bits per byte of each path in scores.json"]
    training = fine_tune_config(args, args.preset)
    if args.controller is None:
        from dynskip.training.fine_tune.run import FineTuneRun

        models = FineTuneRun(training, args.data[0], args.out, progress=progress).train()
        return [f"{stage}: {folder}" for stage, folder in models.items()]
    from dynskip.training.controller.run import ControllerRun

    config = train_controller.controller_config(args, training)
    folder = ControllerRun(config, args.data[0], args.out, progress=progress).train()
    return [f"{folder}: controller.json and its weights"]


if __name__ == "__main__":
    from dynskip.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
