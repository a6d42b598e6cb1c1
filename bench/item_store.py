"""What a store of many items costs: seconds until it knows what is missing, and memory.

python -m bench.item_store                      100,000 items of 64 prompts, 63 tokens each; writes the figure anew
python -m bench.item_store --items 5000 --dry-run    prints it only

The items are as a sweep leaves them: token ids in files of their own, here of ten writers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynskip.evaluation.sweep.item_files import Writer, encoded, split_token_ids
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.files import write_text

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "bench/results/store/item-store.jsonl"
NUM_WRITERS = 10
# Of a process that has done nothing else: imports, a listing of all items, the store, and what the sweep lacks.
START = """
import json, resource, sys, time
from pathlib import Path
from bench.item_store import made_up_items
from dynskip.evaluation.sweep.store import ItemStore
folder, num_items = Path(sys.argv[1]), int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
items = list(made_up_items(num_items))
start = time.perf_counter()
with ItemStore(folder) as store:
    missing = store.missing(items)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(store.result(items[-1])["rows"]) and store.token_ids(items[-1])
print(json.dumps({"num_items": len(store), "num_missing": len(missing), "seconds": round(seconds, 3),
                  "memory_mib": round(memory / 1024, 1), "process_mib": round((before + memory) / 1024, 1)}))
"""


def made_up_items(num_items: int) -> Iterator[WorkItem]:
    """Items of a sweep: generations along five paths, with many seeds."""
    options = (("dtype", "bfloat16"), ("max_tokens", 64), ("num_rows", 64_000), ("shard_size", 64), ("split_seed", 42))
    path = "uniform:4 uniform:8 uniform:12 uniform:16 full"
    for number in range(num_items):
        seed, shard = divmod(number, 1000)
        yield WorkItem("generate", "0123456789abcdef", path, "fedcba9876543210", "test", seed, shard, options)


def write_made_up(folder: Path, num_items: int, num_prompts: int, num_tokens: int) -> None:
    """A store of such items in ``folder``, each along the first path alone; written without waiting for the disk."""
    token_ids = [[(7919 * seq + 104_729 * token) % 49_152 for token in range(num_tokens)] for seq in range(num_prompts)]
    scores = [round(0.05 + 0.9 * seq / num_prompts, 6) for seq in range(num_prompts)]
    by_path = {"uniform:4": {"rouge_l": scores, "num_tokens": [num_tokens] * num_prompts, "token_ids": token_ids}}
    lean, apart = split_token_ids({"rows": list(range(num_prompts)), "paths": by_path})
    folder.mkdir(parents=True)
    items = list(made_up_items(num_items))
    for first in range(NUM_WRITERS):
        writer = Writer(folder)
        with writer.path().open("wb") as file, writer.path("tokens").open("wb") as tokens:
            for item in items[first::NUM_WRITERS]:
                held = encoded({"key": item.key, "result": apart})
                head = {"key": item.key, "item": item.to_dict(), "seconds": 1.0, "host": "node", "isa": "avx2 fma"}
                place = {"file": writer.path("tokens").name, "offset": tokens.tell(), "size": len(held)}
                tokens.write(held)
                file.write(encoded({**head, "ended": 1_764_000_000.5, "apart": place, "result": lean}))


def measure_start(folder: Path, num_items: int) -> dict[str, Any]:
    """What the start of a process on the store in ``folder`` takes, beside its imports."""
    command = [sys.executable, "-c", START, str(folder), str(num_items)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Write a store, start on it, and keep the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000, metavar="N", help="items (100,000)")
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="prompts of an item (64)")
    parser.add_argument("--tokens", type=int, default=63, metavar="N", help="tokens of an answer (63)")
    parser.add_argument("--dry-run", action="store_true", help="leave the figure as it is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "items"
        write_made_up(folder, args.items, args.prompts, args.tokens)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        found = measure_start(folder, args.items)
    row = {**found, "num_prompts": args.prompts, "num_tokens": args.tokens, "gib": round(num_bytes / 2**30, 2)}
    print(json.dumps(row))
    if not args.dry_run:
        from dynskip.measure.machine import describe  # loads torch, which a store does without

        write_text(FIGURE, json.dumps({**row, **describe()}) + "\n")


if __name__ == "__main__":
    main()
