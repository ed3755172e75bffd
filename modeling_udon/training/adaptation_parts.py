"""Modules that train beside a student for domains without labels, and are not published with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_udon.config import LossConfig
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.modeling_udon import UdonHead, UdonModel, num_prefix_tokens, pool_features
from modeling_udon.training.adaptation_losses import NUM_NEIGHBOURS
from modeling_udon.training.parts import make_prototypes

# Width of the critics' hidden layer.
_CRITIC_WIDTH = 256
_FINAL_NORMS = ("layernorm", "norm", "post_layernorm")


class DomainCritic(nn.Module):
    """Tells source from target by unit-norm features; with a layer norm where the papers' code has a batch norm.

    A batch norm would see the two domains in one batch, and one process another batch than the next.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self._scale = in_dim**0.5
        self.layers = nn.Sequential(
            nn.Linear(in_dim, _CRITIC_WIDTH), nn.LayerNorm(_CRITIC_WIDTH), nn.ReLU(), nn.Linear(_CRITIC_WIDTH, 1)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of shape `(batch_size, in_dim)` -> logits of shape `(batch_size, 1)`."""
        # Entries of a unit vector are small; this gives them variance 1.
        logits: torch.Tensor = self.layers(self._scale * features)
        return logits


class PatchCritic(nn.Module):
    """Tells source from target by the similarities of patches to those around them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(NUM_NEIGHBOURS, 32, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 1),
        )

    def forward(self, affinities: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 8, height, width)` -> logits of shape `(batch_size, 1, height, width)`."""
        logits: torch.Tensor = self.layers(affinities)
        return logits


class BlockMap(nn.Module):
    """A bottleneck of the student's width that stands for some blocks of the teacher."""

    def __init__(self, teacher_width: int, student_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(teacher_width)
        self.down = nn.Linear(teacher_width, student_width)
        self.up = nn.Linear(student_width, teacher_width)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of shape `(B, N, teacher_width)` -> what the blocks would give, and `(B, N, student_width)`."""
        bottleneck = self.down(self.norm(tokens))
        return self.up(F.gelu(bottleneck)), bottleneck


class OnlineTeacher(nn.Module):
    """A teacher with a backbone of its own, whose embedding is the student head of its `UdonModel`.

    Args:
        udon: The teacher's network.
        num_classes: Classes of the shared class space.
        objective: Says whether classes have sub-centres.
        statistics: Channel statistics that it takes.
        with_critic: Whether it has a domain critic.
        student_width: Width of the student's tokens, where it has a map for some of its blocks; `None` for none.
        learns: Whether it learns with the student; else it stays as it is, without dropout.
    """

    def __init__(
        self,
        udon: UdonModel,
        num_classes: int,
        objective: LossConfig,
        statistics: ChannelStatistics,
        with_critic: bool,
        student_width: int | None = None,
        learns: bool = True,
    ) -> None:
        super().__init__()
        self.udon, self.learns = udon, learns
        self.prototypes = make_prototypes(num_classes, udon.config.embedding_dim, objective)
        self.critic = DomainCritic(udon.feature_dim) if with_critic else None
        self.map = None if student_width is None else BlockMap(udon.feature_dim, student_width)
        self.statistics = statistics
        self.requires_grad_(learns)

    def train(self, mode: bool = True) -> "OnlineTeacher":
        """Puts it into training mode, unless it stays as it is."""
        return super().train(mode and self.learns)


class Branch(nn.Module):
    """A further student on the same backbone: a head of its own, after all blocks or after some.

    Args:
        udon: The student's network.
        num_classes: Classes of the shared class space.
        objective: Says whether classes have sub-centres.
        depth: Blocks that it uses; `None` for all.
        embedding_dim: Size of its embedding; `None` for the student's.
    """

    def __init__(
        self, udon: UdonModel, num_classes: int, objective: LossConfig, depth: int | None, embedding_dim: int | None
    ) -> None:
        super().__init__()
        config, dim = udon.config, embedding_dim or udon.config.embedding_dim
        self.depth = depth
        self.head = UdonHead(udon.feature_dim, config.head_hidden_dims, dim, config.head_bias)
        self.head.apply(udon._init_weights)
        self.prototypes = make_prototypes(num_classes, dim, objective)


class Depthwise(nn.Module):
    """A depthwise convolution that keeps the size, its weight of shape `(width, size, size)`.

    That of `nn.Conv2d` has a dimension of 1, in which gradients come with other strides than DDP's buckets have.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size, size).uniform_(-1 / size, 1 / size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """`(batch_size, width, height, width)` -> the same shape."""
        width, size = self.weight.shape[:2]
        return F.conv2d(grid, self.weight[:, None], self.bias, padding=size // 2, groups=width)


class Aggregator(nn.Module):
    """Weights of the branches for each image: depthwise convolutions of patch tokens in three sizes, summed and pooled.

    OKDHP has full convolutions with batch norms on feature maps.
    """

    def __init__(self, width: int, num_branches: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(Depthwise(width, size) for size in (3, 5, 7))
        self.weigh = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, num_branches))

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Tokens of shape `(batch_size, width, height, width)` -> weights of shape `(batch_size, num_branches)`."""
        summed = torch.stack([convolution(grid).relu() for convolution in self.convolutions]).sum(0)
        return self.weigh(summed.mean((2, 3))).softmax(1)


def blocks_of(backbone: PreTrainedModel) -> nn.ModuleList:
    """Returns the blocks of a plain transformer.

    Raises:
        ValueError: If it is none.
    """
    number = getattr(backbone.config, "num_hidden_layers", None)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(f"the backbone must be a plain transformer. Got {backbone.config.model_type!r}; take a ViT")


def patch_grid(backbone: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Patch tokens as a square grid: `(B, N, D)` with tokens before the patches -> `(B, D, H, W)`."""
    patches = patch_tokens(backbone, tokens)
    side = int(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))


def patch_tokens(backbone: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Leaves out the tokens before the patches."""
    return tokens[:, num_prefix_tokens(backbone) :]


def exit_features(udon: UdonModel, hidden: torch.Tensor) -> torch.Tensor:
    """Unit-norm features of a backbone that ended after some of its blocks, with its own final norm.

    Args:
        udon: The network.
        hidden: Tokens after those blocks, of shape `(batch_size, num_tokens, width)`.
    """
    norm = final_norm(udon.backbone)
    outputs: Any = BaseModelOutput(last_hidden_state=norm(hidden))
    return F.normalize(pool_features(udon.backbone, outputs, udon.config).float(), dim=-1)


def final_norm(backbone: PreTrainedModel) -> nn.Module:
    """Returns the norm after the last block.

    Raises:
        ValueError: If there is none by a known name.
    """
    for name in _FINAL_NORMS:
        if isinstance(norm := getattr(backbone, name, None), nn.Module):
            return norm
    raise ValueError(f"the backbone must have a final norm. Got {backbone.config.model_type!r}; take a ViT")


@contextmanager
def blocks_replaced(blocks: nn.ModuleList, first: int, last: int, block_map: BlockMap) -> Iterator[list[torch.Tensor]]:
    """Lets a map stand for some blocks; gives a list that each forward pass adds its bottleneck to.

    Args:
        blocks: The blocks of the teacher.
        first: The first one replaced, from 1.
        last: The last one replaced.
        block_map: What stands for them.
    """
    bottlenecks: list[torch.Tensor] = []

    def mapped(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        tokens, bottleneck = block_map(inputs[0])
        bottlenecks.append(bottleneck)
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def skipped(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    hooks = [blocks[first - 1].register_forward_hook(mapped)]
    hooks += [block.register_forward_hook(skipped) for block in list(blocks)[first:last]]
    try:
        yield bottlenecks
    finally:
        for hook in hooks:
            hook.remove()
