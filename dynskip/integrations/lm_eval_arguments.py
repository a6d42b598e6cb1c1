"""From what a run of lm-eval asks for to dynskip's own: sizes of batches, paths, drafts, parameters of generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynskip.arguments import as_int, shown
from dynskip.causal_lm import CausalLM
from dynskip.engine.drafting import find_draft
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import Draft

AUTO = "auto"
AUTO_BATCH = 16
# Of the names for the most new tokens that tasks use, the first counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "seed")
_OTHERS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos")
# What asks for nothing: transformers' names for what is so anyway.
_NEUTRAL: dict[str, object] = {"num_beams": 1, "use_cache": True}


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """``value`` as an integer in ``least..most``; a ValueError names the argument."""
    number = as_int(value)
    if number is None or number < least or (most is not None and number > most):
        bound = f"at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"dynskip: {name} must be a whole number, {bound}, got {shown(value)}.")
    return number


def batch_of(batch_size: object, max_batch_size: object = None) -> int:
    """Sequences of a step: ``batch_size`` is their number, or ``auto``, for 16 or ``max_batch_size``."""
    text = str(batch_size)
    if text.partition(":")[0] == AUTO:  # the number behind auto: is how often to look for the size again
        return AUTO_BATCH if max_batch_size is None else whole_number("max_batch_size", max_batch_size)
    number = int(text) if text.isdecimal() else batch_size  # the command line hands it over as text
    return whole_number("batch_size", number)


def path_of(text: object, model: CausalLM) -> LayerPath:
    """The path that ``text`` names, with everything that ``dynskip generate --path`` knows."""
    return LayerPath.parse(str(text), model.num_layers, model)


def draft_of(text: object, path: LayerPath, model: CausalLM) -> Draft | LayerPath | None:
    """The draft that ``text`` names for requests along ``path``: a path, ``auto`` for a search's, or none."""
    if text in (None, "none"):
        return None
    return find_draft(model, path) if text == AUTO else path_of(text, model)


def sampling_params(
    asked: Mapping[str, Any], special_tokens: Mapping[str, int], end_token: int | None, default_max_tokens: int
) -> SamplingParams:
    """The parameters that the ``generation_kwargs`` of a task, and those of the command line, stand for.

    special_tokens: ids of tokens that texts leave out, by name: an ``until`` that is one of them is a stop token.
    end_token: the tokenizer's end of a text, which ends an output beside the ends of the model.
    Greedy unless ``do_sample`` or a temperature says otherwise. Raises ValueError for what is not known.
    """
    rest = dict(asked)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"dynskip: until must be a text or a list of texts, got {shown(until)}.")
    found = [rest.pop(name, None) for name in _MAX_TOKENS]
    max_tokens = next((value for value in found if value is not None), default_max_tokens)
    do_sample = rest.pop("do_sample", None)
    for name, value in _NEUTRAL.items():
        if rest.pop(name, value) != value:
            raise ValueError(f"dynskip: {name} must be {value} or left out, got {shown(asked[name])}.")
    chosen = {name: rest.pop(name) for name in (*_SAMPLED, *_OTHERS) if name in rest}
    if rest:
        raise ValueError(
            f"dynskip: generation_kwargs must be of those that dynskip knows, got {', '.join(sorted(rest))}. Leave "
            f"them out; it knows until, do_sample, {', '.join((*_MAX_TOKENS, *_SAMPLED, *_OTHERS))}."
        )
    if do_sample is False:
        chosen = {name: value for name, value in chosen.items() if name not in _SAMPLED}
    elif do_sample:
        chosen.setdefault("temperature", 1.0)
    ends = [special_tokens[text] for text in until if text in special_tokens]
    if end_token is not None and not chosen.get("ignore_eos"):
        ends.append(end_token)
    return SamplingParams(
        max_tokens=whole_number("max_gen_toks", max_tokens),
        stop=[text for text in until if text and text not in special_tokens],
        stop_token_ids=ends,
        **chosen,
    )
