"""Tasks for lm-eval from the T0 file, so that it runs without a network and without the data sets of a hub.

python -m bench.lm_eval_tasks --data t0_train_50k.jsonl.xz --out runs/lm-eval-tasks
dynskip lm_eval --model dynskip --model_args pretrained=opt-mini,path=uniform:8 --batch_size auto --tasks t0 \\
    --include_path runs/lm-eval-tasks

The labels of three templates are scored, the answers of one are generated and must match, and the completions of one
are read for their perplexity. The folder holds texts of the data file: keep it out of a checkout.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynskip.data.corpus import Instruction, read_templates
from dynskip.files import write_text

TAG = "t0"
_SEED, _NUM_SHOTS = 0, 3
# What goes on behind "A:" begins with a space, and may repeat the dash of the list of choices; the answer has neither.
_FROM_THE_LIST = {"regexes_to_ignore": [r"^[\s-]+"]}


@dataclass(frozen=True)
class Task:
    """A task of lm-eval whose documents are the rows of one template. labels: its completions, where they are few."""

    name: str
    template: str
    kind: str
    labels: tuple[str, ...] = ()

    def documents(self, rows: Sequence[Instruction]) -> Iterator[dict[str, Any]]:
        """What lm-eval reads, each prompt once, in an order that is drawn."""
        unique = list({row.instruction: row for row in rows}.values())
        random.Random(_SEED).shuffle(unique)
        for row in unique:
            if self.kind == "multiple_choice":
                if row.output not in self.labels:
                    raise ValueError(
                        f"lm_eval_tasks: completions of {self.template} must be of {self.labels}, got "
                        f"{row.output[:40]!r}. Give the T0 file as published."
                    )
                yield {"prompt": row.instruction.rstrip(), "label": self.labels.index(row.output)}
            elif self.kind == "generate_until":
                yield {"prompt": row.instruction.rstrip(), "answer": row.output}
            else:
                yield {"text": row.output}

    def config(self, documents: Path) -> dict[str, Any]:
        """The task, as lm-eval reads it from YAML. documents: the file of its documents."""
        common = {
            "task": self.name,
            "tag": TAG,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
            "output_type": self.kind,
            "metadata": {"version": 1},
        }
        if self.kind == "multiple_choice":
            texts = {"doc_to_text": "{{prompt}}", "doc_to_target": "label", "doc_to_choice": [*self.labels]}
            return {**common, **texts, "metric_list": [_metric("acc", "mean", is_higher_better=True)]}
        if self.kind == "generate_until":
            match = _metric("exact_match", "mean", is_higher_better=True)
            return {
                **common,
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{answer}}",
                "num_fewshot": _NUM_SHOTS,  # how long an answer is, an example tells
                "fewshot_split": "test",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
                "metric_list": [{**match, "ignore_case": True, "ignore_punctuation": True, **_FROM_THE_LIST}],
            }
        measures = [_metric(f"{name}_perplexity", "weighted_perplexity", False) for name in ("word", "byte")]
        return {**common, "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": measures}


def _metric(name: str, aggregation: str, is_higher_better: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": is_higher_better}


TASKS = (
    Task(
        "t0_duplicates",
        "glue_qqp_duplicate_or_not",
        "multiple_choice",
        ("duplicates", "not duplicates"),
    ),
    Task("t0_social", "social_i_qa_Show_choices_and_generate_index", "multiple_choice", ("A", "B", "C")),
    Task(
        "t0_reviews",
        "app_reviews_categorize_rating_using_review",
        "multiple_choice",
        ("Not at all", "No", "Maybe", "Yes", "Definitely"),
    ),
    Task("t0_science", "sciq_Multiple_Choice_Closed_Book_", "generate_until"),
    Task("t0_dialogues", "samsum_Write_a_dialogue_that_match_this_summary", "loglikelihood_rolling"),
)


def write_tasks(data: Path, folder: Path) -> list[Path]:
    """Write the tasks and their documents into ``folder``; returns the files of the tasks."""
    rows = read_templates(data)
    missing = [task.template for task in TASKS if task.template not in rows]
    if missing:
        raise ValueError(f"lm_eval_tasks: {data.name} must hold {', '.join(missing)}, got none. Give the T0 file.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in TASKS:
        documents = (folder / f"{task.name}.jsonl").resolve()
        lines = [json.dumps(document) + "\n" for document in task.documents(rows[task.template])]
        write_text(documents, "".join(lines))
        written.append(folder / f"{task.name}.yaml")
        write_text(written[-1], yaml.safe_dump(task.config(documents), sort_keys=False))
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Write them, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the T0 file, *.jsonl[.xz]")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where tasks and documents go")
    args = parser.parse_args(argv)
    for path in write_tasks(args.data, args.out):
        print(path)


if __name__ == "__main__":
    main()
