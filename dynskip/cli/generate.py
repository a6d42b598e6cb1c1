"""``dynskip generate``: prompts in, texts out, each prompt along its own path."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from dynskip.cli import streams
from dynskip.cli.options import UserError, add_model_options, file_path, load_llm, set_threads, show_progress
from dynskip.prompts import check_unicode, lines
from dynskip.speculation.draft import ENTRIES

if TYPE_CHECKING:
    from dynskip.causal_lm import CausalLM
    from dynskip.llm import Output
    from dynskip.sampling import SamplingParams

HELP = "continue prompts, each along its own path"
DESCRIPTION = "Continue prompts in one batch, each through its own subset of the layers."
EXAMPLES = """examples:
  dynskip generate "The lighthouse keeper"
      through all layers of opt-mini, the model shipped with dynskip
  dynskip generate --path uniform:8 --max-tokens 64 "The lighthouse keeper" "A recipe for bread"
      both through 8 layers spread evenly
  dynskip generate --path full --path uniform:8 "The lighthouse keeper" "A recipe for bread"
      one batch, each prompt along its own path
  dynskip generate --chat --path exit:12 "Name three things that float."
      as a request, in the form that the model was fine-tuned on
  dynskip generate --draft uniform:4 "Name three things that float."
      the same text, sooner: 4 layers guess tokens, which all layers verify
  dynskip generate --temperature 0.8 --top-p 0.95 --seed 1 --n 3 "The storm"
      three samples, the same ones each time
  dynskip generate --model facebook/opt-1.3b --path random:12:7 --json --file prompts.txt > outputs.jsonl
      prompts from a file, one a line; outputs as JSON lines
  dynskip generate --model facebook/opt-1.3b --adapter runs/lora "The lighthouse keeper"
      with a LoRA adapter that is merged into the weights

paths:
  full            all layers
  uniform:B       B layers, spread evenly
  exit:B          the first B layers
  random:B:SEED   B layers at random
  layers:I,J,...  exactly these, counted from 0
  found:B         the B layers that `dynskip search` has found for the model
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``generate``."""
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="prompts; without any, and no --file, stdin is read"
    )
    parser.add_argument("--file", metavar="FILE", help="read prompts from FILE, one a line; - is stdin")
    parser.add_argument(
        "--path", action="append", dest="paths", metavar="PATH", help="one for all prompts, or one per prompt, in order"
    )
    parser.add_argument(
        "--draft", metavar="PATH", help="a path that guesses tokens which each prompt's own path verifies; or auto"
    )
    parser.add_argument(
        "--draft-entries",
        choices=ENTRIES,
        default="own",
        help="whose keys and values the draft reads: its own, or the path's (default: %(default)s)",
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt and line")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_options(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=_max_tokens,
        default=64,
        metavar="N",
        help="new tokens at most, or `all` for as many as the model has positions for (default: 64)",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest that sum to P")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="sample among tokens P times as likely as the likeliest"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1, tokens of prompt and output become less likely",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted from the logits of tokens of the output",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="the same, as often as the output has the token",
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument("--n", type=int, default=1, metavar="N", help="outputs per prompt (default: 1)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    group.add_argument(
        "--include-stop", action="store_true", dest="include_stop_str_in_output", help="end behind TEXT, not before it"
    )
    group.add_argument(
        "--min-tokens", type=int, default=0, metavar="N", help="nothing but --max-tokens ends an output before N tokens"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def run(args: argparse.Namespace) -> int:
    """Generate and print; exit status 0, or 1 where a prompt ended by an error, which stderr tells."""
    prompts = read_prompts(args.prompts, args.file)
    paths = args.paths or ["full"]
    if len(paths) not in (1, len(prompts)):
        raise UserError(f"--path must be given once or once per prompt, got {len(paths)} for {len(prompts)} prompts")
    params = _params(args)
    set_threads(args.threads)
    progress = show_progress(args.quiet)

    from dynskip.paths import LayerPath

    llm = load_llm(args)
    num_layers = llm.model.num_layers
    chosen = [LayerPath.parse(text, num_layers, llm.model) for text in paths]
    if args.chat and getattr(llm.tokenizer, "chat_template", None) is None:
        raise UserError("--chat must be left out: the tokenizer of this model has no chat template")
    inputs = [llm.chat_prompt(prompt) for prompt in prompts] if args.chat else prompts
    outputs = llm.generate(
        inputs,
        params,
        paths=chosen[0] if len(chosen) == 1 else chosen,
        draft=args.draft if args.draft in (None, "auto") else LayerPath.parse(args.draft, num_layers, llm.model),
        draft_entries=args.draft_entries,
        progress=progress,
    )
    if args.draft == "auto":
        print(f"dynskip generate: {_found_draft(llm.model, outputs)}", file=sys.stderr)
    show = _print_json if args.json else _print_text
    show(prompts, outputs)
    failed = [(index, output.error) for index, output in enumerate(outputs) if output.error is not None]
    sys.stdout.flush()  # texts before errors, also where both go into one file
    for index, error in failed:
        print(f"dynskip generate: prompt {index}: {error}", file=sys.stderr)
    return 1 if failed else 0


def read_prompts(arguments: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, of ``file`` (``-``: stdin), or of stdin where neither is given."""
    if arguments and file is not None:
        raise UserError("prompts must come from the command line or from --file, got both")
    if arguments:
        for number, prompt in enumerate(arguments, start=1):
            check_unicode(prompt, f"generate: prompt {number}")
        return arguments
    try:
        text = streams.read_stdin() if file in (None, "-") else file_path(str(file)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts must be UTF-8, got byte {error.object[error.start]:#04x} in {file or 'stdin'}"
        ) from error
    prompts = [line for line in lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"{'stdin' if file in (None, '-') else file} must hold at least one prompt, got none")
    return prompts


def _max_tokens(text: str) -> int | None:
    """The number that ``text`` is; None for ``all``."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or all, got {text!r}") from None


def _found_draft(model: CausalLM, outputs: list[Output]) -> str:
    """What --draft auto came to."""
    guessed = [output.draft for output in outputs if output.draft is not None]
    if not guessed:
        found = model.found_paths
        assert found is not None, "else --draft auto is an error"
        if found.draft is None:
            return "no draft: the search has found none that pays"
        return "no draft: it is searched for all layers, and no prompt runs them"
    return f"draft {guessed[0]}" + ("" if len(guessed) == len(outputs) else f", of {len(guessed)} of {len(outputs)}")


def _params(args: argparse.Namespace) -> SamplingParams:
    from dynskip.sampling import SamplingParams

    chosen = ("temperature", "top_k", "top_p", "min_p", "seed", "n")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    ends = ("max_tokens", "min_tokens", "stop", "include_stop_str_in_output", "ignore_eos")
    names = (*chosen, *penalties, *ends)
    return SamplingParams(**{name: getattr(args, name) for name in names})


def _print_json(prompts: list[str], outputs: list[Output]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.path is not None, "the command line gives every prompt one path"
        shown = ("text", "token_ids", "finish_reason")
        samples = [{name: getattr(sample, name) for name in shown} for sample in output.samples]
        line = {
            "prompt": prompt,
            "num_prompt_tokens": len(output.prompt_ids),
            "num_layers": output.path.num_layers,
            "layers": output.path.layers,
            "draft": None if output.draft is None else output.draft.path.layers,
            "num_drafted": output.num_drafted,
            "num_accepted": output.num_accepted,
            "outputs": samples,
            "error": None if output.error is None else str(output.error),
        }
        print(json.dumps(line, ensure_ascii=not streams.writes_unicode()))


def _print_text(prompts: list[str], outputs: list[Output]) -> None:
    """A single output bare, so that it can be piped on; several each under a line that says which it is."""
    bare = len(outputs) == 1 and len(outputs[0].samples) == 1
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for number, sample in enumerate(output.samples, start=1):
            if not bare:
                which = f", output {number} of {len(output.samples)}" if len(output.samples) > 1 else ""
                print(f"{'' if index == 0 and number == 1 else chr(10)}== {prompt} [{output.path}{which}]")
            print(sample.text)
