"""The demo's first part: a real pretrained model asked at full depth, without three layers, and tuned for fewer."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynskip.cli.demo_common import prompt_ids

if TYPE_CHECKING:
    from torch import Tensor

    from dynskip.llm import LLM
    from dynskip.paths import LayerPath

MODEL, BASE = "smollm2-135m-paths", "smollm2-135m-instruct"
QUESTIONS = ("Why does bread rise?", "What is the capital of Japan?")
# Layers that it misses least, and how many layers have the paths that it was tuned for.
LEFT_OUT = (5, 14, 17)
BUDGETS = (25, 20, 15)
# Greedy tokens that transformers has to agree on.
NUM_CHECKED = 32


@dataclass(frozen=True)
class Answer:
    """A greedy answer along a path, what it took, and nats a token of the untuned full-depth answer along that path.

    seconds: of the whole answer. token_ms: milliseconds a token, after the first; None of an answer of one token.
    """

    question: str
    tuned: bool
    num_layers: int
    text: str
    seconds: float
    token_ms: float | None
    nats: float


@dataclass(frozen=True)
class Answers:
    """All answers, and whether the model as it came begins one with the same tokens as in transformers, in float32."""

    answers: list[Answer]
    same_as_transformers: bool


def run_answers(max_tokens: int, backend: str) -> Answers:
    """Ask `BASE` in full and without `LEFT_OUT`, `MODEL` along its `BUDGETS`; hold `BASE` against transformers."""
    from dynskip.llm import LLM
    from dynskip.paths import LayerPath
    from dynskip.sampling import SamplingParams

    base, tuned = LLM(BASE, backend=backend), LLM(MODEL, backend=backend)
    params = SamplingParams(max_tokens=max_tokens)
    full = LayerPath.full(base.model.num_layers)
    ways = [(base, full), (base, LayerPath.of(len(full.layers), set(full.layers) - set(LEFT_OUT)))]
    ways += [(tuned, LayerPath.found(tuned.model, budget)) for budget in BUDGETS]
    answers = []
    for question in QUESTIONS:
        prompt, whole = prompt_ids(base, question), None
        for llm, path in ways:
            [output] = llm.generate([prompt], params, paths=path)
            token_ms = None if output.tpot_s is None else round(1000 * output.tpot_s, 2)
            whole = output.token_ids if whole is None else whole
            nats = round(_nats(llm, prompt, whole, path), 3)
            took = round(output.latency_s, 3), token_ms, nats
            answers.append(Answer(question, llm is tuned, path.budget, output.text or "", *took))
    return Answers(answers, _agrees(prompt_ids(base, QUESTIONS[0]), backend))


def answers_page(found: Answers) -> str:
    """The answers with what they took, and the verdict."""
    width = min(shutil.get_terminal_size().columns, 120)
    left_out = ", ".join(map(str, LEFT_OUT))
    lines = [
        f"ANSWERS: {BASE}, a pretrained model, at full depth and without layers {left_out}; tuned for fewer; greedy",
        "nats: a token of the first answer, along the path",
        "",
    ]
    for answer in found.answers:
        pace = "" if answer.token_ms is None else f" ({answer.token_ms:.1f} ms a token)"
        layers = f"{answer.num_layers} layers{', tuned' if answer.tuned else ''}"
        lines.append(f"[{layers}] {answer.seconds:.2f} s{pace}, {answer.nats:.2f} nats  > {answer.question}")
        for paragraph in answer.text.strip().splitlines() or ["(nothing)"]:
            lines += textwrap.wrap(paragraph, width, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    verdict = "equal to" if found.same_as_transformers else "NOT EQUAL TO"
    lines.append(f"Untuned, its first {NUM_CHECKED} tokens in float32 are {verdict} transformers'.")
    return "\n".join(lines) + "\n"


def _nats(llm: LLM, prompt: list[int], answer: list[int], path: LayerPath) -> float:
    """Nats a token of ``answer`` after ``prompt`` along ``path``."""
    import torch

    with torch.no_grad():
        logits: Tensor = llm.model(torch.tensor([prompt + answer]), paths=path).logits[0, len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer)))


def _agrees(prompt: list[int], backend: str) -> bool:
    """Whether transformers' model of the same weights says the same `NUM_CHECKED` greedy tokens, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynskip.assets import packaged_file
    from dynskip.causal_lm import CausalLM
    from dynskip.engine.closed_batch import Generation
    from dynskip.models.gguf import read_gguf
    from dynskip.sampling import SamplingParams

    model = CausalLM.from_pretrained(BASE, dtype="float32", backend=backend)
    params = SamplingParams(max_tokens=NUM_CHECKED, ignore_eos=True)
    [sequence] = Generation(model, [prompt], [params]).run()
    read = read_gguf(packaged_file(BASE), "demo")
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read.config)).eval()
    hf_model.load_state_dict({**read.tensors, "lm_head.weight": read.tensors["model.embed_tokens.weight"]})
    with torch.no_grad():
        logits = hf_model(torch.tensor([prompt + sequence.token_ids])).logits[0, len(prompt) - 1 : -1]
    return bool(logits.argmax(-1).tolist() == sequence.token_ids)
