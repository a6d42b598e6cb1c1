"""What lm-eval finds along the paths of a model, beside its own ``hf`` at full depth: scores, errors, CPU seconds.

python -m bench.lm_eval_table --data t0_train_50k.jsonl.xz --limit 200

The tasks are those of bench/lm_eval_tasks.py. A row, which is a model along a path at one task, is on the disk once it
is found, and is not found again; `--fresh` forgets it. The transformers folder for ``hf`` is written from the same
weights. Needs the extra lm-eval.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.lm_eval_tasks import TASKS, write_tasks
from dynskip.benchmark.report import markdown_table
from dynskip.causal_lm import CausalLM
from dynskip.files import file_hash, write_text
from dynskip.host import package_version
from dynskip.llm import LLM
from dynskip.measure.machine import describe

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench/results/lm-eval"
MODEL = "smollm2-135m-paths"
# Who answers without a model, for scale.
CONSTANT = "most frequent label"
# What a task is told by.
METRICS = {"multiple_choice": "acc", "generate_until": "exact_match", "loglikelihood_rolling": "word_perplexity"}
BATCH = 16


@dataclass(frozen=True)
class Contender:
    """A model of lm-eval along a path, in a dtype."""

    model: str
    path: str
    dtype: str

    def labels(self, args: argparse.Namespace) -> dict[str, Any]:
        """What its rows are known by, beside their tasks."""
        return {"model": self.model, "path": self.path, "dtype": self.dtype, "limit": args.limit}

    def make(self, args: argparse.Namespace) -> Any:
        """The loaded model."""
        import lm_eval.models  # noqa: F401  # registers its own
        from lm_eval.api.registry import get_model

        options = {"dtype": self.dtype, "batch_size": BATCH, "device": "cpu"}
        if self.model == "hf":
            return get_model("hf")(pretrained=str(hf_folder(args)), **options)
        from dynskip.integrations.lm_eval import DynskipLM

        return DynskipLM(args.model, path=self.path, **options)


def contenders(paths: Sequence[str]) -> list[Contender]:
    """Those of the table: all paths in dynskip's own dtype, and the full one beside ``hf`` in that and in float32."""
    own = [Contender("dynskip", path, "bfloat16") for path in ("full", *paths)]
    wide = [Contender("dynskip", "full", "float32"), Contender("hf", "full", "float32")]
    return [*own, *wide, Contender("hf", "full", "bfloat16")]


def hf_folder(args: argparse.Namespace) -> Path:
    """A folder for transformers with the weights and the tokenizer of the model, written where there is none."""
    folder: Path = args.work / f"{Path(args.model).name}-hf"
    if not (folder / "tokenizer_config.json").is_file():
        CausalLM.from_pretrained(args.model, dtype="float32", pack=False).save_pretrained(folder)
        LLM(args.model).tokenizer.save_pretrained(folder)  # type: ignore[union-attr]  # a model that speaks
    return folder


class Table:
    """The rows that there are, and those to come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.file = args.out / f"{Path(args.model).name}.jsonl"
        if args.fresh:
            self.file.unlink(missing_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def fill(self) -> None:
        """Find what is missing."""
        write_tasks(self.args.data, self.args.work / "tasks")
        shared = {"data_hash": file_hash(self.args.data), "batch": BATCH, "lm_eval": package_version("lm-eval")}
        self._add_constant(shared)
        for contender in contenders(self.args.paths):
            labels = contender.labels(self.args)
            missing = [task for task in TASKS if find(self.rows, task=task.name, **labels) is None]
            if not missing:
                continue
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=str(self.args.work / "tasks"), include_defaults=False)
            lm = contender.make(self.args)
            for task in missing:
                begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
                found = simple_evaluate(
                    lm, tasks=[task.name], limit=self.args.limit, task_manager=manager, bootstrap_iters=1000
                )
                cpu_s, seconds = time.process_time() - begin_cpu_s, time.perf_counter() - begin_s
                results, metric = found["results"][task.name], METRICS[task.kind]
                error = results.get(f"{metric}_stderr,none")
                row = {
                    **labels,
                    "task": task.name,
                    "metric": metric,
                    "value": results[f"{metric},none"],
                    "stderr": error if isinstance(error, float) else None,
                    "num_documents": found["n-samples"][task.name]["effective"],
                    "seconds": round(seconds, 2),
                    "cpu_seconds": round(cpu_s, 2),
                }
                self.add({**row, **shared, **describe()})
            del lm
            gc.collect()

    def _add_constant(self, shared: dict[str, Any]) -> None:
        """What is right of the label that most of the documents have, for each task with labels."""
        labels = {"model": CONSTANT, "path": "", "dtype": "", "limit": self.args.limit}
        for task in TASKS:
            if not task.labels or find(self.rows, task=task.name, **labels) is not None:
                continue
            lines = (self.args.work / "tasks" / f"{task.name}.jsonl").read_text().splitlines()[: self.args.limit]
            counts = Counter(json.loads(line)["label"] for line in lines)
            share = max(counts.values()) / len(lines)
            found = {"metric": METRICS[task.kind], "value": share, "num_documents": len(lines)}
            # The same error as that of lm-eval's scores: of the mean of zeros and ones.
            error = math.sqrt(share * (1 - share) / (len(lines) - 1)) if len(lines) > 1 else None
            seconds = {"stderr": error, "seconds": 0.0, "cpu_seconds": 0.0}
            self.add({**labels, "task": task.name, **found, **seconds, **shared, **describe()})

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = ("model", "path", "dtype", "task", "metric", "value", "stderr", "num_documents", "cpu_seconds")
        print(", ".join(f"{name} {row[name]}" for name in shown), flush=True)


def find(rows: Sequence[dict[str, Any]], **labels: Any) -> dict[str, Any] | None:
    """The last row with these labels."""
    fitting = [row for row in rows if all(row.get(name) == value for name, value in labels.items())]
    return fitting[-1] if fitting else None


def page(rows: Sequence[dict[str, Any]], model: str) -> str:
    """The table of all rows."""
    kept = list({(*_key(row), row["task"]): row for row in rows}.values())  # the last of each
    names = [task.name for task in TASKS if any(row["task"] == task.name for row in kept)]
    metrics = {row["task"]: row["metric"] for row in kept}
    body = [[*_key(kept_rows[0])[:3], *_cells(kept_rows, names)] for kept_rows in _by_contender(kept)]
    head = ["model", "path", "dtype", *(f"{name}: {metrics[name]}" for name in names), "CPU seconds"]
    count = {row["num_documents"] for row in kept}
    machine = [row for row in kept if row["model"] != CONSTANT][-1]
    sums = "\n".join(f"- {line}" for line in _conditions(kept))
    return (
        f"# {model} in lm-eval\n\nWritten by `python -m bench.lm_eval_table`. {_range(count)} documents a task of "
        f"bench/lm_eval_tasks.py, {BATCH} sequences a batch, {machine['num_threads']} thread(s) on {machine['cpu']}; "
        "behind each score its standard error. `hf` is lm-eval's own model, at full depth, on the same weights; "
        f"CPU seconds are those of all tasks, without loading. {_chance(names)}\n\n"
        f"{markdown_table(head, body, set(range(3, len(head))))}\n{sums}\n"
    )


def _chance(names: Sequence[str]) -> str:
    """What guessing comes to."""
    shares = [f"{1 / len(task.labels):.3f} of {task.name}" for task in TASKS if task.labels and task.name in names]
    return f"Guessing is right in {', '.join(shares)}; `{CONSTANT}` is what its label alone is right in." * bool(shares)


def _key(row: dict[str, Any]) -> tuple[str, str, str, Any]:
    return row["model"], row["path"], row["dtype"], row["limit"]


def _by_contender(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for key in dict.fromkeys(map(_key, rows)):
        yield [row for row in rows if _key(row) == key]


def _cells(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """The scores of one contender at each task, and its seconds."""
    for name in names:
        row = find(rows, task=name)
        error = "" if row is None or row["stderr"] is None else f" ± {row['stderr']:.3f}"
        yield "-" if row is None else f"{row['value']:.3f}{error}"
    yield f"{sum(row['cpu_seconds'] for row in rows):.0f}"


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _conditions(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Under which versions and when rows were found."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["model"] == CONSTANT:
            continue
        versions = {**row["versions"], "lm-eval": row["lm_eval"]}
        shown = ", ".join(f"{name} {versions[name]}" for name in ("lm-eval", "dynskip", "torch", "transformers"))
        groups.setdefault(f"commit {row['commit']}, {row['date'][:10]}, {shown}", []).append(
            f"{row['model']} {row['path']} {row['dtype']}"
        )
    for conditions, names in groups.items():
        yield f"{conditions}: {', '.join(dict.fromkeys(names))}"


def main(argv: Sequence[str] | None = None) -> None:
    """Find what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the T0 file, *.jsonl[.xz]")
    parser.add_argument("--model", default=MODEL, help="(default: %(default)s)")
    parser.add_argument(
        "--paths", nargs="*", default=["found:25", "found:20", "found:15"], metavar="PATH", help="beside the full one"
    )
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="documents of a task (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/lm-eval", help="tasks and the folder for hf")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where rows and the table go")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(args)
    table.fill()
    write_text(args.out / f"{Path(args.model).name}.md", page(table.rows, Path(args.model).name))


if __name__ == "__main__":
    main()
