"""What guessing along a shallow path gains, measured: the same requests with and without a draft, in turns.

python bench/drafts.py                      OPT-1.3B's shapes and opt-mini: a quarter of an hour on two cores
python bench/drafts.py --only mini          a part of it

Random weights agree with nothing: at OPT-1.3B's shapes the layers that a draft leaves out are scaled until its tokens
agree with the full model's as often as wanted. `dynskip calibrate` comes first: lengths and predictions stand on it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynskip.benchmark.report import markdown_table
from dynskip.causal_lm import CausalLM
from dynskip.costs.defaults import known_costs
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.closed_batch import Generation
from dynskip.engine.engine import Engine
from dynskip.measure.machine import describe
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.linear import Linear
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import Draft

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("random", "mini", "transformers")
PROMPT_LEN = 32
# What drafts should gain, by part, acceptance, common beginning and batch.
TARGETS = {
    **{("random", 0.8, common, 1): 1.40 for common in ("none", "all")},
    ("random", 0.8, "none", 4): 1.25,
    ("random", 0.8, "all", 4): 1.28,
    ("random", 0.8, "none", 8): 1.08,
    ("random", 0.8, "all", 8): 1.12,
    ("mini", None, "", 1): 1.3,
    ("mini", None, "", 4): 1.0,
}
NO_LOSS = 0.98


@dataclass(frozen=True)
class Cell:
    """What is compared with the same engine without drafts.

    num_requests: of a closed batch as many as ``batch``; more are a stream.
    """

    part: str
    common: str
    draft: Draft
    batch: int
    num_requests: int
    num_tokens: int
    wanted: float | None = None

    @property
    def target(self) -> float:
        """The least gain."""
        return TARGETS.get((self.part, self.wanted, self.common, self.batch), NO_LOSS)


def random_cells(num_layers: int) -> Iterator[tuple[float, list[Cell]]]:
    """By acceptance: a draft of a quarter of the layers that shares the path's beginning, or none of it."""
    spread = Draft(LayerPath.of(num_layers, range(1, num_layers, 4)), "own")
    begin = Draft(LayerPath.early_exit(num_layers, num_layers // 4), "path")
    yield (
        0.8,
        [
            Cell("random", common, draft, batch, batch, 64, 0.8)
            for common, draft in (("none", spread), ("all", begin))
            for batch in (1, 4, 8)
        ],
    )
    for wanted in (0.6, 0.7, 0.9):
        yield wanted, [Cell("random", "none", spread, 1, 1, 64, wanted)]
    yield (
        0.0,
        [
            *(Cell("random", "none", spread, batch, batch, 64, 0.0) for batch in (1, 8)),
            Cell("random", "none", spread, 64, 64, 24, 0.0),
            Cell("random", "none", spread, 16, 48, 24, 0.0),
        ],
    )


class Scaled:
    """A model of random weights, the outputs of some of whose layers are scaled."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._original: dict[Linear, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def scale(self, kept: Sequence[int], factor: float) -> None:
        """Scale what all layers but ``kept`` add by ``factor``."""
        for index, layer in enumerate(self.model.decoder.layers):
            for linear in (layer.out_proj, layer.fc2):
                original = (linear.dense_weight().detach(), linear.bias)
                weight, bias = self._original.setdefault(linear, original)
                own = 1.0 if index in kept else factor
                linear.unpack_()
                linear.weight = torch.nn.Parameter(weight * own, requires_grad=False)
                if bias is not None:
                    linear.bias = torch.nn.Parameter(bias * own, requires_grad=False)
                linear.pack_()

    def seek(self, draft: Draft, wanted: float, prompts: list[list[int]], num_tries: int = 6) -> float:
        """Scale until ``draft`` agrees with the full model ``wanted`` of the time, or about; returns the factor."""
        low, high = 1e-3, 1.0
        factor = 1.0
        for _ in range(num_tries if wanted else 1):
            factor = math.sqrt(low * high) if wanted else 1.0
            self.scale(draft.path.layers, factor)
            found = self._agreement(draft, prompts)
            print(f"outputs of other layers x {factor:.3f}: agreement {found:.2f}", file=sys.stderr)
            if abs(found - wanted) < 0.02:
                break
            low, high = (factor, high) if found > wanted else (low, factor)
        return factor

    @torch.no_grad()
    def _agreement(self, draft: Draft, prompts: list[list[int]], num_tokens: int = 24) -> float:
        """How often the draft's most likely token is the full model's, on the full model's own text."""
        params = [SamplingParams(max_tokens=num_tokens, ignore_eos=True)] * len(prompts)
        outputs = Generation(self.model, prompts, params).run()
        texts = torch.tensor([prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)])
        likeliest = self.model(texts[:, :-1], paths=draft.path).logits.argmax(-1)
        begin = texts.shape[1] - num_tokens
        return float((likeliest[:, begin - 1 :] == texts[:, begin:]).float().mean())


def run(
    model: CausalLM, costs: StepCosts, cell: Cell, prompts: list[list[int]], draft: Draft | None
) -> tuple[float, list[list[int]], Engine]:
    """Seconds of decode steps, the tokens, and the engine, closed."""
    engine = Engine(model, costs=costs, batch=cell.batch, max_context_len=max(map(len, prompts)) + cell.num_tokens)
    params = SamplingParams(max_tokens=cell.num_tokens, ignore_eos=True)
    options: dict[str, Any] = {} if draft is None else {"draft": draft.path, "draft_entries": draft.entries}
    ids = [engine.add_request(prompt, params, **options) for prompt in prompts]
    tokens = {output.request_id: output.token_ids for output in engine.run()}
    seconds = engine.tally.decode_s
    engine.close()
    return seconds, [tokens[request_id] for request_id in ids], engine


def measure(model: CausalLM, costs: StepCosts, cell: Cell, prompts: list[list[int]], num_rounds: int) -> dict[str, Any]:
    """A row: the gain of decode steps, its rounds, acceptance, lengths, and what was predicted."""
    prompts = prompts[: cell.num_requests]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    tokens: dict[bool, list[list[int]]] = {}
    engine = None
    for turn in range(num_rounds):
        for with_draft in (False, True) if turn % 2 else (True, False):
            took, tokens[with_draft], made = run(model, costs, cell, prompts, cell.draft if with_draft else None)
            seconds[with_draft].append(took)
            engine = made if with_draft else engine
    assert engine is not None
    gains = sorted(plain / own for plain, own in zip(seconds[False], seconds[True], strict=True))
    same = sum(ours == theirs for ours, theirs in zip(tokens[True], tokens[False], strict=True))
    tally = engine.tally
    drafting = engine.execution.drafting
    row = {
        "part": cell.part,
        "draft": str(cell.draft.path),
        "entries": cell.draft.entries,
        "common": cell.common,
        "batch": cell.batch,
        "requests": cell.num_requests,
        "tokens": cell.num_tokens,
        "wanted": cell.wanted,
        "acceptance": drafting.acceptance.pair(LayerPath.full(model.num_layers), cell.draft),
        "guesses": tally.num_drafted / max(tally.num_verifications, 1),
        "given": 1 + tally.num_accepted / max(tally.num_verifications, 1),
        "gain": statistics.median(gains),
        "low": gains[0],
        "high": gains[-1],
        "predicted": drafting.predicted_gain,
        "plain_ms": 1e3 * statistics.median(seconds[False]) / cell.num_tokens,
        "target": cell.target,
        "same_outputs": same,
        "rounds": num_rounds,
    }
    print(row, file=sys.stderr)
    return row


def random_rows(shape: str, num_rounds: int) -> Iterator[dict[str, Any]]:
    """At the shapes of a published model."""
    model = CausalLM.from_hf(random_hf_model(hf_config(shape)))
    costs = known_costs(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.decoder_config.vocab_size, (64, PROMPT_LEN), generator=generator).tolist()
    scaled = Scaled(model)
    for wanted, cells in random_cells(model.num_layers):
        known: dict[Draft, float] = {}
        for cell in cells:
            if cell.draft not in known:
                known = {cell.draft: scaled.seek(cell.draft, wanted, prompts[:16])}
            yield {**measure(model, costs, cell, prompts, num_rounds), "model": shape, "factor": known[cell.draft]}


def mini_rows(data: Path | None, num_rounds: int) -> Iterator[dict[str, Any]]:
    """opt-mini, which was trained along uniform:4, on Alpaca prompts, or on a few of our own without them."""
    from dynskip.llm import LLM

    llm = LLM()
    prompts = _prompts(llm, data, 64)
    draft = Draft(LayerPath.uniform(24, 4), "own")
    for batch in (1, 4, 16):
        cell = Cell("mini", "", draft, batch, batch, 128)
        yield {**measure(llm.model, known_costs(llm.model), cell, prompts, num_rounds), "model": "opt-mini"}
    cell = Cell("mini", "", Draft(draft.path, "path"), 1, 1, 128)
    yield {**measure(llm.model, known_costs(llm.model), cell, prompts, num_rounds), "model": "opt-mini"}


def transformers_rows(shape: str, num_rounds: int) -> Iterator[dict[str, Any]]:
    """Beside transformers' `assistant_early_exit`, batch 1: the same weights, draft and text."""
    import time

    config = hf_config(shape)
    hf_model = random_hf_model(config)
    draft = Draft(LayerPath.early_exit(config.num_hidden_layers, config.num_hidden_layers // 4), "path")
    from dynskip.models.hf_model import hf_layers

    factor = 0.15
    with torch.no_grad():
        for index, layer in enumerate(hf_layers(hf_model)):
            if index not in draft.path.layers:
                layer.self_attn.o_proj.weight.mul_(factor)
                layer.mlp.down_proj.weight.mul_(factor)
    model = CausalLM.from_hf(hf_model)
    costs = known_costs(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, config.vocab_size, (1, PROMPT_LEN), generator=generator).tolist()
    cell = Cell("transformers", "all", draft, 1, 1, 64)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(num_rounds):
        took, _, _ = run(model, costs, cell, prompts, draft)
        ours.append(took)
        begin_s = time.perf_counter()
        hf_model.generate(
            input_ids=torch.tensor(prompts),
            max_new_tokens=cell.num_tokens,
            min_new_tokens=cell.num_tokens,
            do_sample=False,
            pad_token_id=0,
            assistant_early_exit=draft.path.budget,
        )
        theirs.append(time.perf_counter() - begin_s)
    row = measure(model, costs, cell, prompts, num_rounds)
    gains = sorted(other / own for own, other in zip(ours, theirs, strict=True))
    yield {
        **row,
        "model": shape,
        "factor": factor,
        "over_transformers": statistics.median(gains),
        "over_transformers_low": gains[0],
        "target": NO_LOSS,
    }


def _prompts(llm: Any, data: Path | None, count: int) -> list[list[int]]:
    if data is None:
        raise SystemExit("bench: --data must name the Alpaca file for opt-mini's prompts, got nothing.")
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


def picture(num_tokens: int = 48) -> str:
    """An SVG of a run of opt-mini: a row a verification, a cell a token; guesses, right or wrong, and its own."""
    from dynskip.engine.drafting import Drafting
    from dynskip.engine.request import Span
    from dynskip.llm import LLM

    llm = LLM(deterministic=True)
    rounds: list[tuple[int, list[int], int]] = []
    accepted = Drafting.accepted

    def recorded(self: Drafting, span: Span, num_kept: int) -> None:
        rounds.append((span.sequence.num_tokens - len(prompt), list(span.sequence.guesses), num_kept))
        accepted(self, span, num_kept)

    prompt = llm.chat_prompt("Give me three tips for growing tomatoes on a balcony.")
    params = SamplingParams(max_tokens=num_tokens)
    llm.generate([prompt], params, draft=LayerPath.uniform(24, 4))  # the first run learns what guesses take
    Drafting.accepted = recorded  # type: ignore[method-assign]
    try:
        (output,) = llm.generate([prompt], params, draft=LayerPath.uniform(24, 4))
    finally:
        Drafting.accepted = accepted  # type: ignore[method-assign]
    return _svg(rounds, len(output.token_ids))


def _svg(rounds: Sequence[tuple[int, list[int], int]], num_tokens: int) -> str:
    cell, left, top = 15, 110, 48
    width, height = left + cell * (num_tokens + 9) + 10, top + cell * (len(rounds) + 1) + 12
    kinds = (("right", "#2a9d62", "guess, right"), ("wrong", "#d9634c", "guess, wrong"), ("own", "#3f6fb5", "its own"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11" role="img" aria-label="guesses of a draft and their verifications">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, (_, color, name) in enumerate(kinds):
        x = left + 120 * index
        parts.append(f'<rect x="{x}" y="10" width="11" height="11" fill="{color}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{name}</text>')
    parts.append(f'<text x="{left}" y="40" fill="#555555">tokens of the output, one after the other</text>')
    for row, (first, guesses, num_kept) in enumerate(rounds):
        y = top + cell * row
        parts.append(f'<text x="8" y="{y + 11}" fill="#555555">verification {row + 1}</text>')
        for rank in range(len(guesses)):
            is_right = rank < num_kept - 1
            # In grey the wrong ones are known by their outline.
            style = f'fill="{kinds[0][1]}"' if is_right else f'fill="#ffffff" stroke="{kinds[1][1]}" stroke-width="2"'
            inset = 0 if is_right else 1
            size = cell - 2 - 2 * inset
            x = left + cell * (first + rank) + inset
            parts.append(f'<rect x="{x}" y="{y + inset}" width="{size}" height="{size}" {style}/>')
        x = left + cell * (first + num_kept - 1)
        parts.append(f'<rect x="{x + 3}" y="{y + 3}" width="{cell - 8}" height="{cell - 8}" fill="{kinds[2][1]}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(conditions: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The result as Markdown."""
    header = (
        "model", "draft", "entries", "common beginning", "batch", "requests", "acceptance", "guesses", "tokens given",
        "gain (lowest, highest)", "target", "predicted", "same outputs",
    )  # fmt: skip
    cells = [
        (
            row["model"],
            row["draft"].split(" layers")[0],
            row["entries"],
            row["common"],
            str(row["batch"]),
            str(row["requests"]),
            f"{row['acceptance']:.2f}",
            f"{row['guesses']:.1f}",
            f"{row['given']:.2f}",
            f"{row['gain']:.2f}x ({row['low']:.2f}, {row['high']:.2f})",
            f">= {row['target']:.2f}x" + ("" if row["gain"] >= row["target"] else " (missed)"),
            f"{row['predicted']:.2f}x",
            f"{row['same_outputs']} of {row['requests']}",
        )
        for row in rows
    ]
    beside = [
        f"Beside transformers' `assistant_early_exit={row['draft'].split('/')[0]}` on {row['model']} shapes, batch 1: "
        f"{row['over_transformers']:.2f}x as fast (lowest round {row['over_transformers_low']:.2f}x).\n"
        for row in rows
        if "over_transformers" in row
    ]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    return (
        "# Drafts: measured\n\n"
        f"Written by `python bench/drafts.py`. bfloat16, {conditions['cpu']}, {conditions['num_cores']} cores, "
        f"{conditions['num_threads']} threads, commit {conditions['commit']}, {conditions['date']}, {versions}.\n"
        "Gains are decode seconds without a draft over those with one, medians of rounds in turns; greedy.\n\n"
        + markdown_table(header, cells, right={4, 5, 6, 7, 8})
        + "".join(f"\n{line}" for line in beside)
    )


def main() -> int:
    """Measure, and write JSON lines and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--shape", default="opt-1.3b", help="random weights of that shape (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="Alpaca, for opt-mini's prompts")
    parser.add_argument("--picture", type=Path, help="only write a picture of a run of opt-mini to this SVG file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "drafts", help="folder")
    args = parser.parse_args()
    if args.picture is not None:
        args.picture.write_text(picture(), encoding="utf-8")
        return 0
    parts = {
        "mini": lambda: mini_rows(args.data, args.rounds),
        "random": lambda: random_rows(args.shape, args.rounds),
        "transformers": lambda: transformers_rows("llama-3.2-1b", args.rounds),
    }
    conditions = describe()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, make in parts.items():
        if args.only and name not in args.only:
            continue
        for row in make():
            rows.append(row)
            (args.out / "drafts.md").write_text(page(conditions, rows), encoding="utf-8")
            with (args.out / "drafts.jsonl").open("w", encoding="utf-8") as file:
                for line in [{"part": "conditions", **conditions}, *rows]:
                    file.write(json.dumps(line) + "\n")
    print(page(conditions, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
