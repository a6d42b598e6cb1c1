"""The batches that are decoded: prompts, what each token runs, and what the logits must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynskip.causal_lm import CausalLM, ExecutorName
from dynskip.execution.step import Step, packed_positions
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.config import DecoderConfig
from dynskip.paths import LayerPath
from dynskip.routing.plan import KVPolicy, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_CHECKED = 4
FULL = "full depth"
# Of per-token masks.
POLICIES = (KVPolicy.EVICT, KVPolicy.PROPAGATE)


def independent(share: float) -> str:
    """The name of a mix of random paths, each through ``share`` of the layers."""
    return f"independent {share:.0%} paths"


def independent_paths(batch: int, num_layers: int, share: float) -> list[LayerPath]:
    """The paths of that mix."""
    return [LayerPath.random(num_layers, max(1, round(num_layers * share)), seed) for seed in range(batch)]


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


@dataclass(frozen=True)
class Verdict:
    """The error of some logits as a share of what is allowed, and what is wrong where that is too much."""

    share: float
    complaint: str


@dataclass(frozen=True, eq=False)
class _Expected:
    """The logits [N, V] of the first decode step of some rows of a workload, float64, and how far off they may be."""

    workload: Workload
    rows: list[int]
    logits: Tensor
    allowed: float


class Truth:
    """Logits in float64, and the error that plain PyTorch makes in the working dtype: the budget is twice that.

    hf_model: the model in the working dtype. make_exact: makes one with the same weights in float64, four times as
    large; it is let go of after each question, so that what is timed has the memory.
    """

    def __init__(self, hf_model: PreTrainedModel, make_exact: Callable[[], CausalLM]) -> None:
        self.model = CausalLM.from_hf(hf_model, backend="torch", pack=False)
        self.make_exact = make_exact
        self._known: list[_Expected] = []

    def learn(self, *workloads: Workload) -> None:
        """Work out the logits of ``workloads`` now, with one set of exact weights."""
        exact = self.make_exact()
        self._known = [self._expected(exact, workload) for workload in workloads]

    def check(self, what: str, workload: Workload, logits: Tensor, last: Tensor | None = None) -> Verdict:
        """The verdict on ``logits`` [B, V] of the first decode step; a sample of the rows is compared.

        last: [L, B], bool, which layers the tokens of that step ran, where a gate decided it.
        """
        known = [expected for expected in self._known if expected.workload is workload and last is None]
        expected = known[0] if known else self._expected(self.make_exact(), workload, last)
        error = float((logits[expected.rows].double() - expected.logits).abs().max())
        complaint = ""
        if not error <= expected.allowed:
            complaint = f"{what}: the logits must be within {expected.allowed:.3g} of float64, got {error:.3g}."
        return Verdict(error / expected.allowed, complaint)

    def _expected(self, exact: CausalLM, workload: Workload, last: Tensor | None = None) -> _Expected:
        rows = sorted({round(index * (workload.batch - 1) / (NUM_CHECKED - 1)) for index in range(NUM_CHECKED)})
        mask = workload.token_mask(rows, last)
        policy = "propagate" if workload.kv_policy is KVPolicy.PROPAGATE else "evict"

        # The specification attends for one query after the other: 75 s for three workloads on an H200. PyTorch's
        # attention knows no slopes in float64.
        executor: ExecutorName = "reference" if self.model.decoder.slopes is not None else "compact"

        def run(model: CausalLM) -> Tensor:
            output = model(workload.prompts[rows], paths=mask, kv_policy=policy, executor=executor)
            return output.logits[:, -1].double()

        truth, eager = run(exact), run(self.model)
        # Where eager happens to err less: two roundings of the largest logit, which no order of sums avoids.
        rounding = 2 * torch.finfo(self.model.dtype).eps * float(truth.abs().max())
        return _Expected(workload, rows, truth, max(2 * float((eager - truth).abs().max()), rounding))


def in_float64(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model with the weights that `random_hf_model` makes in ``dtype``, in float64."""
    hf_model = random_hf_model(hf_config(config), dtype=dtype, device=device).double()
    return CausalLM.from_hf(hf_model, backend="torch", pack=False)


def _random_prompts(batch: int, prompt_len: int, vocab_size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, vocab_size, (batch, prompt_len + 1), generator=generator).to(device)
