"""The batches that are decoded: prompts, what each token runs, and what the logits must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.model import OPTForCausalLM
from dynskip.paths import LayerPath
from dynskip.plan import KVPolicy, Plan
from dynskip.step import Step, packed_positions

NUM_CHECKED = 4


@dataclass(frozen=True, eq=False)
class Workload:
    """A batch of prompts of equal length, and which layers its tokens run.

    prompts: [B, T + 1], int64: T tokens of context, and the token of the first decode step.
    paths: one per sequence, or None where ``mask`` says it for each token.
    mask: [B, T + num_steps, L], bool, or None. kv_policy: what skipped layers store; ABSENT with paths.
    num_steps: how many decode steps the caches have room for.
    """

    prompts: Tensor
    num_steps: int
    paths: tuple[LayerPath, ...] | None
    mask: Tensor | None = None
    kv_policy: KVPolicy = KVPolicy.ABSENT

    @staticmethod
    def along(
        paths: list[LayerPath], prompt_len: int, num_steps: int, vocab_size: int, device: torch.device
    ) -> Workload:
        """A batch of random prompts, sequence b along ``paths[b]``."""
        prompts = _random_prompts(len(paths), prompt_len, vocab_size, device)
        return Workload(prompts, num_steps, tuple(paths))

    @staticmethod
    def per_token(
        batch: int,
        num_layers: int,
        share: float,
        kv_policy: KVPolicy,
        prompt_len: int,
        num_steps: int,
        vocab_size: int,
        device: torch.device,
    ) -> Workload:
        """A batch of random prompts each of whose tokens runs a layer with the probability ``share``."""
        generator = torch.Generator().manual_seed(batch)
        mask = torch.rand(batch, prompt_len + num_steps, num_layers, generator=generator) < share
        prompts = _random_prompts(batch, prompt_len, vocab_size, device)
        return Workload(prompts, num_steps, None, mask, kv_policy)

    @property
    def batch(self) -> int:
        """B."""
        return self.prompts.shape[0]

    @property
    def prompt_len(self) -> int:
        """T."""
        return self.prompts.shape[1] - 1

    def plan(self, first: int, count: int) -> Plan:
        """The plan of a step that brings the tokens at positions first, ..., first + count - 1 of every sequence."""
        counts = [count] * self.batch
        if self.paths is not None:
            return Plan.per_sequence(self.paths, counts)
        assert self.mask is not None
        return Plan.per_token(self.mask[:, first : first + count].flatten(0, 1), counts, self.kv_policy)

    def prompt_step(self) -> Step:
        """The step that runs the prompts without their last token."""
        device, counts = self.prompts.device, [self.prompt_len] * self.batch
        return Step(
            self.prompts[:, :-1].flatten(),
            packed_positions(counts, device),
            torch.arange(self.batch, device=device),
            self.plan(0, self.prompt_len),
            fresh=True,
        )

    def num_entries(self) -> int:
        """How many key-value entries prompts and decode steps take at most."""
        num_tokens = self.prompt_len + self.num_steps
        if self.paths is not None:
            return sum(path.budget for path in self.paths) * num_tokens
        assert self.mask is not None
        if self.kv_policy is KVPolicy.EVICT:
            # Whatever a gate makes of the new tokens.
            return int(self.mask[:, : self.prompt_len].sum()) + self.batch * self.num_steps * self.mask.shape[2]
        return self.mask.numel()

    def token_mask(self, rows: list[int], last: Tensor | None = None) -> Tensor:
        """[R, T + 1, L], bool: what the tokens of ``rows`` run; ``last`` [L, B]: what was decided for the last ones."""
        if self.paths is not None:
            return torch.stack([self.paths[row].mask for row in rows])[:, None].repeat(1, self.prompt_len + 1, 1)
        assert self.mask is not None
        mask = self.mask[rows, : self.prompt_len + 1].clone()
        if last is not None:
            mask[:, -1] = last.t()[rows].cpu()
        return mask


class Truth:
    """Logits in float64, and the error that plain PyTorch makes in the working dtype: the budget is twice that.

    model: the model in the working dtype. exact: the same weights in float64.
    """

    def __init__(self, model: OPTForCausalLM, exact: OPTForCausalLM) -> None:
        self.model = model
        self.exact = exact

    def check(self, what: str, workload: Workload, logits: Tensor, last: Tensor | None = None) -> float:
        """The error of ``logits`` [B, V] of the first decode step as a share of what is allowed.

        A sample of the rows is compared. Raises RuntimeError where the error is larger than allowed: nothing may be
        timed then. last: [L, B], bool, which layers the tokens of that step ran, where a gate decided it.
        """
        rows = sorted({round(index * (workload.batch - 1) / (NUM_CHECKED - 1)) for index in range(NUM_CHECKED)})
        mask = workload.token_mask(rows, last)
        policy = "propagate" if workload.kv_policy is KVPolicy.PROPAGATE else "evict"

        def run(model: OPTForCausalLM) -> Tensor:
            output = model(workload.prompts[rows], paths=mask, kv_policy=policy, executor="reference")
            return output.logits[:, -1].double()

        truth, eager = run(self.exact), run(self.model)
        error = float((logits[rows].double() - truth).abs().max())
        # Where eager happens to err less: two roundings of the largest logit, which no order of sums avoids.
        rounding = 2 * torch.finfo(self.model.dtype).eps * float(truth.abs().max())
        allowed = max(2 * float((eager - truth).abs().max()), rounding)
        if not error <= allowed:
            raise RuntimeError(
                f"{what}: the logits must be within {allowed:.3g} of float64, got {error:.3g}. Nothing was timed."
            )
        return error / allowed


def _random_prompts(batch: int, prompt_len: int, vocab_size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, vocab_size, (batch, prompt_len + 1), generator=generator).to(device)
