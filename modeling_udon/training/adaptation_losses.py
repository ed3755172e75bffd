"""Terms for domains without labels as pure functions: tensors in, scalar out.

After the methods of Nguyen-Meidine et al. (KD-STDA and KD-MTDA, 2021; MT-MTDA, 2020), ASANet (2020) and OKDHP (2021).
The docstrings say where they depart from them.
"""

import math

import torch
from torch.nn import functional as F

# Bandwidths of the kernels: unit-norm features have squared distances from 0 to 4. Bandwidths that follow the mean
# distance, as the papers' code has them, reward a collapse: they shrink with the features.
MMD_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Neighbours whose similarities are compared.
NUM_NEIGHBOURS = 8


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return -ctx.factor * gradient, None


def reverse_gradient(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns the features as they are; their gradient comes back times `-factor` (DANN, arXiv 1505.07818)."""
    reversed_features: torch.Tensor = _Reversal.apply(features, factor)
    return reversed_features


def confusion_share(progress: float) -> float:
    """Share of domain confusion after a share of the run, `2 / (1 + exp(-10 p)) - 1`: from 0 to 1 (arXiv 1505.07818).

    One of the papers' codes lets it begin again with each epoch; here it rises once.
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


def domain_classification_loss(source_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of a domain critic: 1 for the source, 0 for the target, the mean of both.

    Args:
        source_logits: Of any shape.
        target_logits: Of any shape.
    """
    of_source = F.binary_cross_entropy_with_logits(source_logits, torch.ones_like(source_logits))
    return (of_source + F.binary_cross_entropy_with_logits(target_logits, torch.zeros_like(target_logits))) / 2


def mmd_loss(
    source: torch.Tensor,
    target: torch.Tensor,
    source_bank: torch.Tensor | None = None,
    target_bank: torch.Tensor | None = None,
    position: int = 0,
) -> torch.Tensor:
    """Squared maximum mean discrepancy of unit-norm features under a sum of Gaussian kernels of fixed bandwidths.

    The features may be a block of a batch that is spread over processes: averaged over equal blocks, values and
    gradients are those of the whole batch, as in `relational_distillation_block`.

    Args:
        source: Features of shape `(block_size, dim)`.
        target: Features of the same shape.
        source_bank: Those of all blocks, of shape `(batch_size, dim)`, without gradient; `None` for this block alone.
        target_bank: The target's likewise.
        position: Row of the banks at which this block starts.
    """
    stop = position + len(source)
    source_bank = source.detach() if source_bank is None else source_bank
    target_bank = target.detach() if target_bank is None else target_bank
    other_sources = torch.cat([source_bank[:position], source_bank[stop:]])
    other_targets = torch.cat([target_bank[:position], target_bank[stop:]])
    within = _within(source, other_sources) + _within(target, other_targets)
    between = _kernel(source, target).sum() + _kernel(source, other_targets).sum()
    # The target's side of these pairs is alive here; their values are counted where the source's is.
    theirs = _kernel(other_sources, target).sum()
    between = between + theirs - theirs.detach()
    return (within - 2 * between) / (len(source) * len(source_bank))


def affinity_of_batch(embeds: torch.Tensor, num_neighbours: int = NUM_NEIGHBOURS) -> torch.Tensor:
    """Similarities of each image to its nearest ones in the batch, highest first: shape `(batch_size, num_neighbours)`.

    Args:
        embeds: Unit-norm embeddings of shape `(batch_size, dim)`, more than `num_neighbours` of them.
        num_neighbours: Number of neighbours.
    """
    return _without_self(embeds @ embeds.t()).topk(num_neighbours, dim=1).values


def affinity_of_patches(maps: torch.Tensor) -> torch.Tensor:
    """Inner products of each patch with the eight around it: shape `(batch_size, 8, height, width)`.

    At the edge, the patch itself stands for a neighbour that is not there.

    Args:
        maps: Embeddings or probabilities of the patches, of shape `(batch_size, dim, height, width)`.
    """
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    places = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    products = [(maps * padded[:, :, row : row + height, column : column + width]).sum(1) for row, column in places]
    return torch.stack(products, dim=1)


def cleaning_of_batch(
    probabilities: torch.Tensor, embeds: torch.Tensor, num_neighbours: int = NUM_NEIGHBOURS
) -> torch.Tensor:
    """Mean over each image's nearest ones in the batch of `1 - sum_c p_i(c) p_j(c)` (ASANet: of pixels).

    Args:
        probabilities: Shape `(batch_size, num_classes)`.
        embeds: Unit-norm embeddings of shape `(batch_size, dim)` that say which are near; they get no gradient.
        num_neighbours: Number of neighbours.
    """
    similarities = _without_self(embeds.detach() @ embeds.detach().t())
    neighbours = similarities.topk(num_neighbours, dim=1).indices  # (B, B) -> (B, k)
    return 1 - (probabilities @ probabilities.t()).gather(1, neighbours).mean()


def cleaning_of_patches(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean over the eight patches around each of `1 - sum_c p_i(c) p_j(c)` (ASANet).

    Args:
        probabilities: Shape `(batch_size, num_classes, height, width)`.
    """
    return 1 - affinity_of_patches(probabilities).mean()


def mean_log_probabilities(logits: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """Logarithm of the mean of several teachers' probabilities, of shape `(batch_size, num_classes)`.

    Args:
        logits: Those of each teacher, of that shape.
        temperature: Their divisor.
    """
    log_probs = torch.stack([F.log_softmax(one / temperature, dim=1) for one in logits])
    return log_probs.logsumexp(0) - math.log(len(logits))


def token_distance(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of tokens, each shifted and scaled to mean 0 and variance 1 over its channels.

    Args:
        tokens: Shape `(batch_size, num_patches, dim)`.
        targets: Shape `(batch_size, other_num_patches, dim)`; square grids are interpolated to one another. They get no
            gradient.
    """
    dim = tokens.shape[-1:]
    targets = targets.detach()
    if targets.shape[1] != tokens.shape[1]:
        side, wanted = math.isqrt(targets.shape[1]), math.isqrt(tokens.shape[1])
        grid = targets.transpose(1, 2).unflatten(2, (side, side))  # (B, N, D) -> (B, D, H, W)
        grid = F.interpolate(grid, (wanted, wanted), mode="bilinear", align_corners=False)
        targets = grid.flatten(2).transpose(1, 2)
    return F.mse_loss(F.layer_norm(tokens, dim), F.layer_norm(targets, dim))


def aggregate(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the branches' logits: `(batch_size, num_branches, num_classes)` -> `(batch_size, num_classes)`.

    Args:
        logits: As above.
        weights: Shape `(batch_size, num_branches)`, which sum to 1.
    """
    return (weights[:, :, None] * logits).sum(1)


def aggregate_share(progress: float, rise: float = 0.4) -> float:
    """Share of the aggregate's distillation after a share of the run, `exp(-5 (1 - p / rise)^2)`, then 1.

    OKDHP has it rise over 60 epochs of 150.
    """
    return math.exp(-5 * (1 - min(1.0, progress / rise)) ** 2)


def aggregate_distillation_loss(logits: torch.Tensor, aggregated: torch.Tensor) -> torch.Tensor:
    """Sum over the branches of `KL(softmax(z) || softmax(z_k))`, without temperature, averaged over the batch (OKDHP).

    Args:
        logits: Scaled logits of the branches, of shape `(batch_size, num_branches, num_classes)`.
        aggregated: Those of the aggregate, of shape `(batch_size, num_classes)`. Other than in the paper's code,
            they get no gradient: branches that are hard to follow should not move it.
    """
    targets = F.log_softmax(aggregated.detach(), dim=-1)[:, None].expand_as(logits)
    return F.kl_div(F.log_softmax(logits, dim=-1), targets, reduction="sum", log_target=True) / len(logits)


def largest_share(cosine_logits: torch.Tensor) -> torch.Tensor:
    """Share of the images that are taken for the class that most of them are taken for; 1 is a collapse."""
    classes = cosine_logits.argmax(1)
    return (classes[:, None] == classes[None]).float().mean(1).amax()


def _kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # Of unit norm, so that no square root is needed whose gradient at 0 is infinite.
    squared = 2 - 2 * one @ other.t()  # (N, D), (M, D) -> (N, M)
    return torch.stack([torch.exp(-squared / bandwidth) for bandwidth in MMD_BANDWIDTHS]).sum(0)


def _within(own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    crossing = _kernel(own, others).sum()
    return _kernel(own, own).sum() + 2 * crossing - crossing.detach()


def _without_self(similarities: torch.Tensor) -> torch.Tensor:
    diagonal = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    return similarities.masked_fill(diagonal, -torch.inf)
