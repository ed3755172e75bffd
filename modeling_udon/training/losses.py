"""The four terms of the UDON objective, and what keeps an old student, as pure functions: tensors in, scalar out.

Formulas: arXiv 2406.08332, section 4; what the paper leaves open follows numbers of the original implementation.
"""

import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F

CLASSIFICATION_KINDS = ("normface", "cosface", "arcface")


def cosine_logits(embeds: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Cosine of each unit-norm embedding with each prototype, whose gradient goes through the prototype's norm.

    Args:
        embeds: Unit-norm embeddings of shape `(batch_size, dim)`.
        prototypes: Classifier weights of shape `(num_classes, dim)`, of any length; with several sub-centres a class of
            shape `(num_classes, num_subcenters, dim)`, of which the nearest counts (Deng et al., ECCV 2020).

    Returns:
        Cosines of shape `(batch_size, num_classes)`.
    """
    norms = torch.linalg.vector_norm(prototypes, dim=-1, keepdim=True).clamp_min(1e-12)
    if prototypes.ndim == 3:
        cosines = _cosines(embeds, prototypes.flatten(0, 1), norms.flatten(0, 1))  # (B, D) x (D, C * K) -> (B, C * K)
        return cosines.unflatten(1, prototypes.shape[:2]).amax(-1)  # (B, C * K) -> (B, C)
    return _cosines(embeds, prototypes, norms)


def classification_loss(
    cosine_logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor = 16.0,
    margin: float = 0.0,
    kind: str = "normface",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of scaled cosines, averaged over the batch.

    Args:
        cosine_logits: Cosines of shape `(batch_size, num_classes)`.
        labels: Classes of shape `(batch_size,)`, int64.
        scale: Factor on the cosines; 16 in the paper.
        margin: `cosface` subtracts it from the cosine of the true class (arXiv 1801.09414), `arcface` adds it, in
            radians, to its angle (arXiv 1801.07698); `normface` (arXiv 1704.06369) has none.
        kind: `"normface"`, `"cosface"` or `"arcface"`.
        label_smoothing: Share of the target that goes to all classes equally (arXiv 1512.00567).

    Raises:
        ValueError: If `kind` is unknown, or `normface` comes with a margin.
    """
    check_margin(margin, kind)
    if margin != 0:
        true_cosines = cosine_logits.gather(1, labels[:, None])  # (B, C) -> (B, 1)
        cosine_logits = cosine_logits.scatter(1, labels[:, None], with_margin(true_cosines, margin, kind))
    return F.cross_entropy(scale * cosine_logits, labels, label_smoothing=label_smoothing)


def scale_for(num_classes: int, scale: float, by: str) -> float:
    """Factor on the cosines with so many classes.

    Args:
        num_classes: Number of classes.
        scale: Factor at 1,000 classes, or at any number.
        by: `"fixed"`, the same for any number; `"log_classes"`, in proportion to its logarithm. The more classes, the
            larger the factor at which the true class can reach a given probability: AdaCos (arXiv 1905.00292) takes
            `sqrt(2) log(C - 1)`.
    """
    return scale if by == "fixed" else scale * math.log(num_classes) / math.log(1000)


def check_margin(margin: float, kind: str) -> None:
    """Refuses a margin that does not go with its kind.

    Raises:
        ValueError: If `kind` is unknown, or `normface` comes with a margin.
    """
    if kind not in CLASSIFICATION_KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(CLASSIFICATION_KINDS)}. Got {kind!r}.")
    if kind == "normface" and margin != 0:
        raise ValueError(f"`margin` must be 0 for kind 'normface'; use 'cosface' or 'arcface'. Got {margin}.")


def with_margin(true_cosines: torch.Tensor, margin: float, kind: str) -> torch.Tensor:
    """Cosines with the true class, of any shape, made harder by a margin that is not 0."""
    return true_cosines - margin if kind == "cosface" else _add_angle(true_cosines, margin)


def logit_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.1,
    gates: torch.Tensor | None = None,
) -> torch.Tensor:
    """`KL(softmax(teacher / T_t) || softmax(student / T_s))`, averaged over the batch.

    The teacher gets no gradient, and there is no factor T^2 (numbers of the original).

    Args:
        student_logits: Cosines of shape `(batch_size, num_classes)`.
        teacher_logits: Cosines of the same shape.
        student_temperature: Divisor of the student's cosines.
        teacher_temperature: Divisor of the teacher's cosines.
        gates: Weight of each image, of shape `(batch_size,)`; `None` gives all the same. The mean is over all images,
            also those of weight 0, so that a batch may be cut in parts.
    """
    student_log_probs = F.log_softmax(student_logits / student_temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.detach() / teacher_temperature, dim=1)
    if gates is None:
        return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    divergences = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(1)
    return (gates * divergences).mean()


def relational_distillation_loss(
    student_embeds: torch.Tensor, teacher_embeds: torch.Tensor, reduction_size: float
) -> torch.Tensor:
    """Mean squared difference between the student's and the teacher's similarities over all pairs of the batch.

    Args:
        student_embeds: Unit-norm embeddings of shape `(batch_size, embedding_dim)`.
        teacher_embeds: Unit-norm embeddings of shape `(batch_size, teacher_dim)`; they get no gradient.
        reduction_size: Factor on the mean. The original sums over a quarter of the global batch B, so that its
            default is B / 4.
    """
    difference = student_embeds @ student_embeds.t() - _similarities(teacher_embeds)  # (B, D), (B, E) -> (B, B)
    return reduction_size * difference.square().mean()


def relational_distillation_block(
    student_embeds: torch.Tensor,
    teacher_embeds: torch.Tensor,
    student_bank: torch.Tensor,
    teacher_bank: torch.Tensor,
    position: int,
    reduction_size: float,
) -> torch.Tensor:
    """This block's share of `relational_distillation_loss` over a batch that is spread over blocks.

    The blocks are the slices of one global batch that lie on several processes or come one after the other when
    gradients are accumulated. Averaged over equal blocks, values and gradients are those of the whole batch. A pair
    of two blocks is seen by each of them with only its own side alive, so its gradient counts twice.

    Args:
        student_embeds: This block's embeddings of shape `(block_size, embedding_dim)`.
        teacher_embeds: This block's embeddings of shape `(block_size, teacher_dim)`.
        student_bank: All blocks' embeddings of shape `(batch_size, embedding_dim)`, without gradient.
        teacher_bank: All blocks' embeddings of shape `(batch_size, teacher_dim)`, without gradient.
        position: Row of the bank at which this block starts.
        reduction_size: As in `relational_distillation_loss`.
    """
    stop = position + len(student_embeds)
    targets = teacher_embeds.detach() @ teacher_bank.t()  # (b, E) x (E, B) -> (b, B)
    own = student_embeds @ student_embeds.t() - targets[:, position:stop]
    others = torch.cat([student_bank[:position], student_bank[stop:]])
    crossing = student_embeds @ others.t() - torch.cat([targets[:, :position], targets[:, stop:]], dim=1)
    crossing_sum = crossing.square().sum()
    pairs = own.square().sum() + 2 * crossing_sum - crossing_sum.detach()
    return reduction_size * pairs / targets.numel()


def retention_loss(student_embeds: torch.Tensor, old_embeds: torch.Tensor) -> torch.Tensor:
    """Half the mean squared distance between the embeddings of a student and of the one it grew from.

    Not of the paper. It holds the embeddings themselves and not only their similarities, so that what the old student
    has embedded stays searchable.

    Args:
        student_embeds: Unit-norm embeddings of shape `(batch_size, embedding_dim)`.
        old_embeds: The old student's, of the same shape; they get no gradient.
    """
    return 1 - (student_embeds * old_embeds.detach()).sum(1).mean()


def squared_distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Half the squared distance between weights and those they started from (L2-SP, arXiv 1802.01483).

    Args:
        pairs: Weights, and the start of the same shape.
    """
    distances = [(weights - start).square().sum() for weights, start in pairs]
    return torch.stack(distances).sum() / 2


def _similarities(embeds: torch.Tensor) -> torch.Tensor:
    embeds = embeds.detach()
    return embeds @ embeds.t()


def _cosines(embeds: torch.Tensor, prototypes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    # The smaller of both is divided, prototypes or products: with many classes the passes over it, forward and
    # backward, cost more than the products do.
    if prototypes.shape[1] < len(embeds):
        return embeds @ (prototypes / norms).t()  # (B, D) x (D, C) -> (B, C)
    return (embeds @ prototypes.t()) / norms.t()


def _add_angle(cosines: torch.Tensor, margin: float) -> torch.Tensor:
    sines = (1 - cosines.square()).clamp_min(1e-12).sqrt()
    turned = cosines * math.cos(margin) - sines * math.sin(margin)
    # Past pi - margin the turned cosine would rise again, so a line of the same fall takes over.
    return torch.where(cosines > math.cos(math.pi - margin), turned, cosines - math.sin(margin) * margin)
