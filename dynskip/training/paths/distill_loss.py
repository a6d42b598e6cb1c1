"""The divergence of several students from one teacher, token by token, without a [N, V] tensor in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dynskip.training.response_loss import product_dtype

# Logits of 64 rows and 49,152 words fill 12 MiB in float32: most are still in the cache when they are read next.
_ROWS_PER_CHUNK = {"cpu": 64, "cuda": 1024}


class Head(NamedTuple):
    """What makes logits of states. weight: [V, C]. bias: [V]."""

    weight: Tensor
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Head:
        """It in another dtype."""
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *students: Tensor,
    ) -> Tensor:
        num_rows = len(teacher)
        sums = torch.zeros(len(students), dtype=torch.float32, device=teacher.device)
        grads = [torch.empty_like(student) for student in students]
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        bias_grad = torch.zeros_like(weight[:, 0], dtype=torch.float32) if ctx.needs_input_grad[4] else None
        step = _ROWS_PER_CHUNK[teacher.device.type]
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            wanted = functional.linear(teacher[rows], teacher_weight, teacher_bias).float().log_softmax(-1)
            probs = wanted.exp()
            entropy = torch.linalg.vecdot(probs, wanted)
            for index, student in enumerate(students):
                logs = functional.linear(student[rows], weight, bias).float().log_softmax(-1)
                sums[index] += (entropy - torch.linalg.vecdot(probs, logs)).sum()
                wide_grad = logs.exp_().sub_(probs)
                logits_grad = wide_grad.to(student.dtype)
                grads[index][rows] = logits_grad @ weight
                if weight_grad is not None:
                    weight_grad += logits_grad.T @ student[rows]
                if bias_grad is not None:
                    bias_grad += wide_grad.sum(0)
        ctx.save_for_backward(*grads)
        ctx.head_grads, ctx.num_rows = (weight_grad, bias_grad), num_rows
        return sums / num_rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        scales = grad_outputs[0] / ctx.num_rows
        grads = [grad * scale.to(grad.dtype) for grad, scale in zip(ctx.saved_tensors, scales, strict=True)]
        # The students' gradients of the head were added up with one weight.
        is_trained = any(grad is not None for grad in ctx.head_grads)
        assert not is_trained or bool((scales == scales[0]).all()), "students that weigh alike"
        of_head = [None if grad is None else (grad * scales[0]).to(grads[0].dtype) for grad in ctx.head_grads]
        return None, None, None, *of_head, *grads


def distill_loss(teacher: Tensor, students: Sequence[Tensor], head: Head, student_head: Head | None = None) -> Tensor:
    """[S]: the mean over rows of KL(teacher || student), in nats, of each student, fp32, differentiable.

    teacher, students: [N, C] each, states behind the final norm. student_head: the students', where it is another one
    and is trained; then all of the losses must weigh alike.
    The products run in autocast's dtype where autocast is on, else in that of the states; the softmax in fp32. Losses
    and gradients are made chunk by chunk in one pass, so neither logits nor their gradients are ever whole, and the
    teacher's are made once for all students.
    """
    if len(teacher) == 0:
        raise ValueError("distill_loss: teacher must have at least one row, got none. Leave such a batch out.")
    dtype = product_dtype(teacher)
    heads = (*head.to(dtype), *(student_head or head).to(dtype))
    with torch.autocast(teacher.device.type, enabled=False):
        losses: Tensor = _DistillLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            teacher.to(dtype), *heads, *(student.to(dtype) for student in students)
        )
    return losses
