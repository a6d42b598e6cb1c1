"""``dynskip train``: small models from scratch, and fine-tunes of checkpoints, as resumable runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dynskip.cli.options import check_readable, file_path, set_threads
from dynskip.cli.train_options import (
    add_groups,
    check_options,
    controller_config,
    fine_tune_config,
    mini_config,
    paths_config,
)

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

    from dynskip.data.examples import Example

HELP = "train models that speak at several depths"
DESCRIPTION = "Train small models from scratch, or fine-tune checkpoints, as runs that can be resumed."
EXAMPLES = """examples:
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
  dynskip train --preset paths --model smollm2-135m-instruct --data t0_train_50k.jsonl.xz --out runs/spoken
      an adapter with which a pretrained model speaks along paths that `dynskip search` has found, from texts of its own
  dynskip train --controller hidden --alpha 4 --model runs/paper/full/model --data alpaca_data.json.xz --out runs/hidden
      a controller that reads hidden states, on the frozen model of such a run
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``."""
    parser.add_argument(
        "--preset",
        choices=["opt-mini", "paper", "released-code", "paths"],
        help="default: opt-mini; with --controller: paper",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=file_path,
        metavar="FILE",
        help="Alpaca as *.json[.xz], T0 as *.jsonl[.xz]; give it once a file (the preset paths does without)",
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
    add_groups(parser)


def evaluator(progress: bool) -> Callable[[OPTForCausalLM, Sequence[Example], int], dict[str, float]]:
    """A function of model, examples and pad id: bits per byte of the responses along the full path and the uniform
    paths of a half, a third and a sixth of the layers, which are ULS-12, ULS-8 and ULS-4 of 24."""

    def evaluate(model: OPTForCausalLM, examples: Sequence[Example], pad_id: int) -> dict[str, float]:
        import torch
        from tqdm import tqdm

        from dynskip.models.hf_model import only_layers
        from dynskip.paths import LayerPath
        from dynskip.training.bits_per_byte import bits_per_byte

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
        check_readable(path, "--data")
    set_threads(args.threads)
    if args.preset is None:
        args.preset = "opt-mini" if args.controller is None else "paper"
    check_options(args)
    if not args.data and args.preset != "paths":
        raise ValueError(f"train: --data must be given with the preset {args.preset}, got no file.")
    if args.preset not in ("opt-mini", "paths") and len(args.data) != 1:
        raise ValueError(f"train: --data must be given once with the preset {args.preset}, got {len(args.data)} files.")
    needed = ["accelerate", "datasets"] + ["peft"] * (args.preset == "paths" and args.method != "full")
    for package in needed:
        if find_spec(package) is None:
            raise ValueError(f"train: {package} must be installed. Install it with `pip install dynskip[train]`.")
    # Of the processes that torchrun or accelerate started, the first is the one that speaks.
    is_first_process = os.environ.get("RANK", "0") == "0"
    if args.quiet or not is_first_process:
        from transformers.utils import logging

        logging.disable_progress_bar()
    from dynskip.training.resumable import NotFiniteError
    from dynskip.training.stage import end_processes

    try:
        lines = _train(args)
    except NotFiniteError as error:
        if is_first_process:
            print(f"dynskip train: error: {error}", file=sys.stderr)
        return 1
    if is_first_process:
        print("\n".join(lines))
    end_processes()
    return 0


def _train(args: argparse.Namespace) -> list[str]:
    """What to say of a finished run of checked options: a line for each folder that it has left."""
    progress = not args.quiet
    if args.preset == "opt-mini":
        from dynskip.training.pretrain.run import TrainingRun

        exported = TrainingRun(mini_config(args), args.data, args.out, evaluator(progress), progress).train()
        return [f"{exported}: model, tokenizer, and bits per byte of each path in scores.json"]
    if args.preset == "paths":
        from dynskip.training.paths.run import PathsRun

        folder = PathsRun(paths_config(args), args.data, args.out, progress=progress).train()
        return [f"{folder}: {'the model' if args.method == 'full' else 'the adapter'}, with its paths as found:B"]
    if args.controller is None:
        from dynskip.training.fine_tune.run import FineTuneRun

        models = FineTuneRun(fine_tune_config(args), args.data[0], args.out, progress=progress).train()
        return [f"{stage}: {folder}" for stage, folder in models.items()]
    from dynskip.training.controller.run import ControllerRun

    folder = ControllerRun(controller_config(args), args.data[0], args.out, progress=progress).train()
    return [f"{folder}: controller.json and its weights"]
