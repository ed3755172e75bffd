"""Inputs of a training step: images, tokens that enter the last layers of a backbone, or features of a frozen one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from modeling_udon.backbones import check_layer_count
from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.backbone import probe_images
from modeling_udon.training.parts import Embeddings

_KEY = "train.trained_layers"
# What the embeddings of the same image may differ by, computed in one go and in two halves.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Inputs:
    """Normalised images of shape `(batch_size, 3, height, width)`: all of the model is run on them."""

    def __call__(
        self, udon: UdonModel, inputs: torch.Tensor, domain: str | None = None, interpolate: bool | None = None
    ) -> Embeddings:
        """Embeds a batch by the rest of the model.

        Args:
            udon: The model.
            inputs: The batch.
            domain: Domain whose teacher embeds it as well.
            interpolate: As in `UdonModel.forward`.
        """
        return _run(udon, inputs, domain, interpolate)

    def made_of(self, udon: UdonModel, images: torch.Tensor, interpolate: bool | None = None) -> torch.Tensor:
        """Turns normalised images into such inputs.

        Args:
            udon: The model.
            images: The images.
            interpolate: As in `UdonModel.forward`.
        """
        return images

    def freeze(self, udon: UdonModel) -> None:
        """Freezes the part of a model that is not run in a step.

        Raises:
            ConfigError: If the model cannot be cut there.
        """

    def adapted(self, backbone: nn.Module) -> nn.Module:
        """The part of a backbone that adapters go into."""
        return backbone


class CachedInputs(Inputs, ABC):
    """Inputs that a frozen part of the model makes of each image once, and that are kept on disk."""

    # Whether they are kept in half precision where the arithmetic of the run is.
    in_half: ClassVar[bool]

    @abstractmethod
    def shape(self, udon: UdonModel) -> tuple[int, ...]:
        """Shape of those of one image."""

    @abstractmethod
    def frozen_names(self, backbone: nn.Module) -> list[str]:
        """Names of the weights of a backbone that they go by."""

    @abstractmethod
    def settings(self, udon: UdonModel) -> dict[str, Any]:
        """What they go by besides weights, architecture, preprocessing and images, as JSON takes it."""


@dataclass(frozen=True)
class FeatureInputs(CachedInputs):
    """Features of a frozen backbone, of shape `(batch_size, feature_dim)`, unit norm: heads alone are run on them."""

    in_half = False

    def __call__(
        self, udon: UdonModel, inputs: torch.Tensor, domain: str | None = None, interpolate: bool | None = None
    ) -> Embeddings:
        """Embeds a batch by the heads."""
        teacher = None if domain is None else udon.teacher_heads[domain](inputs)
        return Embeddings(udon.student_head(inputs), inputs, teacher)

    def made_of(self, udon: UdonModel, images: torch.Tensor, interpolate: bool | None = None) -> torch.Tensor:
        """Runs the backbone."""
        features: torch.Tensor = udon(images, interpolate_pos_encoding=interpolate).backbone_embeds
        return features

    def freeze(self, udon: UdonModel) -> None:
        """Freezes the backbone."""
        udon.backbone.requires_grad_(False)

    def shape(self, udon: UdonModel) -> tuple[int, ...]:
        """The width of the features."""
        return (udon.feature_dim,)

    def frozen_names(self, backbone: nn.Module) -> list[str]:
        """All of them."""
        return list(backbone.state_dict())

    def settings(self, udon: UdonModel) -> dict[str, Any]:
        """The pooling."""
        return {"pooling": udon.config.pooling}


FEATURES = FeatureInputs()


@dataclass(frozen=True)
class TokenInputs(CachedInputs):
    """Tokens that enter the last layers of a backbone, of shape `(batch_size, num_tokens, hidden_size)`.

    The backbone itself is run, on one blank image, with its list of layers cut: so whatever else it hands to its layers
    (positions, masks) is made as always, and the tokens take the place of the blank image's before the first layer.

    Attributes:
        num_layers: How many of the last layers are run.
        image_size: Side of the images in pixels.
    """

    num_layers: int
    image_size: int

    in_half = True

    def __call__(
        self, udon: UdonModel, inputs: torch.Tensor, domain: str | None = None, interpolate: bool | None = None
    ) -> Embeddings:
        """Embeds a batch by the last layers and the heads."""
        layers, tokens = self._last(udon.backbone), inputs.float()
        blank = tokens.new_zeros(1, 3, self.image_size, self.image_size)
        with _cut(udon.backbone, [_Entry(layers[0], tokens), *layers[1:]]):
            return _run(udon, blank, domain, interpolate)

    def made_of(self, udon: UdonModel, images: torch.Tensor, interpolate: bool | None = None) -> torch.Tensor:
        """Runs the first layers, and one more that hands its inputs out."""
        _, own = _find_layers(udon.backbone)
        entry = _Entry(own[len(own) - self.num_layers])
        with _cut(udon.backbone, [*list(own)[: len(own) - self.num_layers], entry]):
            udon.backbone(images, **udon.interpolation(interpolate))
        assert entry.tokens is not None, "checked when the model was frozen"
        return entry.tokens

    def freeze(self, udon: UdonModel) -> None:
        """Freezes all that is registered before the last layers, and tries whether they can be run by themselves."""
        config = udon.config.backbone_config
        try:
            check_layer_count(config, self.num_layers, _KEY)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        is_stack = _has_layers(udon.backbone)
        frozen = set(self.frozen_names(udon.backbone)) if is_stack else set()
        for name, parameter in udon.backbone.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if not is_stack or not self._works(udon):
            raise ConfigError(
                f"`{_KEY}` must go with a backbone of one list of layers, each fed by the one before it alone. Got "
                f"{config.model_type!r}; leave it out, or train adapters in all of it with `model.lora`."
            )

    def adapted(self, backbone: nn.Module) -> nn.Module:
        """The last layers."""
        return nn.ModuleList(self._last(backbone))

    @torch.no_grad()
    def shape(self, udon: UdonModel) -> tuple[int, ...]:
        """Number and width of the tokens."""
        return tuple(self.made_of(udon, self._probe(udon, 1)).shape[1:])

    def frozen_names(self, backbone: nn.Module) -> list[str]:
        """What is registered before the first layer that is run."""
        path, layers = _find_layers(backbone)
        names = list(backbone.state_dict())
        first = next(
            place for place, name in enumerate(names) if name.startswith(f"{path}.{len(layers) - self.num_layers}.")
        )
        return names[:first]

    def settings(self, udon: UdonModel) -> dict[str, Any]:
        """How many layers are left."""
        return {"tokens_before_last": self.num_layers}

    def _last(self, backbone: nn.Module) -> list[nn.Module]:
        return list(_find_layers(backbone)[1])[-self.num_layers :]

    def _probe(self, udon: UdonModel, number: int) -> torch.Tensor:
        return probe_images(number, self.image_size, next(udon.parameters()).device)

    def _works(self, udon: UdonModel) -> bool:
        """Whether both halves, one after the other, embed as the whole, and no weight that learns is in the first."""
        was_training = udon.training
        udon.eval()
        try:
            # More than one, since tokens enter in the place of one blank image's.
            images = self._probe(udon, 2)
            tokens = self.made_of(udon, images)
            with torch.no_grad():
                whole, halves = udon(images).backbone_embeds, self(udon, tokens).backbone
        except Exception:  # Of what does not fit, backbones raise nearly every type there is.
            return False
        finally:
            udon.train(was_training)
        return not tokens.requires_grad and torch.allclose(whole, halves, rtol=0, atol=_TOLERANCE)


def inputs_of(config: TrainConfig) -> Inputs:
    """The inputs of a run's steps."""
    if config.train.heads_only:
        return FEATURES
    if config.train.trained_layers is not None:
        return TokenInputs(config.train.trained_layers, config.data.image_size)
    return Inputs()


class Student(nn.Module):
    """Student embeddings of inputs of some kind, as a module whose weights can be exchanged for a call.

    Args:
        udon: The model.
        inputs: What comes in.
        interpolate: As in `UdonModel.forward`.
    """

    def __init__(self, udon: UdonModel, inputs: Inputs, interpolate: bool | None = None) -> None:
        super().__init__()
        self.udon = udon
        self._inputs = inputs
        self._interpolate = interpolate

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeds a batch: shape `(batch_size, embedding_dim)`, unit norm."""
        return self._inputs(self.udon, inputs, None, self._interpolate).student


class _Entry(nn.Module):
    """Stands for a layer: notes the tokens that enter it, or lets others take their place.

    Args:
        layer: The layer.
        tokens: What enters it in the place of what comes; `None` to note that.
    """

    def __init__(self, layer: nn.Module, tokens: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.tokens = tokens

    def forward(self, hidden_states: torch.Tensor, *others: Any, **options: Any) -> Any:
        # Given as an argument and not by a hook, so that gradient checkpointing finds it in its second pass.
        if self.tokens is None:
            self.tokens = hidden_states
        return self.layer(self.tokens, *others, **options)


def _run(udon: UdonModel, inputs: torch.Tensor, domain: str | None, interpolate: bool | None) -> Embeddings:
    output = udon(inputs, domain=domain, interpolate_pos_encoding=interpolate)
    return Embeddings(output.image_embeds, output.backbone_embeds, output.teacher_embeds)


@contextmanager
def _cut(backbone: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Gives a backbone other layers for a while."""
    path, own = _find_layers(backbone)
    parent, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(parent), name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(backbone.get_submodule(parent), name, own)


def _has_layers(backbone: nn.Module) -> bool:
    return any(_are_layers(module, backbone) for module in backbone.modules())


def _find_layers(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the list of a backbone's layers, with its name."""
    return next(
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and _are_layers(module, backbone)
    )


def _are_layers(module: nn.Module, backbone: nn.Module) -> bool:
    number: Any = getattr(backbone.config, "num_hidden_layers", None)
    return isinstance(module, nn.ModuleList) and len(module) == number
