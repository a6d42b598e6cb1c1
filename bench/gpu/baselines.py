"""How mixed paths are decoded without compact kernels: mask everything, or gather after asking the device for rows."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.workloads import Workload
from dynskip.causal_lm import CausalLM
from dynskip.execution.compact import CompactExecutor
from dynskip.measure.device import Device
from dynskip.models.decoder import DecoderLayer, Positions
from dynskip.ops.backends import get_backend


class _PaddedSteps:
    """Decode steps of a workload along paths; keys and values of each layer, [B, H, S, D], begin with its prompts'."""

    def __init__(self, device: Device, model: CausalLM, workload: Workload) -> None:
        assert workload.paths is not None, "these baselines know paths, not masks per token"
        executor = cast(CompactExecutor, model.executor("compact"))
        num_tokens = workload.prompt_len + workload.num_steps
        cache = executor.new_cache(workload.batch, workload.prompt_len, workload.num_entries())
        executor.run(workload.prompt_step(), cache)
        self.model, self.decoder = model, model.decoder
        config = model.decoder_config
        shape = (workload.batch, config.num_kv_heads, num_tokens, config.head_size)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for index in range(model.num_layers):
            seqs = [seq for seq, path in enumerate(workload.paths) if index in path.layers]
            slots = cache.slot_tables[index, seqs, : workload.prompt_len].long()
            for pool, tensors in ((cache.k_cache, self.keys), (cache.v_cache, self.values)):
                padded = torch.zeros(shape, dtype=model.dtype, device=model.device)
                if seqs:
                    padded[seqs, :, : workload.prompt_len] = pool[slots].transpose(1, 2)
                tensors.append(padded)
        self.active = torch.stack([path.mask for path in workload.paths], dim=1).to(model.device)
        self.position_ids = torch.full((workload.batch,), workload.prompt_len, device=model.device)
        self.token_ids = workload.prompts[:, -1].clone()
        shape = (workload.batch, model.decoder_config.vocab_size)
        self.logits = torch.empty(shape, dtype=model.dtype, device=model.device)

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        raise NotImplementedError

    def first_step(self) -> Tensor:
        """Run one step: its logits [B, V]."""
        self.step()
        return self.logits.clone()


class MaskEverything(_PaddedSteps):
    """Every layer for every row, and then for each row its layer's output or input; one CUDA graph a step."""

    name = "mask-everything"

    def __init__(self, device: Device, model: CausalLM, workload: Workload) -> None:
        super().__init__(device, model, workload)
        self.places = torch.arange(self.keys[0].shape[2], device=model.device)
        position_ids, token_ids = self.position_ids.clone(), self.token_ids.clone()
        self._captured = device.captured(self._step_eagerly)
        self.position_ids.copy_(position_ids)
        self.token_ids.copy_(token_ids)

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        self._captured()

    def _step_eagerly(self) -> None:
        place = self.position_ids[:1]
        mask = (self.places <= place)[None, None, None]
        x = self.decoder.embed(self.token_ids, self.position_ids)
        positions = Positions(self.position_ids, self.decoder.cos_sin)
        for layer, keys, values, active in zip(self.decoder.stack(), self.keys, self.values, self.active, strict=True):
            q, k, v = _project(layer, x, positions)
            keys.index_copy_(2, place, k[:, :, None])
            values.index_copy_(2, place, v[:, :, None])
            x = torch.where(active[:, None], layer.output(x, _attend(q, keys, values, mask, layer.scale)), x)
        self.logits.copy_(self.model.head(x))
        self.token_ids.copy_(self.logits.argmax(-1))
        self.position_ids.add_(1)


class GatherWithToList(_PaddedSteps):
    """The rows of each layer gathered after the host has asked the device for them, as D-LLM's code does."""

    name = "a gather with one .tolist() a layer"

    def __init__(self, device: Device, model: CausalLM, workload: Workload) -> None:
        super().__init__(device, model, workload)
        self.context_len = workload.prompt_len

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        place = self.context_len
        x = self.decoder.embed(self.token_ids, self.position_ids)
        positions = Positions(self.position_ids, self.decoder.cos_sin)
        for layer, keys, values, active in zip(self.decoder.stack(), self.keys, self.values, self.active, strict=True):
            rows = active.nonzero().flatten().tolist()
            if not rows:
                continue
            chosen = torch.tensor(rows, device=x.device)
            gathered = x[chosen]
            q, k, v = _project(layer, gathered, positions.of(chosen))
            keys[chosen, :, place], values[chosen, :, place] = k, v
            # Where all rows run, their keys and values are read where they are.
            own = chosen if len(rows) < x.shape[0] else slice(None)
            attended = _attend(q, keys[own, :, : place + 1], values[own, :, : place + 1], None, layer.scale)
            x[chosen] = layer.output(gathered, attended)
        self.logits = self.model.head(x)
        self.token_ids = self.logits.argmax(-1)
        self.position_ids.add_(1)
        self.context_len += 1


def _project(layer: DecoderLayer, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [R, heads, D]: on a GPU one product, as a careful baseline would."""
    return layer.project(layer.attention_norm(x), positions, get_backend("torch"), deterministic=False)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # Not by cuDNN, which plans anew for each shape, and contexts grow.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        attended = F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, scale=scale, enable_gqa=True)
    return attended.reshape(q.shape)
