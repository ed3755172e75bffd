"""Vision encoders other than UDON's own: opened from transformers or timm, pooled to one feature per image."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from modeling_udon.configuration_udon import BACKBONES, UdonConfig, backbone_facts
from modeling_udon.modeling_udon import pool_features, vision_tower

TIMM_PREFIX = "timm:"
# Side of the thumbnails that are the raw-pixel baseline.
RAW_PIXELS_SIZE = 16

Pooling = Literal["cls", "mean", "cls+mean", "pooler"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

_COMMIT = re.compile(r"[0-9a-f]{40}")


class ImageFeatures(nn.Module):
    """A vision encoder with a pooling: normalised images to one feature each, not of unit norm.

    Args:
        backbone: A vision encoder of transformers, or a model of transformers that takes images alone.
        pooling: As `UdonConfig` has it. `None` takes `image_embeds` where the model gives them, else the feature that
            it was trained to give.
        image_size: Side in pixels of its images, for position embeddings that are interpolated on request.
    """

    def __init__(self, backbone: PreTrainedModel, pooling: Pooling | None, image_size: int | None = None) -> None:
        super().__init__()
        config = UdonConfig(backbone_config=backbone.config, pooling=pooling)
        self.backbone = backbone
        self.pooling = config.pooling
        self._config = config
        self._gives_embeds = pooling is None
        facts, own = backbone_facts(backbone.config), getattr(backbone.config, "image_size", None)
        other = image_size is not None and own is not None and own not in (image_size, [image_size] * 2)
        self._options = {"interpolate_pos_encoding": True} if other and facts.sizes == "request" else {}
        if "cls" in config.pooling and backbone.config.model_type in BACKBONES and not facts.prefix:
            raise ValueError(
                f"`pooling` must be one that the model has. Got {config.pooling} for {backbone.config.model_type!r}, "
                "which has no class token; use mean or pooler."
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 3, height, width)` -> `(batch_size, dim)`.

        Raises:
            ValueError: If the model's output does not have what the pooling reads.
        """
        outputs = self.backbone(pixel_values=pixel_values, **self._options)
        if self._gives_embeds and "image_embeds" in outputs:
            return outputs["image_embeds"]
        return pool_features(self.backbone, outputs, self._config)


class TimmFeatures(nn.Module):
    """A model of timm with a pooling: normalised images to one feature each, not of unit norm.

    Args:
        model: The model, without its classifier.
        pooling: As in `ImageFeatures`; `None` is `"pooler"`, the model's own pooling.
    """

    def __init__(self, model: nn.Module, pooling: Pooling | None) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 3, height, width)` -> `(batch_size, dim)`."""
        model: Any = self.model
        hidden = model.forward_features(pixel_values)
        if self.pooling in (None, "pooler"):
            return model.forward_head(hidden, pre_logits=True)
        if hidden.ndim == 4 and hidden.shape[-1] == model.num_features:
            hidden = hidden.permute(0, 3, 1, 2)  # (B, H, W, D), as Swin has it -> (B, D, H, W)
        return pool_hidden(hidden, self.pooling)


class RawPixels(nn.Module):
    """The raw-pixel baseline: 16 x 16 thumbnails as their grey and RGB values."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Values 0 to 255 of shape `(B, 3, 16, 16)` -> `(B, 1024)`."""
        colours = pixel_values.permute(0, 2, 3, 1)
        # The luma of ITU-R BT.601, which is Pillow's mode "L".
        grey = colours @ torch.tensor([0.299, 0.587, 0.114], device=colours.device)
        return torch.cat([grey.flatten(1), colours.flatten(1)], dim=1)  # (B, 256 + 768)


def shrink_to_thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrinks a whole image to 16 x 16, ignoring the aspect ratio: `(height, width, 3) -> (16, 16, 3)`, uint8.

    Bilinear with antialiasing, by Pillow.
    """
    small = Image.fromarray(image).resize((RAW_PIXELS_SIZE, RAW_PIXELS_SIZE), Image.Resampling.BILINEAR)
    return np.array(small)


def pool_hidden(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    """Tokens of shape `(B, N, D)` or feature maps of shape `(B, D, H, W)` to `(B, D)`.

    Raises:
        ValueError: If `"cls"` is asked for of a map, or `hidden` is neither.
    """
    if hidden.ndim == 4 and pooling == "mean":
        return hidden.mean(dim=(2, 3))
    if hidden.ndim != 3:
        raise ValueError(
            f"`pooling` must fit the model's output. Got {pooling} for a last hidden state of "
            f"{hidden.ndim} dimensions; use mean or pooler."
        )
    return hidden[:, 0] if pooling == "cls" else hidden.mean(dim=1)


def open_backbone(name: str, config: PretrainedConfig, pooling: Pooling | None, **source: Any) -> PreTrainedModel:
    """Opens a model of transformers in float32: the tower that sees, where it takes texts too.

    Args:
        name: A folder or Hub id.
        config: Its configuration.
        pooling: What will be read of its output; weights that nothing reads may be missing.
        source: `revision` and `trust_remote_code`.

    Raises:
        ValueError: If weights are missing.
    """
    model, found = AutoModel.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True, **source
    )
    check_missing(name, found["missing_keys"], pooling)
    return vision_tower(model)


def check_missing(name: str, missing: Any, pooling: str | None) -> None:
    """Refuses a model with weights that are not in its file, since transformers fills them with random numbers.

    Raises:
        ValueError: If one is missing that the pooling reads.
    """
    unread = pooling in ("cls", "mean")
    wanted = sorted(key for key in missing if not (unread and re.search(r"(^|\.)(pooler|head)\.", key)))
    if wanted:
        way_out = (
            "name --pooling cls or mean, which do not read it"
            if all("pooler" in key for key in wanted)
            else "take the model that these weights were saved from"
        )
        raise ValueError(
            f"`model` must have all its weights. Got {name!r} without {len(wanted)} of them, such as {wanted[0]}; "
            f"{way_out}."
        )


def open_timm(name: str) -> tuple[nn.Module, dict[str, Any], ModuleType]:
    """Opens a model of timm without its classifier.

    Args:
        name: `timm:NAME`.

    Returns:
        The model, its data configuration (`input_size`, `mean`, `std`), and the library.

    Raises:
        ValueError: If timm knows no such model.
        ImportError: If timm is missing.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"--model {TIMM_PREFIX}NAME needs timm, which is missing: pip install timm") from error
    try:
        model = timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=True, num_classes=0).eval()
    except RuntimeError as error:
        raise ValueError(f"`model` must name a model of timm after {TIMM_PREFIX}. Got {name!r}: {error}") from None
    return model, timm.data.resolve_model_data_config(model), timm


def open_processor(name: str, **source: Any) -> BaseImageProcessor:
    """Opens a model's image processor.

    Raises:
        ValueError: If it has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise ValueError(
            "`model` must have a preprocessor_config.json, which says how images are prepared. "
            f"Got {name!r}: {one_line(error)}"
        ) from None


def find_processor(name: str, revision: str | None, trust_remote_code: bool) -> BaseImageProcessor | None:
    """Returns a model's image processor, `None` for a model without one."""
    path = cached_file(
        name,
        "preprocessor_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    return open_processor(name, revision=revision, trust_remote_code=trust_remote_code)


def check_remote_code(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuses to run code of the Hub that may change between reading and running it.

    Args:
        model: A folder, or an id on the Hub.
        revision: The revision that is asked for.
        trust_remote_code: Whether its code may run.

    Raises:
        ValueError: If the code of a model on the Hub may run and `revision` is no commit.
    """
    if trust_remote_code and not Path(model).is_dir() and not _COMMIT.fullmatch(revision or ""):
        raise ValueError(
            f"`revision` must be a commit, 40 digits, where code of {model} may run: a branch or tag can be moved. Got "
            f"{revision!r}; read the code and name its commit."
        )


def one_line(error: Exception) -> str:
    """Returns an error's message on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]
