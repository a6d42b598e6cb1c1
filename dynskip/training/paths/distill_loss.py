"""The divergence of several students from one teacher, token by token, without a [N, V] tensor in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynskip.training.response_loss import product_dtype

# Logits of 64 rows and 49,152 words fill 12 MiB in float32: most are still in the cache when they are read next.
_ROWS_PER_CHUNK = {"cpu": 64, "cuda": 1024}


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, head: Tensor, student_head: Tensor, *students: Tensor) -> Tensor:
        num_rows = len(teacher)
        sums = torch.zeros(len(students), dtype=torch.float32, device=teacher.device)
        grads = [torch.empty_like(student) for student in students]
        head_grad = torch.zeros_like(student_head, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        step = _ROWS_PER_CHUNK[teacher.device.type]
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            wanted = (teacher[rows] @ head.T).float().log_softmax(-1)
            probs = wanted.exp()
            entropy = torch.linalg.vecdot(probs, wanted)
            for index, student in enumerate(students):
                logs = (student[rows] @ student_head.T).float().log_softmax(-1)
                sums[index] += (entropy - torch.linalg.vecdot(probs, logs)).sum()
                logits_grad = logs.exp_().sub_(probs).to(student.dtype)
                grads[index][rows] = logits_grad @ student_head
                if head_grad is not None:
                    head_grad += logits_grad.T @ student[rows]
        ctx.save_for_backward(*grads)
        ctx.head_grad, ctx.num_rows = head_grad, num_rows
        return sums / num_rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        scales = grad_outputs[0] / ctx.num_rows
        grads = [grad * scale.to(grad.dtype) for grad, scale in zip(ctx.saved_tensors, scales, strict=True)]
        if ctx.head_grad is None:
            return None, None, None, *grads
        # The students' gradients of the head were added up with one weight.
        assert bool((scales == scales[0]).all()), "students that weigh alike"
        return None, None, (ctx.head_grad * scales[0]).to(grads[0].dtype), *grads


def distill_loss(
    teacher: Tensor, students: Sequence[Tensor], head: Tensor, student_head: Tensor | None = None
) -> Tensor:
    """[S]: the mean over rows of KL(teacher || student), in nats, of each student, fp32, differentiable.

    teacher, students: [N, C] each, states behind the final norm. head: [V, C]. student_head: the students', where it is
    another one and is trained; then all of the losses must weigh alike.
    The products run in autocast's dtype where autocast is on, else in that of the states; the softmax in fp32. Losses
    and gradients are made chunk by chunk in one pass, so neither logits nor their gradients are ever whole, and the
    teacher's are made once for all students.
    """
    if len(teacher) == 0:
        raise ValueError("distill_loss: teacher must have at least one row, got none. Leave such a batch out.")
    dtype = product_dtype(teacher)
    heads = (head, head if student_head is None else student_head)
    with torch.autocast(teacher.device.type, enabled=False):
        losses: Tensor = _DistillLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            teacher.to(dtype), *(each.to(dtype) for each in heads), *(student.to(dtype) for student in students)
        )
    return losses
