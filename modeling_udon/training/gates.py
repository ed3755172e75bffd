"""Gates of logit distillation: a teacher has a say only where it classifies better than the student."""

import torch
from torch.nn import functional as F

# Share of the old mean that a step of the domain leaves in a running mean.
GATE_MOMENTUM = 0.99


def confidence(cosine_logits: torch.Tensor, labels: torch.Tensor, scale: float | torch.Tensor, by: str) -> torch.Tensor:
    """How well each image is classified, without margin and without gradient; higher is better.

    Args:
        cosine_logits: Cosines of shape `(batch_size, num_classes)`.
        labels: Classes of shape `(batch_size,)`, int64.
        scale: Factor on the cosines.
        by: `"loss"`, the log probability of the true class; `"margin"`, its probability minus the largest other one.

    Returns:
        Shape `(batch_size,)`.
    """
    log_probs = F.log_softmax(scale * cosine_logits.detach(), dim=1)
    true = log_probs.gather(1, labels[:, None])  # (B, C) -> (B, 1)
    if by == "loss":
        return true[:, 0]
    others = log_probs.scatter(1, labels[:, None], -torch.inf).amax(1)
    return true[:, 0].exp() - others.exp()


def open_gates(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Weight of each image in logit distillation: 1 where the teacher's confidence is the higher one, else 0."""
    return (teacher > student).float()


def running_means(means: torch.Tensor, confidences: torch.Tensor) -> torch.Tensor:
    """Running means of student and teacher after one more step of a domain.

    Both begin at 0 and have seen as many steps, so that the bias towards 0 does not decide which is higher.

    Args:
        means: Shape `(2,)`.
        confidences: Means of the step's batch, of the same shape.
    """
    return torch.lerp(confidences, means, GATE_MOMENTUM)
