"""The language model that runs each sequence, or each token, through its own subset of the layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from dynskip.arguments import shown
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.executor import Executor
from dynskip.execution.reference import ReferenceExecutor
from dynskip.execution.step import Step, packed_positions
from dynskip.found import FoundPaths
from dynskip.models.config import DecoderConfig
from dynskip.models.decoder import Decoder
from dynskip.models.found import find_found_paths, weights_digest, weights_version
from dynskip.models.linear import Linear
from dynskip.models.memory import MemoryReport
from dynskip.models.registry import decoder_config
from dynskip.ops.backends import BACKEND_NAMES, Backend, resolve_backend
from dynskip.routing.routes import Paths, StepTokens, resolve

ExecutorName = Literal["compact", "reference"]


class CausalLM(nn.Module):
    """A decoder with a language-modelling head, every sequence along its own layer path.

    Make one with :meth:`from_pretrained` or :meth:`from_hf`. The constructor leaves the weights uninitialised.

    backend: "auto", "torch", "triton" or "native"; what gathers, scatters and attends in a step.
    deterministic: a row's bits do not depend on its neighbours; slower.
    """

    def __init__(self, config: Any, backend: str = "auto", deterministic: bool = False) -> None:
        super().__init__()
        decoder = decoder_config(config)
        if backend not in ("auto", *BACKEND_NAMES):
            raise ValueError(
                f"CausalLM: backend must be one of {', '.join(('auto', *BACKEND_NAMES))}, got {backend!r}."
            )
        self.config = config
        self.decoder_config = decoder
        self.decoder = Decoder(decoder)
        self.lm_head = Linear(decoder.embedding_size, decoder.vocab_size, bias=decoder.head_bias)
        if decoder.is_head_tied:
            self.tie_head_()
        self.deterministic = deterministic
        self._backend_name = backend
        self._backend: Backend | None = None
        self._compact: CompactExecutor | None = None
        self._reference = ReferenceExecutor(self.decoder, self.lm_head)
        self._digest: tuple[object, str] | None = None

    @staticmethod
    def from_pretrained(
        directory_or_hub_id: str | Path,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        deterministic: bool = False,
        pack: bool = True,
        adapter: str | Path | None = None,
    ) -> CausalLM:
        """The model of a checkpoint, ready for inference; ``"opt-mini"`` is the one shipped with the package.

        dtype: float32, bfloat16 or float16, or its name.
        pack: on a CPU, keep one oneDNN-packed copy of each matrix instead of the dense one; such a model is not
            trainable until :meth:`unpack_`.
        adapter: the folder of a LoRA adapter in peft's format, which is merged into the weights where they are read;
            ``config.adapter`` is it then. One that computes anything else than W + scale * B A is refused.
        Every tensor of the checkpoint is read, or the checkpoint refused; code in its folder never runs. A head beside
        a config that ties it is used, and ``config.tie_word_embeddings`` of the model is False then.
        Raises FileNotFoundError, ValueError or OSError for a checkpoint that is missing, foreign, damaged or has NaN.
        """
        from dynskip.models.checkpoint import load

        return load(
            lambda config: CausalLM(config, backend, deterministic),
            directory_or_hub_id,
            dtype,
            device,
            backend,
            pack,
            adapter,
        )

    @staticmethod
    def from_hf(
        transformers_model: nn.Module, backend: str = "auto", deterministic: bool = False, pack: bool = True
    ) -> CausalLM:
        """A model with copies of the weights of one of transformers, in its dtype and on its device.

        transformers_model: of a class with a language-modelling head. Raises TypeError for another class; ValueError,
        naming the part, for a model that computes anything else than that class does of its config: with adapters,
        quantised or offloaded weights, hooks, or parameters of its own.
        """
        from dynskip.models.checkpoint import convert

        return convert(lambda config: CausalLM(config, backend, deterministic), transformers_model, backend, pack)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both configs and safetensors that this class and transformers load; ``~`` is the home directory."""
        from dynskip.models.checkpoint import save

        save(self.state_dict(), self.config, self.decoder_config, self.dtype, Path(os.path.expanduser(directory)))

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.decoder.layers)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an output unless it ignores them; ``config.eos_token_id`` holds one, several or None.

        Those of the checkpoint's generation_config.json or, where that names none, of its config.json. transformers
        does the same but for a generation_config.json without ends, after which it never ends.
        """
        ends = self.config.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, hidden states and key-value cache."""
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.device

    @property
    def kv_entry_bytes(self) -> int:
        """Bytes of one key-value entry: the key and the value of one token in one layer, all heads."""
        return self.decoder_config.kv_entry_size * self.dtype.itemsize

    @property
    def backend(self) -> Backend:
        """The backend that the compact executor uses; resolved once, on first use."""
        if self._backend is None:
            self._backend = resolve_backend(self._backend_name, self.device)
        return self._backend

    @property
    def memory(self) -> MemoryReport:
        """What the weights take, and what the process holds now and held at its peak, in bytes."""
        return MemoryReport.of(self)

    @property
    def weights_digest(self) -> str:
        """The SHA-256 of all weights in bfloat16: what found paths are kept by. Worked out anew once they change."""
        version = weights_version(self)
        if self._digest is None or self._digest[0] != version:
            self._digest = version, weights_digest(self, self.decoder_config.is_head_tied)
        return self._digest[1]

    @property
    def found_paths(self) -> FoundPaths | None:
        """What `dynskip search` has found for these weights; None where it has not run. See `LayerPath.found`."""
        return find_found_paths(self.weights_digest, self.weights_folder)

    @property
    def weights_folder(self) -> str:
        """Where what is found for these weights lies beside them: with the adapter, or with the model if it has none.

        A hub id, a file or nothing where it has no folder.
        """
        return getattr(self.config, "adapter", None) or self.config.name_or_path

    def pack_(self) -> CausalLM:
        """Replace every matrix by its packed form where the device has one; drops the dense copies.

        The native backend also multiplies few rows by its own product; the other backends leave products to oneDNN.
        """
        use_native = self.backend.name == "native"
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack_(use_native)
        return self.requires_grad_(False)

    def unpack_(self) -> CausalLM:
        """Bring back dense, trainable parameters; a tied head is tied again."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.unpack_()
        if self.decoder_config.is_head_tied:
            self.tie_head_()
        return self.requires_grad_(True)

    def tie_head_(self) -> None:
        """Make the dense head and the token embedding one parameter."""
        weight = self.decoder.embed_tokens.weight
        assert isinstance(weight, nn.Parameter), "an embedding is a parameter"
        self.lm_head.weight = weight

    def executor(self, name: ExecutorName = "compact") -> Executor[Any]:
        """The model's executor ``name``: "compact" saves time, "reference" is the specification and differentiable."""
        if name == "reference":
            return self._reference
        if name != "compact":
            raise ValueError(f"CausalLM: executor must be 'compact' or 'reference', got {name!r}.")
        if self._compact is None or self._compact.deterministic != self.deterministic:
            self._compact = CompactExecutor(self.decoder, self.lm_head, self.backend, self.deterministic)
        return self._compact

    def new_executor(self, name: ExecutorName, deterministic: bool) -> Executor[Any]:
        """An executor whose buffers, graphs and row counts no other user of the model shares."""
        if name == "reference":
            return ReferenceExecutor(self.decoder, self.lm_head)
        return CompactExecutor(self.decoder, self.lm_head, self.backend, deterministic)

    def head(self, hidden_states: Tensor, executor: ExecutorName = "compact") -> Tensor:
        """[R, V]: the logits of the last layer's output ``hidden_states``, [R, C]."""
        return self.executor(executor).head(hidden_states)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """[T, E]: token embeddings without positions, as controllers that decide per sequence see them."""
        return self.decoder.embed_tokens(token_ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        paths: Paths = None,
        *,
        kv_policy: str | None = None,
        output_hidden_states: bool = False,
        executor: ExecutorName = "compact",
    ) -> CausalLMOutput:
        """Logits for every token, each sequence along its own path.

        input_ids: [B, T], int64. attention_mask: [B, T], 1 where a token is; padding may stand left or right.
        paths: a LayerPath, one per sequence, bool [B, L], bool [B, T, L] per token, a controller, or None for all.
        kv_policy: "propagate" (default), "evict" or "share", for per-token paths only.
        executor: "compact" has no gradients; "reference" does.

        Returns: ``.logits`` [B, T, V], zero at padding, and, if asked for, ``.hidden_states``: L + 1 tensors [B, T, C],
        each layer's input and at last what the head sees. A skipped layer passes its input on.
        Raises: TypeError, ValueError on bad input; RuntimeError where gradients are wanted of the compact executor.
        """
        if executor == "compact" and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                "CausalLM.forward: executor must be 'reference' while gradients are recorded, got 'compact', "
                "which has none. Pass executor='reference' to train, or call under torch.no_grad()."
            )
        keep = self._check_inputs(input_ids, attention_mask)
        counts = keep.sum(1).tolist()
        prompts = [ids[mask] for ids, mask in zip(input_ids, keep, strict=True)]
        if isinstance(paths, Tensor) and paths.dim() == 3:
            paths = _pack_mask(paths, keep.cpu(), self.num_layers)
        routes = resolve(paths, self.num_layers, prompts, self.embed_tokens, kv_policy, function="forward")
        num_seqs = len(counts)
        plan = routes[0].plan(routes, StepTokens((0,) * num_seqs, tuple(counts), is_prompt=False))
        device = self.device
        step = Step(
            torch.cat(prompts).to(device),
            packed_positions(counts, device),
            torch.arange(num_seqs, device=device),
            plan,
            fresh=True,
        )
        num_entries = sum(route.num_entries(count) for route, count in zip(routes, counts, strict=True))
        runner = self.executor(executor)
        # Only sharing needs a cache here: nothing is decoded from it afterwards.
        cache = runner.new_cache(num_seqs, max(counts), num_entries) if kv_policy == "share" else None
        inputs: list[Tensor] = []
        record = (lambda _, hidden_states: inputs.append(hidden_states.clone())) if output_hidden_states else None
        hidden_states = runner.run(step, cache, record)
        logits = _unpack(runner.head(hidden_states), keep)
        if not output_hidden_states:
            return CausalLMOutput(logits=logits)
        last = runner.finish(hidden_states)
        return CausalLMOutput(logits=logits, hidden_states=tuple(_unpack(state, keep) for state in (*inputs, last)))

    def _check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        integers = (torch.int64, torch.int32)
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in integers:
            tensor = isinstance(input_ids, Tensor)
            got = f"{input_ids.dtype} {list(input_ids.shape)}" if tensor else type(input_ids).__name__
            raise TypeError(f"forward: input_ids must be int64 [B, T], got {got}.")
        if not input_ids.numel():
            raise ValueError(f"forward: input_ids must hold at least one token, got shape {list(input_ids.shape)}.")
        if attention_mask is None:
            keep = torch.ones_like(input_ids, dtype=torch.bool)
        elif not isinstance(attention_mask, Tensor):
            raise TypeError(f"forward: attention_mask must be a tensor [B, T], got {type(attention_mask).__name__}.")
        elif attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"forward: attention_mask must be {list(input_ids.shape)}, got {list(attention_mask.shape)}."
            )
        else:
            keep = attention_mask.bool()
        for seq, count in enumerate(keep.sum(1).tolist()):
            check_tokens(input_ids[seq][keep[seq]].tolist(), 0, self.decoder_config, f"forward: sequence {seq}")
            assert count, "check_tokens refuses an empty sequence"
        return keep


OPTForCausalLM = CausalLM
"""The class by a name of transformers'."""


def check_ids(token_ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Raise ValueError, beginning with ``what``, unless all are ids of a vocabulary."""
    for token_id in (min(token_ids), max(token_ids)) if len(token_ids) else ():
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{what} must hold token ids in 0..{vocab_size - 1}, got {shown(token_id)}.")


def check_tokens(token_ids: Sequence[int], num_new_tokens: int, config: DecoderConfig, what: str) -> None:
    """Raise ValueError, beginning with ``what``, where a prompt and its new tokens do not fit the model."""
    if not len(token_ids):
        raise ValueError(f"{what} must hold at least one token, got none.")
    check_ids(token_ids, config.vocab_size, what)
    total = len(token_ids) + num_new_tokens
    if total > config.max_positions:
        new = f" prompt and {shown(num_new_tokens)} new" if num_new_tokens else ""
        raise ValueError(
            f"{what} must fit {config.max_positions} positions, got {len(token_ids)}{new} tokens. "
            "Shorten the prompt or lower max_tokens."
        )


def _pack_mask(mask: Tensor, keep: Tensor, num_layers: int) -> Tensor:
    """[B, T, L]: the per-token mask with each sequence's real tokens moved to the front."""
    if mask.shape != (*keep.shape, num_layers):
        raise ValueError(f"forward: paths must be bool {[*keep.shape, num_layers]}, got shape {list(mask.shape)}.")
    order = torch.argsort(~keep, dim=1, stable=True)
    return mask.cpu().gather(1, order[:, :, None].expand(-1, -1, num_layers))


def _unpack(rows: Tensor, keep: Tensor) -> Tensor:
    """[B, T, X]: the packed rows [N, X] put where ``keep`` [B, T] holds, zeros elsewhere."""
    out = rows.new_zeros(*keep.shape, rows.shape[1])
    return out.masked_scatter(keep.to(rows.device)[:, :, None], rows)
