"""The model ``dynskip`` of lm-eval: tasks along a path, by ``dynskip lm_eval``. lm-eval alone imports this."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dynskip.engine.engine import Engine
from dynskip.engine.scoring import Scoring
from dynskip.execution.threads import most_threads
from dynskip.integrations.lm_eval_arguments import batch_of, draft_of, path_of, sampling_params, whole_number
from dynskip.llm import LLM
from dynskip.sampling import SamplingParams
from dynskip.version import __version__

_LOGGER = logging.getLogger(__name__)
DEFAULT_DEVICE = "cuda:0"  # of lm-eval's command line
# A context and its continuation as texts, which results are cached by, or None; and their token ids.
_Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("dynskip")
class DynskipLM(TemplateLM):
    """A model of lm-eval whose sequences run the layers of one path.

    pretrained: a folder, a GGUF file, a hub id, or a model by name. path, draft: as `dynskip generate` takes them.
    adapter, tokenizer, dtype, device, backend, deterministic: as in `LLM`; lm-eval hands over cuda:0 for a device that
    is not named, which is the CPU where torch finds no CUDA device. threads: CPU threads.
    batch_size: contexts, or sequences that generate, in a step; ``auto`` for 16, or for max_batch_size.
    max_length: most tokens of context and continuation; contexts lose their first ones. max_gen_toks: new tokens of
    tasks that do not say. kv_bytes: memory for keys and values of what generates.
    add_bos_token, prefix_token_id: as those of lm-eval's ``hf``: whether texts get the tokenizer's special tokens, None
    for what the tokenizer does; and what a text without a context is scored behind.
    """

    def __init__(
        self,
        pretrained: str,
        path: str = "full",
        draft: str | None = None,
        adapter: str | None = None,
        tokenizer: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        backend: str | None = None,
        deterministic: bool | None = None,
        threads: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        kv_bytes: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"dynskip: model_args must be of those that dynskip knows, got {', '.join(unknown)}.")
        if threads is not None:
            torch.set_num_threads(whole_number("threads", threads, most=most_threads()))
        self._batch = batch_of(batch_size, max_batch_size)
        self._llm = LLM(pretrained, tokenizer, dtype, _device(device), backend, deterministic or None, adapter)
        if self._llm.tokenizer is None:
            raise ValueError(f"dynskip: pretrained must come with a tokenizer, got none in {pretrained}. Name one.")
        self.tokenizer: Any = self._llm.tokenizer
        model = self._llm.model
        self._path = path_of(path, model)
        self._draft = draft_of(draft, self._path, model)
        positions = model.decoder_config.max_positions
        self._max_length = positions if max_length is None else whole_number("max_length", max_length, 2, positions)
        self._max_gen_toks = whole_number("max_gen_toks", max_gen_toks)
        self._kv_bytes = None if kv_bytes is None else whole_number("kv_bytes", kv_bytes)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = None if prefix_token_id is None else whole_number("prefix_token_id", prefix_token_id, 0)
        self._specials = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored behind."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Most tokens that the model sees at a time."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a task that does not say how many."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests are named by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of ``chat_history`` in the chat template; without a generation prompt its last message is open."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "dynskip: the model must come with a chat template, got none. Use no --apply_chat_template."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"dynskip: messages must fit the chat template, got: {reason}") from error
        return str(text)

    def get_model_info(self) -> dict[str, Any]:
        """What the results of a run say of the model."""
        model = self._llm.model
        return {
            "model_dtype": str(model.dtype),
            "dynskip_version": __version__,
            "dynskip_path": str(self._path),
            "dynskip_draft": None if self._draft is None else str(self._draft),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of ``string``; one that begins with the first token's name, as chats do, gets no second."""
        if not string:
            return []
        if add_special_tokens is None:
            has_begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if has_begun else self._add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for index, score in Scoring(self._llm.model, self._path, self._batch).run(pairs):
                answers[index] = math.fsum(score.logprobs), score.is_greedy
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                bar.update()
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both; the context without its first tokens where they are longer than fits. The last token is not run."""
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(
                f"dynskip: a continuation must have 1..{self.max_length} tokens, got {len(continuation)}. Raise "
                "max_length, or shorten the choices of the task."
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text the log-likelihood of all its tokens, in windows of at most ``max_length``."""
        windows: list[_Scored] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in own]
            owners += [index] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[index] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to where the task ends it."""
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for index, text in self._generated([request.args for request in requests]):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update()
        return texts

    def _generated(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
        """The index of each of ``asked`` and its text, as they come."""
        end = self.tokenizer.eos_token_id
        params = [sampling_params(kwargs, self._specials, end, self.max_gen_toks) for _, kwargs in asked]
        prompts = [self._prompt(text, param) for (text, _), param in zip(asked, params, strict=True)]
        engine = Engine(
            self._llm.model,
            self._kv_bytes,
            policy="lockstep",  # all run one path
            batch=self._batch,
            max_context_len=self.max_length,
            tokenizer=self.tokenizer,
        )
        with engine:
            # Prompts that begin alike share what they have in common while they are resident together.
            for index in sorted(range(len(asked)), key=lambda index: (-len(prompts[index]), prompts[index])):
                engine.add_request(prompts[index], params[index], self._path, request_id=index, draft=self._draft)
            while engine.has_unfinished:
                for output in engine.step():
                    if output.error is not None:
                        raise output.error
                    index = int(str(output.request_id))
                    yield index, str(self._llm.text(output.token_ids, params[index]))

    def _prompt(self, text: str, params: SamplingParams) -> list[int]:
        """The last tokens of ``text`` that leave room for what ``params`` ask for."""
        assert params.max_tokens is not None, "sampling_params gives it"
        room = self.max_length - params.max_tokens
        if room < 1:
            raise ValueError(
                f"dynskip: max_gen_toks must leave room for a context within max_length {self.max_length}, got "
                f"{params.max_tokens}."
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]


def _device(device: str | None) -> str | None:
    """``device``, or the CPU for what lm-eval hands over where none is named, on machines without it."""
    if device != DEFAULT_DEVICE or torch.cuda.is_available():
        return device
    _LOGGER.info("dynskip runs on the CPU: torch finds no CUDA device for lm-eval's default, %s", device)
    return "cpu"
