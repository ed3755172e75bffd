"""What makes features of pixels: the frozen part of a backbone, or any encoder, with all that decides their values."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.encoder import Encoder
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.inputs import FEATURES, CachedInputs


@dataclass(frozen=True)
class FeatureSource:
    """What makes features of pixels.

    Attributes:
        network: The network, which is in evaluation mode while it makes them.
        embed: Turns pixels of shape `(batch_size, height, width, 3)`, uint8, into features `(batch_size, *shape)`.
        shape: Shape of those of one image.
        settings: What decides the features besides images and transforms, as JSON takes it.
        in_half: Whether they are kept in half precision where they are computed in it.
    """

    network: nn.Module
    embed: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    settings: Mapping[str, Any]
    in_half: bool = False

    def dtype(self, precision: str) -> type[np.floating]:
        """Kind of numbers that they are kept in; float16 for bf16 too, which has three bits less."""
        return np.float16 if self.in_half and precision != "no" else np.float32


def backbone_source(
    model: UdonModel,
    statistics: ChannelStatistics,
    inputs: CachedInputs = FEATURES,
    interpolate: bool | None = None,
) -> FeatureSource:
    """The frozen part of a backbone.

    Args:
        model: The model.
        statistics: Channel statistics that its images are normalised by.
        inputs: What the frozen part makes of them.
        interpolate: As in `UdonModel.forward`; it follows from the images' size, which is part of a file's name.
    """
    digest = hashlib.sha256()
    weights = model.backbone.state_dict()
    for name in sorted(inputs.frozen_names(model.backbone)):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    settings = {
        "backbone": digest.hexdigest(),
        "backbone_config": model.config.backbone_config.to_dict(),
        "channels": [statistics.mean, statistics.std],
        **inputs.settings(model),
    }

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return inputs.made_of(model, statistics.normalize(pixels), interpolate)

    return FeatureSource(model, embed, inputs.shape(model), settings, inputs.in_half)


def encoder_source(encoder: Encoder) -> FeatureSource:
    """Any encoder, with its own preprocessing."""
    return FeatureSource(encoder.network, encoder, (encoder.dim,), {"encoder": encoder.fingerprint})
