"""The text-level entry point: prompts in, texts out, each along its own path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dynskip.arguments import as_token_ids, is_array
from dynskip.assets import find_model, opt_mini_directory
from dynskip.causal_lm import CausalLM, ExecutorName, check_ids
from dynskip.engine.closed_batch import Generation
from dynskip.engine.request import RequestOutput
from dynskip.engine.text_rule import TextRule
from dynskip.models.tokenizer import read_tokenizer
from dynskip.prompts import Message, chat_ids, text_ids
from dynskip.routing.routes import Paths
from dynskip.sampling import SamplingParams
from dynskip.scheduler.policies.policy import MAX_BATCH
from dynskip.speculation.draft import DraftEntries, Drafts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Text, or token ids: a list, or a one-dimensional array of integers, of torch or numpy.
Prompt: TypeAlias = "str | Sequence[int] | Tensor | NDArray[Any]"


Output = RequestOutput


class LLM:
    """A model and its tokenizer.

    model: a CausalLM, a directory, a hub id, or None: "opt-mini", the small model shipped with the package.
    tokenizer: a transformers tokenizer, a directory or hub id, or None: the one beside the model. A model object, or a
        directory without tokenizer files, takes token ids only then; ``.tokenizer`` is None.
    dtype, device, backend, deterministic, adapter: as in CausalLM.from_pretrained; not with a model object. The
        tokenizer beside an adapter is not read: pass the folder as ``tokenizer``, if it is another one.
    """

    def __init__(
        self,
        model: CausalLM | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        deterministic: bool | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        options = {
            "dtype": dtype,
            "device": device,
            "backend": backend,
            "deterministic": deterministic,
            "adapter": adapter,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(model, CausalLM):
            if given:
                raise ValueError(f"LLM: {next(iter(given))} must be left out with a model object, got both.")
            self.model = model
        else:
            model = opt_mini_directory() if model is None else model
            if not isinstance(model, str | Path):
                raise TypeError(
                    f"LLM: model must be a dynskip.CausalLM, a directory, a hub id or None, got {type(model)}. "
                    "CausalLM.from_hf converts a transformers model."
                )
            self.model = CausalLM.from_pretrained(model, **given)  # type: ignore[arg-type]  # checked there
            if tokenizer is None and _may_have_tokenizer(Path(find_model(model))):
                tokenizer = model
        self.tokenizer = _load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        if self.tokenizer is not None and not (callable(self.tokenizer) and hasattr(self.tokenizer, "decode")):
            raise TypeError(
                f"LLM: tokenizer must be a transformers tokenizer, a directory or a hub id, got {type(tokenizer)}."
            )

    def generate(
        self,
        prompts: Sequence[Prompt] | Tensor | NDArray[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        paths: Paths = None,
        *,
        kv_policy: str | None = None,
        prompt_depth: str = "path",
        draft: Drafts = None,
        draft_entries: DraftEntries = "own",
        executor: ExecutorName = "compact",
        progress: bool = False,
    ) -> list[Output]:
        """One Output per prompt, in order; the batch runs together, each prompt along its own path.

        prompts: texts, or token ids as lists or one-dimensional arrays. A two-dimensional array is a batch of prompts
            of one length, each row one of them, without padding.
        params: one for all, or one per prompt; None for the defaults.
        paths: a LayerPath, one per prompt, bool [B, L], bool [B, T, L] per token (T >= prompt + max_tokens - 1; row p
            is the token at position p), a controller, or None for all layers.
        kv_policy, prompt_depth: for per-token paths only: what a skipped layer stores ("propagate", "evict", "share"),
            and whether the prompt runs its own layers ("path") or all ("full").
        draft: a path that guesses tokens, which each prompt's own path verifies: the same output, sooner. A LayerPath,
            one per prompt (None for none), "auto" for the one that `dynskip search` has found, or None.
        draft_entries: whose keys and values a draft reads, those of its "own" making or the "path"'s; for the latter it
            runs layers of the path only.
        progress: show a progress bar on stderr.

        A prompt whose logits are not finite ends with finish_reason "error" and its `Output.error`; the others go on.
        Raises: TypeError, ValueError on bad input, KVCacheMemoryError where the cache does not fit; nothing has run.
        What a controller raises ends all of them.
        """
        every = _prompt_list(prompts)
        all_params = self._params(params, len(every))
        prompt_ids = [self.encode(prompt, f"generate: prompt {index}") for index, prompt in enumerate(every)]
        generation = Generation(
            self.model,
            prompt_ids,
            all_params,
            paths,
            kv_policy,
            prompt_depth,
            executor,
            self.tokenizer,
            draft,
            draft_entries,
        )
        _run_with_bar(generation) if progress else generation.run()
        return [
            output.with_text(partial(self.text, stop=param))
            for output, param in zip(generation.outputs, all_params, strict=True)
        ]

    def chat_prompt(self, messages: str | Sequence[Message], *, special_tokens: bool = True) -> list[int]:
        """The token ids of ``messages`` in the tokenizer's chat template, ready for ``generate`` to answer.

        messages: what a user says, or a conversation, a list of {"role": R, "content": text} with "system", "user" or
            "assistant" for R.
        special_tokens: as in `encode`; what the template writes itself is not touched.
        Raises ValueError without a tokenizer that has a chat template, and for a role that the template leaves out.
        """
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(
                "chat_prompt: the model must come with a chat template, got none. Pass the prompt to generate as it is."
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return chat_ids(self.tokenizer, messages, special_tokens)

    def encode(self, prompt: Prompt, what: str = "encode: prompt", *, special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt that is a text or token ids; errors begin with ``what``.

        special_tokens: whether names of special tokens in a text, such as ``</s>``, stand for these tokens, so that a
            text can end a turn or a sequence; False: they are text like any other. Text from strangers wants False.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{what} must be token ids, got text and no tokenizer. Pass tokenizer= to LLM.")
            return text_ids(self.tokenizer, prompt, special_tokens, what)
        token_ids = as_token_ids(prompt)
        if token_ids is None:
            advice = " Decode it to text." if isinstance(prompt, bytes | bytearray) else ""
            raise TypeError(f"{what} must be text or a list of token ids, got {type(prompt).__name__}.{advice}")
        return token_ids

    def text(self, token_ids: list[int], stop: Sequence[str] | SamplingParams = ()) -> str | None:
        """The text of an output, None without a tokenizer.

        stop: the parameters of its request, or texts before the first of which it is cut; special tokens are left out.
        """
        if self.tokenizer is None:
            return None
        check_ids(token_ids, self.model.decoder_config.vocab_size, "text: token_ids")
        return TextRule.of(stop, self.model.eos_token_ids).text(self.tokenizer, token_ids)

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            all_params = [params or SamplingParams()] * num_prompts
        else:
            all_params = list(params)
            if not all(isinstance(param, SamplingParams) for param in all_params):
                raise TypeError("generate: params must be SamplingParams, or one per prompt, got something else.")
            if len(all_params) != num_prompts:
                raise ValueError(
                    f"generate: params must be one for all or one per prompt, got {len(all_params)} for "
                    f"{num_prompts} prompts."
                )
        num_outputs = sum(param.n for param in all_params)
        if num_outputs > MAX_BATCH:
            raise ValueError(
                f"generate: prompts must have at most {MAX_BATCH} outputs together, got {num_outputs}. Give fewer at a "
                "time, or use an Engine."
            )
        if self.tokenizer is None and any(param.stop for param in all_params):
            raise ValueError("generate: stop must be left out without a tokenizer. Use stop_token_ids.")
        return all_params


def _prompt_list(prompts: object) -> list[Any]:
    """The prompts of a batch, one by one."""
    is_texts = is_array(prompts, 1) and all(isinstance(prompt, str) for prompt in prompts)  # type: ignore[attr-defined]
    if is_texts or is_array(prompts, 2):
        prompts = list(prompts)  # type: ignore[call-overload]  # an array, of texts or of rows
    if isinstance(prompts, str | bytes | bytearray) or not isinstance(prompts, Sequence):
        raise TypeError(
            f"generate: prompts must be a list of texts or of token ids, got {type(prompts).__name__}. "
            "Put a single prompt into a list."
        )
    if not prompts:
        raise ValueError("generate: prompts must hold at least one prompt, got none.")
    return list(prompts)


def _may_have_tokenizer(source: Path) -> bool:
    """False for a local directory without any tokenizer file; a hub id may have one."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    return not source.is_dir() or any((source / name).is_file() for name in files)


def _load_tokenizer(source: str | Path) -> Any:
    return read_tokenizer(source, "LLM", " Pass tokenizer=, or a CausalLM for token ids.")


def _run_with_bar(generation: Generation) -> None:
    from tqdm import tqdm

    total = sum(sequence.state.max_tokens for sequence in generation.sequences)
    with tqdm(total=total, unit="token", desc="generate", leave=False) as bar:

        def update(state: Generation) -> None:
            bar.update(sum(len(sequence.token_ids) for sequence in state.sequences) - bar.n)

        generation.run(update)
