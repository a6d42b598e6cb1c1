"""How mixed paths are decoded without compact kernels: mask everything, or gather after asking the device for rows."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.workloads import Workload
from dynskip.causal_lm import CausalLM
from dynskip.execution.compact import CompactExecutor
from dynskip.measure.device import Device
from dynskip.models.decoder import DecoderLayer, Positions
from dynskip.ops.backends import get_backend


class _PaddedCache:
    """Keys and values of a workload along paths, each [B, H, S, D] a layer, filled by running its prompts."""

    def __init__(self, model: CausalLM, workload: Workload) -> None:
        assert workload.paths is not None, "these baselines know paths, not masks per token"
        executor = cast(CompactExecutor, model.executor("compact"))
        num_tokens = workload.prompt_len + workload.num_steps
        cache = executor.new_cache(workload.batch, workload.prompt_len, workload.num_entries())
        executor.run(workload.prompt_step(), cache)
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
        self.position_ids = torch.full((workload.batch,), workload.prompt_len, device=model.device)
        self.token_ids = workload.prompts[:, -1].clone()


class MaskEverything:
    """Every layer for every row, and then for each row its layer's output or input; one CUDA graph a step."""

    name = "mask-everything"

    def __init__(self, device: Device, model: CausalLM, workload: Workload) -> None:
        assert workload.paths is not None
        self.model = model
        self.cache = _PaddedCache(model, workload)
        self.active = torch.stack([path.mask for path in workload.paths], dim=1).to(model.device)
        self.places = torch.arange(self.cache.keys[0].shape[2], device=model.device)
        shape = (workload.batch, model.decoder_config.vocab_size)
        self.logits = torch.empty(shape, dtype=model.dtype, device=model.device)
        state = self.cache.position_ids.clone(), self.cache.token_ids.clone()
        self._step = device.captured(self._step_eagerly)
        self.cache.position_ids.copy_(state[0])
        self.cache.token_ids.copy_(state[1])

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        self._step()

    def first_step(self) -> Tensor:
        """Run one step: its logits [B, V]."""
        self.step()
        return self.logits.clone()

    def _step_eagerly(self) -> None:
        cache, decoder = self.cache, self.model.decoder
        place = cache.position_ids[:1]
        mask = (self.places <= place)[None, None, None]
        x = decoder.embed(cache.token_ids, cache.position_ids)
        positions = Positions(cache.position_ids, decoder.cos_sin)
        for index, layer in enumerate(decoder.stack()):
            q, k, v = _project(layer, x, positions)
            cache.keys[index].index_copy_(2, place, k[:, :, None])
            cache.values[index].index_copy_(2, place, v[:, :, None])
            attended = _attend(q, cache.keys[index], cache.values[index], mask, layer.scale)
            x = torch.where(self.active[index][:, None], layer.output(x, attended), x)
        self.logits.copy_(self.model.head(x))
        cache.token_ids.copy_(self.logits.argmax(-1))
        cache.position_ids.add_(1)


class GatherWithToList:
    """The rows of each layer gathered after the host has asked the device for them, as D-LLM's code does."""

    name = "a gather with one .tolist() a layer"

    def __init__(self, device: Device, model: CausalLM, workload: Workload) -> None:
        assert workload.paths is not None
        self.model = model
        self.cache = _PaddedCache(model, workload)
        self.active = torch.stack([path.mask for path in workload.paths], dim=1).to(model.device)
        self.context_len = workload.prompt_len
        self.logits = torch.empty(0)

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        cache, decoder = self.cache, self.model.decoder
        place = self.context_len
        x = decoder.embed(cache.token_ids, cache.position_ids)
        positions = Positions(cache.position_ids, decoder.cos_sin)
        for index, layer in enumerate(decoder.stack()):
            rows = self.active[index].nonzero().flatten().tolist()
            if not rows:
                continue
            chosen = torch.tensor(rows, device=x.device)
            gathered = x[chosen]
            q, k, v = _project(layer, gathered, positions.of(chosen))
            keys, values = cache.keys[index], cache.values[index]
            keys[chosen, :, place], values[chosen, :, place] = k, v
            if len(rows) < x.shape[0]:
                keys, values = keys[chosen, :, : place + 1], values[chosen, :, : place + 1]
            else:
                keys, values = keys[:, :, : place + 1], values[:, :, : place + 1]
            x[chosen] = layer.output(gathered, _attend(q, keys, values, None, layer.scale))
        self.logits = self.model.head(x)
        cache.token_ids = self.logits.argmax(-1)
        cache.position_ids.add_(1)
        self.context_len += 1

    def first_step(self) -> Tensor:
        """Run one step: its logits [B, V]."""
        self.step()
        return self.logits


def _project(layer: DecoderLayer, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [R, heads, D]: one product, as a careful baseline would."""
    return layer.project(layer.attention_norm(x), positions, get_backend("torch"), deterministic=False)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    query = q[:, :, None]
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True)[:, :, 0]
