"""Classification and logit distillation over chunks of classes: the cosines of a batch with all classes are never held.

Both go over the prototypes in chunks of classes: forward, log-sum-exps are summed up chunk by chunk; backward, each
chunk's cosines are computed again. Values and gradients are those of `losses.classification_loss` and
`losses.logit_distillation_loss` on `losses.cosine_logits`, up to rounding; what a step holds of a class count C falls
from `(batch_size, C)` to `(batch_size, chunk_size)`.

Where each process has a shard of the classes, it goes over its own with the embeddings of all processes, and sums and
log-sum-exps are added up over processes. A loss is the mean over the process's own images. Gradients of embeddings are
of that loss, as of all that processes average; gradients of prototypes, which nobody averages, of the mean of the
processes' losses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from modeling_udon.training.class_shards import ClassShard
from modeling_udon.training.losses import check_margin, cosine_logits, with_margin


def chunked_classification_loss(
    embeds: torch.Tensor,
    prototypes: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor = 16.0,
    margin: float = 0.0,
    kind: str = "normface",
    chunk_size: int = 8192,
    label_smoothing: float = 0.0,
    shard: ClassShard | None = None,
) -> torch.Tensor:
    """Cross entropy of scaled cosines, averaged over the batch; see `losses.classification_loss`.

    Args:
        embeds: Unit-norm embeddings of shape `(batch_size, dim)`.
        prototypes: Classifier weights of shape `(num_classes, dim)`.
        labels: Classes of shape `(batch_size,)`, int64.
        scale: Factor on the cosines.
        margin: Of `cosface` or `arcface`.
        kind: `"normface"`, `"cosface"` or `"arcface"`.
        chunk_size: Classes whose cosines are held at a time.
        label_smoothing: Share of the target that goes to all classes equally.
        shard: Which of the classes the prototypes are; `None` for all. Labels are of all.

    Raises:
        ValueError: If `kind` is unknown, or `normface` comes with a margin.
    """
    check_margin(margin, kind)
    hardness = _Hardness(scale, margin, kind, label_smoothing)
    loss: torch.Tensor = _Classification.apply(embeds, prototypes, labels, hardness, chunk_size, shard)
    return loss


def chunked_logit_distillation_loss(
    student_embeds: torch.Tensor,
    student_prototypes: torch.Tensor,
    teacher_embeds: torch.Tensor,
    teacher_prototypes: torch.Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.1,
    chunk_size: int = 8192,
    gates: torch.Tensor | None = None,
    shard: ClassShard | None = None,
) -> torch.Tensor:
    """`KL(softmax(teacher / T_t) || softmax(student / T_s))`, averaged over the batch; the teacher gets no gradient.

    Args:
        student_embeds: Unit-norm embeddings of shape `(batch_size, embedding_dim)`.
        student_prototypes: Classifier weights of shape `(num_classes, embedding_dim)`.
        teacher_embeds: Unit-norm embeddings of shape `(batch_size, teacher_dim)`.
        teacher_prototypes: Classifier weights of shape `(num_classes, teacher_dim)`.
        student_temperature: Divisor of the student's cosines.
        teacher_temperature: Divisor of the teacher's cosines.
        chunk_size: Classes whose cosines are held at a time.
        gates: Weight of each image in the mean, of shape `(batch_size,)`; `None` gives all the same.
        shard: Which of the classes both prototypes are; `None` for all.
    """
    temperatures = student_temperature, teacher_temperature
    divergences: torch.Tensor = _LogitDistillation.apply(
        student_embeds,
        student_prototypes,
        teacher_embeds.detach(),
        teacher_prototypes.detach(),
        temperatures,
        chunk_size,
        shard,
    )
    return (divergences if gates is None else gates * divergences).mean()


@torch.no_grad()
def chunked_confidence(
    embeds: torch.Tensor,
    prototypes: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    by: str,
    chunk_size: int,
) -> torch.Tensor:
    """How well each image is classified, of shape `(batch_size,)`; see `gates.confidence`."""
    log_sum = embeds.new_full((len(embeds),), -torch.inf)
    true_logits, others = log_sum, log_sum
    for chunk in _chunks(len(prototypes), chunk_size):
        own, columns = _own(labels, chunk)
        logits = scale * cosine_logits(embeds, prototypes[chunk])
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
        of_columns = logits.gather(1, columns)
        true_logits = torch.where(own, of_columns[:, 0], true_logits)
        of_others = logits.scatter(1, columns, torch.where(own[:, None], -torch.inf, of_columns))
        others = torch.maximum(others, of_others.amax(1))
    log_probs = true_logits - log_sum
    return log_probs if by == "loss" else log_probs.exp() - (others - log_sum).exp()


@torch.no_grad()
def chunked_hardness(
    embeds: torch.Tensor,
    prototypes: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """What an adaptive scale depends on, of shape `(batch_size, 2)`; see `adaptive_scale.hardness`."""
    wrong = embeds.new_full((len(embeds),), -torch.inf)
    true_cosines = torch.zeros_like(wrong)
    for chunk in _chunks(len(prototypes), chunk_size):
        own, columns = _own(labels, chunk)
        cosines = cosine_logits(embeds, prototypes[chunk])
        of_columns = cosines.gather(1, columns)
        true_cosines = torch.where(own, of_columns[:, 0], true_cosines)
        of_wrong = (scale * cosines).scatter_(1, columns, torch.where(own[:, None], -torch.inf, scale * of_columns))
        wrong = torch.logaddexp(wrong, of_wrong.logsumexp(1))
    return torch.stack([wrong, true_cosines], dim=1)


@dataclass(frozen=True)
class _Hardness:
    scale: float | torch.Tensor
    margin: float
    kind: str
    smoothing: float


class _Classification(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeds: torch.Tensor,
        prototypes: torch.Tensor,
        labels: torch.Tensor,
        hardness: _Hardness,
        chunk_size: int,
        shard: ClassShard | None,
    ) -> torch.Tensor:
        num_classes = len(prototypes) if shard is None else shard.num_classes
        if shard is not None:
            embeds, labels = shard.gather(embeds), shard.gather(labels) - shard.start
        log_sum = embeds.new_full((len(embeds),), -torch.inf)
        true_logits, sums = torch.zeros_like(log_sum), torch.zeros_like(log_sum)
        for chunk in _chunks(len(prototypes), chunk_size):
            own, columns = _own(labels, chunk)
            logits = hardness.scale * _harder_cosines(embeds, prototypes[chunk], own, columns, hardness)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
            true_logits = torch.where(own, logits.gather(1, columns)[:, 0], true_logits)
            sums += logits.sum(1)
        if shard is not None:
            log_sum, true_logits, sums = shard.log_add(log_sum), shard.add(true_logits), shard.add(sums)
        ctx.save_for_backward(embeds, prototypes, labels, log_sum)
        ctx.hardness, ctx.chunk_size, ctx.shard, ctx.num_classes = hardness, chunk_size, shard, num_classes
        share = hardness.smoothing
        targets = (1 - share) * true_logits + share / num_classes * sums if share else true_logits
        losses = log_sum - targets
        return losses.mean() if shard is None else shard.own(losses).mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        embeds, prototypes, labels, log_sum = ctx.saved_tensors
        hardness: _Hardness = ctx.hardness
        gradients = torch.zeros_like(embeds), torch.empty_like(prototypes)
        for chunk in _chunks(len(prototypes), ctx.chunk_size):
            own, columns = _own(labels, chunk)
            with torch.enable_grad():
                leaves = _leaves(embeds, prototypes[chunk])
                cosines = _harder_cosines(*leaves, own, columns, hardness)
            # Softmax minus the target, by the factors that the logits and the mean bring.
            of_cosines = (hardness.scale * cosines.detach()).sub_(log_sum[:, None]).exp_()
            share = hardness.smoothing
            of_cosines.scatter_add_(1, columns, (share - 1) * own[:, None].to(of_cosines.dtype))
            of_cosines -= share / ctx.num_classes
            of_cosines *= hardness.scale * gradient / len(labels)
            _add_gradients(gradients, chunk, torch.autograd.grad(cosines, leaves, of_cosines))
        of_embeds, of_prototypes = gradients
        if ctx.shard is not None:
            # Divided by the images of all processes above; a loss is the mean over one's own.
            of_embeds = ctx.shard.num_processes * ctx.shard.own(ctx.shard.add(of_embeds))
        return of_embeds, of_prototypes, None, None, None, None


class _LogitDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_embeds: torch.Tensor,
        student_prototypes: torch.Tensor,
        teacher_embeds: torch.Tensor,
        teacher_prototypes: torch.Tensor,
        temperatures: tuple[float, float],
        chunk_size: int,
        shard: ClassShard | None,
    ) -> torch.Tensor:
        if shard is not None:
            student_embeds, teacher_embeds = shard.gather(student_embeds), shard.gather(teacher_embeds)
        log_sum = student_embeds.new_full((len(student_embeds),), -torch.inf)
        teacher_log_sum, difference = log_sum, torch.zeros_like(log_sum)
        for chunk in _chunks(len(student_prototypes), chunk_size):
            logits = cosine_logits(student_embeds, student_prototypes[chunk]) / temperatures[0]
            targets = cosine_logits(teacher_embeds, teacher_prototypes[chunk]) / temperatures[1]
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
            of_chunk = targets.logsumexp(1)
            before, teacher_log_sum = teacher_log_sum, torch.logaddexp(teacher_log_sum, of_chunk)
            # The teacher's mean of `targets - logits` over the classes so far, by the classes' probabilities.
            mean = (targets.softmax(1) * (targets - logits)).sum(1)
            difference = difference * (before - teacher_log_sum).exp() + mean * (of_chunk - teacher_log_sum).exp()
        if shard is not None:
            of_shard, log_sum, teacher_log_sum = teacher_log_sum, shard.log_add(log_sum), shard.log_add(teacher_log_sum)
            difference = shard.add(difference * (of_shard - teacher_log_sum).exp())
        ctx.save_for_backward(
            student_embeds, student_prototypes, teacher_embeds, teacher_prototypes, log_sum, teacher_log_sum
        )
        ctx.temperatures, ctx.chunk_size, ctx.shard = temperatures, chunk_size, shard
        divergences = difference - teacher_log_sum + log_sum
        return divergences if shard is None else shard.own(divergences)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        embeds, prototypes, teacher_embeds, teacher_prototypes, log_sum, teacher_log_sum = ctx.saved_tensors
        temperature, teacher_temperature = ctx.temperatures
        shard: ClassShard | None = ctx.shard
        if shard is not None:
            gradient = shard.gather(gradient)
        gradients = torch.zeros_like(embeds), torch.empty_like(prototypes)
        for chunk in _chunks(len(prototypes), ctx.chunk_size):
            with torch.enable_grad():
                leaves = _leaves(embeds, prototypes[chunk])
                cosines = cosine_logits(*leaves)
            targets = cosine_logits(teacher_embeds, teacher_prototypes[chunk]).div_(teacher_temperature)
            of_cosines = (cosines.detach() / temperature).sub_(log_sum[:, None]).exp_()
            of_cosines -= targets.sub_(teacher_log_sum[:, None]).exp_()
            of_cosines *= gradient[:, None] / temperature
            _add_gradients(gradients, chunk, torch.autograd.grad(cosines, leaves, of_cosines))
        of_embeds, of_prototypes = gradients
        if shard is not None:
            of_embeds, of_prototypes = shard.own(shard.add(of_embeds)), of_prototypes / shard.num_processes
        return of_embeds, of_prototypes, None, None, None, None, None


def _chunks(num_classes: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, num_classes, chunk_size):
        yield slice(start, min(start + chunk_size, num_classes))


def _own(labels: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each image's class lies in the chunk, of shape `(B,)`, and its column there, of shape `(B, 1)`.

    A list of the images whose class does would hold up a GPU at every chunk, to ask how many they are; the others get
    some column, which is masked.
    """
    own = (labels >= chunk.start) & (labels < chunk.stop)
    return own, (labels - chunk.start).clamp(0, chunk.stop - chunk.start - 1)[:, None]


def _harder_cosines(
    embeds: torch.Tensor, prototypes: torch.Tensor, own: torch.Tensor, columns: torch.Tensor, hardness: _Hardness
) -> torch.Tensor:
    cosines = cosine_logits(embeds, prototypes)
    if hardness.margin == 0:
        return cosines
    true_cosines = cosines.gather(1, columns)  # (B, chunk) -> (B, 1)
    harder = with_margin(true_cosines, hardness.margin, hardness.kind)
    return cosines.scatter(1, columns, torch.where(own[:, None], harder, true_cosines))


def _leaves(embeds: torch.Tensor, prototypes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return embeds.detach().requires_grad_(), prototypes.detach().requires_grad_()


def _add_gradients(
    gradients: tuple[torch.Tensor, torch.Tensor], chunk: slice, of_chunk: tuple[torch.Tensor, ...]
) -> None:
    gradients[0].add_(of_chunk[0])
    gradients[1][chunk] = of_chunk[1]
