"""What each section of the report says: sentences from the verdicts of ``claims.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dynskip.evaluation.report.rows import Row, Summary
from dynskip.evaluation.report.sentences.depths import depth
from dynskip.evaluation.report.sentences.learned_controllers import controllers
from dynskip.evaluation.report.sentences.oracle_controls import oracle
from dynskip.evaluation.report.sentences.paths import hidden_states, static
from dynskip.evaluation.report.sentences.prompt_routers import router
from dynskip.evaluation.report.sibling_sections import siblings_sentences

# By section what it says; in the order of the paper.
SENTENCES: Mapping[str, Callable[[Row, Summary], list[str]]] = {
    "hidden_states": hidden_states,
    "static": static,
    "siblings": siblings_sentences,
    "controllers": controllers,
    "oracle": oracle,
    "router": router,
    "depth": depth,
}


def section_sentences(summary: Summary, name: str) -> list[str]:
    """What the section ``name`` of a summary says; nothing where it is not there or has no rows."""
    section = summary.get(name) or {}
    return SENTENCES[name](section, summary) if section.get("rows") else []
