"""What the page reads besides answers: what a server offers, and what its engine does now. Pure data."""

from __future__ import annotations

from typing import Any

from dynskip.engine.watch import Watched, WatchedRow, WatchedStep
from dynskip.paths import LayerPath
from dynskip.serving.service import Service


def offer(service: Service) -> dict[str, Any]:
    """What requests may choose from: paths, shallow ones first, drafts, and the bounds of the engine."""
    served, table = service.served, service.table
    tokenizer = served.llm.tokenizer
    paths = [{"path": named.name, "layers": list(named.path.layers)} for named in table.offered]
    default = table.of(None, None, None, "none").named
    return {
        "model": table.name,
        "num_layers": served.llm.model.num_layers,
        "max_model_len": served.max_context_len,
        "has_tokenizer": tokenizer is not None,
        "has_chat_template": tokenizer is not None and tokenizer.chat_template is not None,
        "has_table": bool(table.entries),
        "paths": paths,
        "default_path": {"path": default.name, "layers": list(default.path.layers)},
        "drafts": table.drafts,
        "default_draft": table.default_draft,
        "pool": served.pool,
    }


def live(watched: Watched) -> dict[str, Any]:
    """What an engine holds, and its steps, in numbers: nothing of what requests say, and no ids of theirs.

    ``paths`` has the layers of each path that a row names by its number.
    """
    numbers: dict[LayerPath, int] = {}
    steps = [_step(step, numbers) for step in watched.steps]
    return {
        "time_ms": _ms(watched.time_s),
        "num_waiting": watched.num_waiting,
        "num_prefilling": watched.num_prefilling,
        "num_running": watched.num_running,
        "num_tokens": watched.num_tokens,
        "kv_bytes": watched.kv_bytes,
        "kv_capacity_bytes": watched.kv_capacity_bytes,
        "num_steps": watched.num_steps,
        "paths": [list(path.layers) for path in numbers],
        "steps": steps,
    }


def _step(step: WatchedStep, numbers: dict[LayerPath, int]) -> dict[str, Any]:
    return {
        "number": step.number,
        "begin_ms": _ms(step.begin_s),
        "prefill_ms": _ms(step.prefill_s),
        "decode_ms": _ms(step.decode_s),
        "prompts": [_row(row, numbers) for row in step.prompts],
        "rows": [_row(row, numbers) for row in step.rows],
    }


def _row(row: WatchedRow, numbers: dict[LayerPath, int]) -> list[int | None]:
    """Place, number of the path, tokens, guesses, number of the draft's path."""
    path = numbers.setdefault(row.path, len(numbers))
    draft = None if row.draft is None else numbers.setdefault(row.draft, len(numbers))
    return [row.place, path, row.num_tokens, row.num_guesses, draft]


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
