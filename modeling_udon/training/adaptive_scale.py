"""The scale of a classification that follows its cosines: dynamic AdaCos (Zhang et al., arXiv 1905.00292).

With the scale `s`, `B` the mean over a batch of the sum over wrong classes of `exp(s cos)`, and `m` the median angle to
the true class, the next scale is `log B / cos(min(pi / 4, m))` (equation 15). Here it is that of the domain's next step
and not of the same one, so that a loss does not depend on how its batch is cut into parts and processes; and it is at
least 1, since with two classes the formula would begin at 0 and stay there.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from modeling_udon.config import LossConfig

SMALLEST_SCALE = 1.0


def first_scale(num_classes: int) -> float:
    """Scale that training begins with, the fixed one of AdaCos: `sqrt(2) log(C - 1)`."""
    return max(SMALLEST_SCALE, math.sqrt(2) * math.log(max(num_classes - 1, 1)))


@torch.no_grad()
def hardness(cosine_logits: torch.Tensor, labels: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """What the next scale depends on, of each image.

    Args:
        cosine_logits: Cosines of shape `(batch_size, num_classes)`.
        labels: Classes of shape `(batch_size,)`, int64.
        scale: Factor on the cosines.

    Returns:
        Shape `(batch_size, 2)`: the logarithm of the sum of `exp(scale * cosine)` over the wrong classes, and the
        cosine with the true one.
    """
    columns = labels[:, None]
    wrong = (scale * cosine_logits).scatter_(1, columns, -torch.inf).logsumexp(1)  # (B, C) -> (B,)
    return torch.stack([wrong, cosine_logits.gather(1, columns)[:, 0]], dim=1)


def next_scale(found: torch.Tensor) -> torch.Tensor:
    """The scale after a batch, a scalar.

    Args:
        found: Hardness of all images of the batch, of shape `(batch_size, 2)`.
    """
    wrong, true_cosines = found.unbind(1)
    mean = wrong.logsumexp(0) - math.log(len(found))
    angle = true_cosines.clamp(-1, 1).acos().median().clamp(max=math.pi / 4)
    return (mean / angle.cos()).clamp_min(SMALLEST_SCALE)


class AdaptiveScales(nn.Module):
    """Scales of each domain, as buffers, so that a checkpoint has them.

    Args:
        objective: Says whether the student's classifier is joint, which has one scale, and whether there are teachers.
        num_classes: Classes of each domain.
    """

    student: torch.Tensor
    teacher: torch.Tensor

    def __init__(self, objective: LossConfig, num_classes: Sequence[int]) -> None:
        super().__init__()
        student = [sum(num_classes)] if objective.classifier == "joint" else num_classes
        for name, numbers in (("student", student), ("teacher", num_classes if objective.needs_teachers else [])):
            self.register_buffer(name, torch.tensor([first_scale(number) for number in numbers], dtype=torch.float32))

    def of_student(self, number: int) -> torch.Tensor:
        """The student's scale in the domain at a place, a scalar."""
        return self.student[number if len(self.student) > 1 else 0]

    @torch.no_grad()
    def observe(self, number: int, found: torch.Tensor, applied: torch.Tensor) -> None:
        """Moves the scales of one domain on.

        Args:
            number: Place of the domain.
            found: Hardness for the student, and for the teacher if there is one, of all images of the global batch, of
                shape `(batch_size, 1 or 2, 2)`.
            applied: Whether the step was applied, a scalar on the device; else the scales stay.
        """
        scales = [self.of_student(number), *self.teacher[number : number + 1]]
        for scale, of_head in zip(scales, found.unbind(1), strict=True):
            scale.copy_(torch.where(applied, next_scale(of_head), scale))
