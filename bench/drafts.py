"""What guessing along a shallow path gains, measured: the same requests with and without a draft, interleaved.

python -m bench.drafts --list                      names of all rows, and which are there already
python -m bench.drafts --only random               OPT-1.3B's shapes: 35 rows, 1.5 hours of two cores (estimated)
python -m bench.drafts --only transformers         beside transformers, Llama-3.2-1B's shapes: 1 row, 14 minutes
python -m bench.drafts --only mini --data alpaca.json                        opt-mini: 6 rows
python -m bench.drafts --row '*-cold' --data alpaca.json                     first runs, nothing learnt: 4 rows
python -m bench.drafts --row 'random-0-*' --again  some rows, anew
python -m bench.drafts --quick --out rehearsal     every row at shapes that take no time: its figures say nothing
python -m bench.drafts --page                      all pages anew from the rows that are there

Random weights agree with nothing: at the shapes of published models the layers that a draft leaves out are scaled until
its tokens agree with the full model's as often as wanted. Each machine has a file of its own; each row is on the disk
when it is measured, and rows that are there are not measured again. `dynskip calibrate` comes first: lengths and
predictions stand on it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.report.drafts import page
from bench.speculation.beside_transformers import CONSTANT_LENGTHS, TransformersDrafts
from bench.speculation.cells import Cell, mini_cells, random_cells, transformers_cells
from bench.speculation.predicted import predicted_gain
from bench.speculation.scaled import Scaled, measured_agreements
from dynskip.causal_lm import CausalLM
from dynskip.costs.defaults import known_costs
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.drafting import forget_drafts
from dynskip.engine.engine import Engine
from dynskip.evaluation.stats.intervals import bootstrap
from dynskip.files import write_text
from dynskip.measure.agreement import Gate, NearTies
from dynskip.measure.machine import describe
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.timing import LEAST_ROUNDS, interleave
from dynskip.models.linear import NATIVE_ROWS
from dynskip.models.llama import llama_shape
from dynskip.models.opt import opt_shape
from dynskip.models.shapes import get_shape
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import Draft

ROOT = Path(__file__).resolve().parents[1]
PROMPT_LEN = 32
_MINI_ROUNDS = 5  # times as many of opt-mini, whose rounds take a second
# Runs before anything is timed: what an engine learns of a single one is what that moment was like.
_LEARNING_ROUNDS = 3
_COLD_ROUNDS = 3  # times as many of first runs, in each of which chance decides anew what is learnt
# Of rehearsals; heads as heavy beside a layer as in the models that they stand for.
QUICK_SHAPES = {
    "random": replace(opt_shape(8, 64, 4), vocab_size=512),
    "transformers": llama_shape(8, 64, 4, 2, 128, 512, 512, 1e4, is_head_tied=False),
}


@dataclass(frozen=True)
class Options:
    """How rows are measured. shapes: of the models of random weights, by part; quick: see `main`."""

    num_rounds: int
    data: Path | None
    quick: bool
    shapes: dict[str, str]

    def hf_config(self, part: str) -> Any:
        """The transformers config of the model of a part."""
        return hf_config(QUICK_SHAPES[part] if self.quick else self.shapes[part])

    def shape(self, part: str) -> str:
        """What that model is called."""
        if part == "mini":
            return "opt-mini"
        return "quick" if self.quick else self.shapes[part]

    def cells(self, part: str) -> list[Cell]:
        """All that a part measures."""
        if part == "mini":
            cells = [*mini_cells()]
        else:
            shape = QUICK_SHAPES[part] if self.quick else get_shape(self.shapes[part])
            cells = [*{"random": random_cells, "transformers": transformers_cells}[part](shape.num_layers)]
        return [replace(cell, num_tokens=12) for cell in cells] if self.quick else cells


def run(
    model: CausalLM, costs: StepCosts, cell: Cell, prompts: Sequence[list[int]], draft: Draft | None
) -> tuple[float, list[list[int]], Engine]:
    """Seconds of decode steps, the tokens, and the engine, closed."""
    engine = Engine(model, costs=costs, batch=cell.batch, max_context_len=max(map(len, prompts)) + cell.num_tokens)
    options: dict[str, Any] = {} if draft is None else {"draft": draft.path, "draft_entries": draft.entries}
    ids = [
        engine.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True), **options)
        for prompt, count in zip(prompts, cell.output_lens(), strict=True)
    ]
    tokens = {output.request_id: output.token_ids for output in engine.run()}
    seconds = engine.tally.decode_s
    engine.close()
    return seconds, [tokens[request_id] for request_id in ids], engine


def measure(
    model: CausalLM, cell: Cell, prompts: Sequence[list[int]], num_rounds: int, rates: Sequence[float] | None
) -> dict[str, Any]:
    """A row: the gain of decode steps, its rounds, acceptance, lengths, and what was predicted.

    rates: how often the draft agrees on each text; None: as the engine has seen it. Before they are timed, and in each
    round, both have to become the same; RuntimeError where they do not, unless guesses stand in a batch of more
    rows than have the same bits. What the engine has learnt of its steps before they are timed, the prediction knows.
    A cold cell keeps nothing of a run for the next, and is not predicted. A round is three runs, with the draft and
    twice without, in each of their six orders in turn. The gain is the median of both quotients of all rounds; that of
    one run without a draft over the other is the control, what the machine makes of no difference. The intervals,
    95 %, are bootstraps over rounds, of `LEAST_ROUNDS` and more; else the lowest and the highest.
    """
    num_rounds *= _COLD_ROUNDS if cell.is_cold else 1
    costs, prompts = known_costs(model), prompts[: cell.num_requests]
    runs = ("draft", "plain", "again")
    orders = [*itertools.permutations(runs)]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[list[int]]] = {}
    engine = learnt = None
    num_drafted = num_given = 0
    for turn in range(-1 if cell.is_cold else -_LEARNING_ROUNDS, num_rounds):
        for name in orders[turn % len(orders)]:
            with_draft = name == "draft"
            if cell.is_cold:
                forget_drafts(model)
            took, tokens[name], made = run(model, costs, cell, prompts, cell.draft if with_draft else None)
            if turn >= 0:
                seconds[name].append(took)
            if with_draft:
                engine = made
                if turn >= 0:
                    num_drafted += made.tally.num_drafted
                    num_given += sum(map(len, tokens[name]))
        if turn == -1 and engine is not None:
            learnt = copy.deepcopy(engine.execution.drafting.lengths)
        assert engine is not None, "there is a run with a draft"
        same = sum(own == plain == again for own, plain, again in zip(*(tokens[name] for name in runs), strict=True))
        has_same_bits = cell.batch <= NATIVE_ROWS or not engine.tally.num_drafted
        if same < len(prompts) and model.backend.name == "native" and has_same_bits:
            raise RuntimeError(
                f"drafts: outputs of {cell.name} must be the same with and without a draft, got {same} of "
                f"{len(prompts)} " + ("before anything was timed." if turn < 0 else "in a round. Nothing is reported.")
            )
    draft_s, plain_s, again_s = (np.array(seconds[name]) for name in runs)
    gain, low, high = _median_of(np.stack([plain_s, again_s], 1) / draft_s[:, None])
    control, control_low, control_high = _median_of((plain_s / again_s)[:, None])
    mean_len = sum(map(len, prompts)) // len(prompts)
    tally = engine.tally
    seen = engine.execution.drafting.acceptance.pair(LayerPath.full(model.num_layers), cell.draft)
    rates = [seen] if rates is None else rates
    return {
        "part": cell.part,
        "is_cold": cell.is_cold,
        "draft": str(cell.draft.path),
        "entries": cell.draft.entries,
        "common": cell.common,
        "batch": cell.batch,
        "requests": cell.num_requests,
        "tokens": cell.num_tokens,
        "wanted": cell.wanted,
        "acceptance": statistics.fmean(rates),
        "acceptance_seen": seen,
        "guesses": tally.num_drafted / max(tally.num_verifications, 1),
        "given": 1 + tally.num_accepted / max(tally.num_verifications, 1),
        "drafted": num_drafted / num_given,
        "gain": gain,
        "low": low,
        "high": high,
        "seconds": {name: [round(each, 5) for each in taken] for name, taken in seconds.items()},
        "control": control,
        "control_low": control_low,
        "control_high": control_high,
        "predicted_of": "run",
        "predicted": None if cell.is_cold else predicted_gain(model, costs, cell, rates, mean_len, learnt),
        "plain_ms": 1e3 * float(np.median([plain_s, again_s])) / cell.num_tokens,
        "target": cell.target,
        "same_outputs": same,
        "rounds": num_rounds,
    }


def _median_of(ratios: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median of ``ratios`` [rounds, K] and its interval; the lowest and the highest where there are few rounds."""
    median = float(np.median(ratios))
    if len(ratios) < LEAST_ROUNDS:
        return median, float(ratios.min()), float(ratios.max())
    interval = bootstrap(np.median, ratios)
    return median, float(interval.low), float(interval.high)


def random_rows(cells: Sequence[Cell], options: Options) -> Iterator[dict[str, Any]]:
    """At the shapes of a published model."""
    model = CausalLM.from_hf(random_hf_model(options.hf_config("random")))
    prompts = _random_prompts(max(cell.num_requests for cell in cells), model.decoder_config.vocab_size)
    scaled = Scaled(model)
    for cell in cells:
        assert cell.wanted is not None, "random weights are scaled"
        own = prompts[: cell.num_requests]
        factor, rates = scaled.seek(cell.draft, cell.wanted, own, cell.num_tokens)
        yield {**measure(model, cell, own, options.num_rounds, rates), "factor": factor}


def mini_rows(cells: Sequence[Cell], options: Options) -> Iterator[dict[str, Any]]:
    """opt-mini, which was trained along uniform:4, on Alpaca prompts."""
    from dynskip.llm import LLM

    llm = LLM()
    prompts = _prompts(llm, options.data, max(cell.num_requests for cell in cells))
    for cell in cells:
        # A pass along the draft alone reads entries of its own.
        own = prompts[: cell.num_requests] if cell.draft.entries == "own" else None
        rates = None if own is None else measured_agreements(llm.model, cell.draft, own, cell.num_tokens)
        yield measure(llm.model, cell, prompts, _MINI_ROUNDS * options.num_rounds, rates)


def transformers_rows(cells: Sequence[Cell], options: Options) -> Iterator[dict[str, Any]]:
    """Beside transformers' `assistant_early_exit`, batch 1: whole calls with the same weights, draft and prompt."""
    config = options.hf_config("transformers")
    model: CausalLM | None = None
    for cell in cells:
        assert cell.wanted is not None, "random weights are scaled"
        hf_model = random_hf_model(config)  # its layers as they were made
        if model is None:
            model = CausalLM.from_hf(hf_model)
            scaled, costs = Scaled(model), known_costs(model)
        prompts = _random_prompts(1, config.vocab_size)
        factor, rates = scaled.seek(cell.draft, cell.wanted, prompts, cell.num_tokens)
        theirs = TransformersDrafts(hf_model, cell.draft.path.budget)
        theirs.scale(factor)
        gate = Gate(hf_model, [LayerPath.full(model.num_layers)])
        gate.check_model(model)
        row = measure(model, cell, prompts, options.num_rounds, rates)
        yield {
            **row,
            **_beside(model, costs, cell, prompts[0], theirs, NearTies(model, gate), options),
            "factor": factor,
        }


def _beside(
    model: CausalLM,
    costs: StepCosts,
    cell: Cell,
    prompt: list[int],
    theirs: TransformersDrafts,
    ties: NearTies,
    options: Options,
) -> dict[str, Any]:
    """What is added to a row: transformers with and without guesses, once the tokens of all four are the same."""

    def ours(draft: Draft | None) -> list[int]:
        return run(model, costs, cell, [prompt], draft)[1][0]

    tokens, plain = ours(None), theirs.generate(prompt, cell.num_tokens, None)
    alike = ties.num_equal("dynskip and transformers", prompt, tokens, plain)
    by_length: dict[int, float] = {}
    for length in CONSTANT_LENGTHS:
        begin_s = time.perf_counter()
        guessed = theirs.generate(prompt, cell.num_tokens, length)
        by_length[length] = time.perf_counter() - begin_s
        ties.num_equal("transformers with and without guesses", prompt, plain, guessed)
    length = min(by_length, key=by_length.__getitem__)
    with theirs.counting() as counted:
        theirs.generate(prompt, cell.num_tokens, length)
    tasks: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(None),
        "ours, guessing": lambda: ours(cell.draft),
        "theirs": lambda: theirs.generate(prompt, cell.num_tokens, None),
        "theirs, guessing": lambda: theirs.generate(prompt, cell.num_tokens, length),
    }
    samples = interleave({name: _untimed(task) for name, task in tasks.items()}, options.num_rounds)
    ms = {name: [sample for each in found.rounds for sample in each] for name, found in samples.items()}
    over = sorted(other / own for own, other in zip(ms["ours, guessing"], ms["theirs, guessing"], strict=True))
    return {
        "over_transformers": statistics.median(over),
        "over_transformers_range": [over[0], over[-1]],
        "over_plain_transformers": samples["theirs"].over(samples["ours"]),
        "their_gain": samples["theirs"].over(samples["theirs, guessing"]),
        "whole_call_gain": samples["ours"].over(samples["ours, guessing"]),
        "their_length": length,
        "their_guesses": counted.num_drafted / max(counted.num_verifications, 1),
        "their_acceptance": counted.acceptance,
        "tokens_alike": alike,
        "call_ms": {name: found.ms for name, found in samples.items()},
    }


def _untimed(task: Callable[[], Any]) -> Callable[[], None]:
    """``task`` without its result, which `interleave` would take for a time."""

    def call() -> None:
        task()

    return call


def _random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(3, vocab_size, (count, PROMPT_LEN), generator=generator).tolist()
    return prompts


def _prompts(llm: Any, data: Path | None, count: int) -> list[list[int]]:
    if data is None:
        raise SystemExit("drafts: --data must name the Alpaca file for opt-mini's prompts, got nothing.")
    from dynskip.data.corpus import read_instructions
    from dynskip.data.templates import prompt_text

    prompts = []
    for row in read_instructions(data):
        ids = list(llm.tokenizer(prompt_text(row.instruction, row.input))["input_ids"])
        if len(ids) <= 200:
            prompts.append(ids)
        if len(prompts) == count:
            break
    return prompts


PARTS: dict[str, Callable[[Sequence[Cell], Options], Iterator[dict[str, Any]]]] = {
    "mini": mini_rows,
    "random": random_rows,
    "transformers": transformers_rows,
}


class Results:
    """Rows by name, in a file of JSON lines behind the conditions of the last run; the page beside it follows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conditions: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            self.conditions, self.rows = lines[0], {line["row"]: line for line in lines[1:]}

    def add(self, row: dict[str, Any]) -> None:
        """Keep ``row``, in place of one of its name."""
        self.rows[row["row"]] = row
        lines = [{"part": "conditions", **self.conditions}, *self.rows.values()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.write_page()

    def write_page(self) -> None:
        """Write the page of the rows that are there."""
        write_text(self.path.with_suffix(".md"), self.page())

    def page(self) -> str:
        """As Markdown."""
        return page(self.conditions, list(self.rows.values()))


def select(cells: Iterable[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names fit one of ``patterns``; all without any."""
    return [cell for cell in cells if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write JSON lines and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=(*PARTS,), help="repeatable (default: all)")
    parser.add_argument("--row", action="append", default=[], metavar="PATTERN", help="rows by name; repeatable")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: tiny shapes, 12 tokens, 2 rounds")
    parser.add_argument("--shape", default="opt-1.3b", help="random weights of that shape (default: %(default)s)")
    parser.add_argument("--llama", default="llama-3.2-1b", metavar="SHAPE", help="beside transformers (%(default)s)")
    parser.add_argument("--data", type=Path, help="Alpaca, for opt-mini's prompts")
    parser.add_argument("--page", action="store_true", help="write all pages anew, and measure nothing")
    parser.add_argument("--picture", type=Path, help="only write a picture of a run of opt-mini to this SVG file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "drafts", help="folder")
    args = parser.parse_args(argv)
    if args.picture is not None:
        from bench.speculation.picture import picture

        args.picture.write_text(picture(), encoding="utf-8")
        return 0
    shapes = {"random": args.shape, "transformers": args.llama}
    options = Options(2 if args.quick else args.rounds, args.data, args.quick, shapes)
    if args.page:
        paths = sorted(args.out.glob("*.jsonl"))
        if not paths:
            raise SystemExit(f"drafts: --out must hold rows for --page, got none in {args.out}. Measure rows first.")
        for path in paths:
            Results(path).write_page()
        return 0
    results = Results(args.out / f"{describe()['machine']}.jsonl")
    wanted = {name: select(options.cells(name), args.row) for name in args.only or PARTS}
    if args.list:
        for cells in wanted.values():
            for cell in cells:
                known = results.rows.get(cell.name)
                print(cell.name if known is None else f"{cell.name:<28} there, {known.get('took_s', 0):.0f} s")
        return 0
    for name, cells in wanted.items():
        missing = [cell for cell in cells if args.again or cell.name not in results.rows]
        if not missing:
            continue
        results.conditions = describe()
        begin_s = time.perf_counter()
        for cell, row in zip(missing, PARTS[name](missing, options), strict=True):
            took_s, begin_s = time.perf_counter() - begin_s, time.perf_counter()
            when = {key: results.conditions[key] for key in ("commit", "date")}
            results.add({"row": cell.name, "model": options.shape(name), **row, **when, "took_s": took_s})
            print(f"{cell.name}: {row['gain']:.2f}x, {took_s:.0f} s", file=sys.stderr)
    if results.rows:
        print(results.page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
