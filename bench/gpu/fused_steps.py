"""dynskip as it is timed: fused decode steps from CUDA graphs, each choosing the next token greedily on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.floors import WorkDone
from bench.gpu.workloads import Workload
from dynskip.causal_lm import CausalLM
from dynskip.controllers import HiddenStateGate
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.fused import FusedDecode
from dynskip.execution.graphs import GraphedDecode
from dynskip.execution.step_shape import StepShape
from dynskip.kernels.row_list import row_bucket
from dynskip.measure.device import Device
from dynskip.ops.row_ops import get_row_ops


class FusedSteps:
    """Decode steps of one workload; the host gives each step nothing but, with a mask, the number of the step.

    gate: decides in place of the workload's mask what new tokens run.
    chained: always launch the graphs of single layers, as for a mix of paths that has never come before.
    """

    def __init__(
        self,
        device: Device,
        model: CausalLM,
        workload: Workload,
        ops: str,
        gate: HiddenStateGate | None = None,
        chained: bool = False,
    ) -> None:
        self.workload = workload
        executor = model.executor("compact")
        assert isinstance(executor, CompactExecutor)
        batch, num_tokens = workload.batch, workload.prompt_len + workload.num_steps
        self.cache = executor.new_cache(batch, num_tokens, workload.num_entries())
        decoder = model.decoder
        self.fused = FusedDecode(decoder, model.lm_head, self.cache, row_bucket(batch), get_row_ops(ops))
        self.graphs = GraphedDecode(self.fused, device.graphs())
        buffers = self.fused.buffers
        self._choose = device.captured(self._choose_eagerly)
        executor.run(workload.prompt_step(), self.cache)
        self.fused.set_rows(torch.arange(batch, dtype=torch.int32))
        positions = torch.full((batch,), workload.prompt_len, device=buffers.position_ids.device)
        self.fused.set_tokens(workload.prompts[:, -1], positions)
        self.cache.reserve(workload.num_entries() - self.cache.num_slots_used)
        self.masks: Tensor | None = None  # [num_steps, L, B], bool, on the device
        policy, num_layers = workload.kv_policy, model.num_layers
        if workload.paths is not None:
            plan = workload.plan(workload.prompt_len, 1)
            assert plan.active is not None
            self.shape = StepShape.of(plan)
            self.fused.set_active(plan.active)
        elif gate is not None:
            self.shape = StepShape.unknown(batch, num_layers, policy, gate)
            self.fused.prepare_gate(gate)
        else:
            assert workload.mask is not None
            self.shape = StepShape.unknown(batch, num_layers, policy)
            new_tokens = workload.mask[:, workload.prompt_len :]
            self.masks = new_tokens.permute(1, 2, 0).contiguous().to(buffers.active.device)
        self.chained = chained
        self.num_steps = 0

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        self.run()
        self._choose()

    def run(self) -> None:
        """Run the last token of each sequence."""
        assert self.num_steps < self.workload.num_steps, "the cache has no room for more steps"
        if self.masks is not None:
            self.fused.set_active(self.masks[self.num_steps])
        self.num_steps += 1
        if self.chained:
            self.graphs.run_chain(self.shape)
        else:
            self.graphs.run_whole(self.shape)

    def first_step(self) -> tuple[Tensor, Tensor]:
        """Run one step: its logits [B, V], and which layers its tokens ran, [L, B], bool."""
        self.step()
        batch = self.workload.batch
        return self.fused.buffers.logits[:batch].clone(), self.fused.buffers.active[:, :batch].clone()

    def work_done(self) -> WorkDone:
        """What one more step does; waits for it."""
        self.step()
        buffers = self.fused.buffers
        run_rows, kv_rows = buffers.counts.tolist()
        num_entries = 0
        for layer, count in enumerate(run_rows):
            rows = buffers.run_ids[layer, :count].long()
            num_entries += int(buffers.key_limits[layer, rows].sum())
        return WorkDone(tuple(run_rows), tuple(kv_rows), num_entries, self.workload.batch)

    @property
    def memory(self) -> str:
        """What graphs, static buffers and cache take, in words."""
        return f"{self.graphs.memory}, cache {self.cache.num_bytes / 2**20:.0f} MiB"

    def _choose_eagerly(self) -> None:
        buffers, batch = self.fused.buffers, self.workload.batch
        torch.argmax(buffers.logits[:batch], dim=1, out=buffers.token_ids[:batch])
        buffers.position_ids[:batch].add_(1)


def random_gate(model: CausalLM, workload: Workload, share: float) -> HiddenStateGate:
    """A gate with random weights, whose biases let ``share`` of the last tokens of the prompts run each layer.

    They run the layers of the workload's mask meanwhile, so that new tokens run about as many, not exactly.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (model.num_layers, 2, model.decoder_config.hidden_size)
    weight = torch.randn(shape, generator=generator).to(model.device)
    bias = torch.zeros(shape[:2], device=model.device)
    gate = HiddenStateGate(weight, bias, always=())

    def balance(layer: int, hidden_states: Tensor) -> None:
        rows = hidden_states[workload.prompt_len - 1 :: workload.prompt_len].float()
        margins = rows @ (weight[layer, 1] - weight[layer, 0])
        bias[layer, 0] = torch.quantile(margins, 1 - share)

    executor = model.executor("compact")
    executor.run(workload.prompt_step(), None, balance)
    return gate
