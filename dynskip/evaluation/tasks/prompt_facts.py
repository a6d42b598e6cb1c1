"""What is known of each prompt besides how it was answered: items of the tasks "facts" and "features"."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynskip.data.corpus import Instruction
from dynskip.data.examples import templated
from dynskip.evaluation.routers.prompt_features import common_prefix, head_length, prompt_features
from dynskip.evaluation.stats.intervals import Floats
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.dataset import Row
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.likelihoods import examples, likelihood_rows
from dynskip.llm import LLM
from dynskip.measure.passes import TokenPass, in_parts

# Logits of all tokens of a batch are held at once, and the states of all layers, twice.
TOKENS_PER_BATCH = 4096
NUMBERS = ("prompt_length", "response_length")
# What routers may read of a prompt: embeddings and counts of its tokens, before anything has run; the full model's
# state at its last token; both.
FEATURES = ("embedding", "state", "all")


def facts_items(setup: Setup, checkpoint: Checkpoint, split: str) -> list[WorkItem]:
    """The items that describe every prompt of ``split`` whose reference is scored, as ``checkpoint`` reads it."""
    rows = likelihood_rows(setup, split)
    return shard_items(setup, "facts", checkpoint, "full", split, grows=True, num_rows=rows)


def feature_items(setup: Setup, checkpoint: Checkpoint, split: str) -> list[WorkItem]:
    """The items that hold what routers read of every prompt of ``split`` whose reference is scored."""
    rows = likelihood_rows(setup, split)
    return shard_items(setup, "features", checkpoint, "full", split, grows=True, dtype=setup.dtype, num_rows=rows)


def run_facts(item: WorkItem, context: Context) -> dict[str, Any]:
    """Row by row of the shard: lengths in tokens, type of task."""
    rows = context.shard(item)
    return {
        "rows": [row.index for row in rows],
        "prompt_length": [len(row.prompt_ids) for row in rows],
        "response_length": [len(row.response_ids) for row in rows],
        "task_type": [task_type(row.instruction.instruction) for row in rows],
    }


def run_features(item: WorkItem, context: Context) -> dict[str, Any]:
    """Row by row of the shard: features of the prompt, and the state at its end, float32 in base64."""
    llm = context.llm(item.checkpoint)
    rows = context.shard(item)
    heads = template_heads(llm.tokenizer, context.setup.template)
    features = [
        prompt_features(row.prompt_ids, embed(llm, row.prompt_ids), head_length(row.prompt_ids, heads)) for row in rows
    ]
    return {
        "rows": [row.index for row in rows],
        "features": [_packed(row) for row in features],
        "state": [_packed(row) for row in prefill_states(llm, rows)],
    }


def _packed(values: Floats) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def read_features(store: ItemStore, items: Sequence[WorkItem], what: str = "embedding") -> Floats:
    """[N, F], float64: what a router reads of the prompts of one split, one of ``FEATURES``, in its order."""
    names = {"embedding": ("features",), "state": ("state",), "all": ("features", "state")}[what]
    columns = [store.column(items, name) for name in names]
    tables = [np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in texts]) for texts in columns]
    return np.concatenate(tables, axis=1).astype(np.float64)


def read_numbers(store: ItemStore, items: Sequence[WorkItem]) -> dict[str, Floats]:
    """By name of a number in ``NUMBERS`` [N], float64: its value for the prompts of one split, in its order."""
    return {name: np.array(store.column(items, name), dtype=np.float64) for name in NUMBERS}


@torch.no_grad()
def prefill_states(llm: LLM, rows: Sequence[Row]) -> list[Floats]:
    """[C] for each row: the full model's state at the last token of its prompt, what its head reads."""
    found: list[Floats] = []
    for part in in_parts(examples(rows)):
        texts = TokenPass(llm.model, part)
        states = texts.states()
        texts.run_(states, range(llm.model.num_layers))
        last = llm.model.decoder.finish(states.index_select(0, texts.last_of_prompts))
        found += list(last.double().cpu().numpy())
    return found


def template_heads(tokenizer: Any, template: str) -> list[tuple[int, ...]]:
    """The token sequences that prompts of a template open with, before the instruction: without an input and with."""
    heads = []
    for input_text in ("", "1"):
        rendered = [templated(tokenizer, template, Instruction(word, input_text, "")) for word in ("Add", "Why")]
        heads.append(tuple(rendered[0][: common_prefix(rendered)]))
    return list(dict.fromkeys(heads))


def embed(llm: LLM, prompt_ids: Sequence[int]) -> Tensor:
    """[T, E]: the token embeddings of a prompt, without positions."""
    return llm.model.embed_tokens(torch.tensor(prompt_ids, device=llm.model.device))


def padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and attention_mask [B, T], and [B, T], bool, True at tokens that predict one of the response."""
    longest = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)
    for seq, row in enumerate(rows):
        ids = torch.tensor(row.prompt_ids + row.response_ids)
        input_ids[seq, : len(ids)] = ids
        attention_mask[seq, : len(ids)] = 1
        scored[seq, len(row.prompt_ids) - 1 : len(ids) - 1] = True
    return input_ids.to(device), attention_mask.to(device), scored.to(device)


OTHER = "other"
FIRST_WORDS = {
    "write": "write compose create generate draft design construct develop make produce craft invent imagine tell "
    "brainstorm devise form formulate come build",
    "rewrite": "rewrite edit convert translate change fix correct revise rephrase paraphrase reword replace transform "
    "modify improve add insert remove delete simplify reorder rearrange arrange sort complete fill combine update "
    "adapt format reformat turn expand proofread restructure switch reverse extend finish",
    "explain": "explain describe discuss define elaborate illustrate outline clarify interpret argue",
    "summarise": "summarize summarise condense shorten abbreviate",
    "list": "list name give provide suggest propose recommend state cite offer mention",
    "classify": "classify identify categorize categorise detect determine select choose pick decide judge label rank "
    "rate group match tag evaluate assess analyze analyse compare contrast find locate extract highlight recognize "
    "predict estimate check verify spot distinguish",
    "calculate": "calculate compute solve multiply divide count sum simulate",
    "question": "what who whom whose which when where why how is are was were do does did can could should would will "
    "has have if",
}
_WORD = re.compile(r"[A-Za-z]+")
_TYPE_OF = {word: kind for kind, words in FIRST_WORDS.items() for word in words.split()}
_POLITE = frozenset(("please", "kindly", "now", "then"))
# "Given a list of names, sort it": the verb follows the comma.
_OPENINGS = frozenset(("given", "in", "for", "using", "based", "from", "with", "as", "after", "considering", "suppose"))


def task_type(instruction: str) -> str:
    """The type of an instruction, a key of ``FIRST_WORDS``, by its first word; "other" for a word not listed there.

    Polite words are passed over, and of an instruction that opens with "given", "in" and the like what stands before
    the first comma is.
    """
    words = _words(instruction)
    if words and words[0] in _OPENINGS:
        words = _words(instruction.partition(",")[2])
    return _TYPE_OF.get(words[0], OTHER) if words else OTHER


def _words(text: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(text)]
    while words and words[0] in _POLITE:
        words.pop(0)
    return words
