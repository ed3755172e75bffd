"""Vision encoders other than UDON's own: opened from transformers or timm, pooled to one feature per image."""

import copy
import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from modeling_udon.configuration_udon import TOWER_OPTIONS, UdonConfig, backbone_facts, check_gives_features
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.data.processor_statistics import processor_values
from modeling_udon.modeling_udon import num_prefix_tokens, pool_features, tower_class, vision_tower
from modeling_udon.storage import read_json

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
        # A copy, since transformers 4 hands a config's choice of attention, here none, down to the configs inside it.
        config = UdonConfig(backbone_config=copy.deepcopy(backbone.config), pooling=pooling)
        self.backbone = backbone
        self.pooling = config.pooling
        self._config = config
        self._gives_embeds = pooling is None
        facts, own = backbone_facts(backbone.config), getattr(backbone.config, "image_size", None)
        other = image_size is not None and own is not None and own not in (image_size, [image_size] * 2)
        self._options = {"interpolate_pos_encoding": True} if other and facts.sizes == "request" else {}
        if "cls" in config.pooling and not num_prefix_tokens(backbone):
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


def open_backbone(name: str, config: PretrainedConfig, pooling: Pooling | None, **source: Any) -> PreTrainedModel:
    """Opens a model of transformers in float32: the tower that sees, where it takes texts too.

    Args:
        name: A folder or Hub id.
        config: Its configuration.
        pooling: What will be read of its output; weights that nothing reads may be missing.
        source: `revision`, `trust_remote_code` and `attn_implementation`.

    Raises:
        ValueError: If weights are missing, or it gives no features of images.
    """
    check_gives_features(getattr(config, "vision_config", config).model_type)
    options = TOWER_OPTIONS.get(config.model_type, {})
    model, missing = load_model(tower_class(config), name, config=config, **options, **source)
    if config.model_type == "data2vec-vision":
        # Its checkpoints from pretraining have no final norm; one that only normalises is not random.
        missing = [key for key in missing if "pooler.layernorm" not in key]
    check_missing(name, missing, pooling)
    weights = model.state_dict()
    for key in (key for key in missing if key in weights):
        # Nothing reads them, but random ones would give the same model another fingerprint each time.
        weights[key].zero_()
    return vision_tower(model)


def load_model(kind: Any, name: str, **options: Any) -> tuple[Any, Any]:
    """Opens a model in float32; returns it and the names of the weights that its files lack.

    transformers would tell what does not fit in a table of many lines, and then refer to that table.

    Args:
        kind: Its class.
        name: A folder or Hub id.
        options: As `from_pretrained` takes them.

    Raises:
        ValueError: If a weight has another shape than the configuration says.
    """
    with _silent_transformers():
        model, found = kind.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # transformers 5 gives names with both shapes, 4 names alone.
    wrong = sorted(entry if isinstance(entry, str) else entry[0] for entry in found["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"`model` must have weights of the shapes that its config.json says. Got {name!r} with {len(wrong)} of "
            f"others, such as {wrong[0]}; take the config.json that these weights were saved with."
        )
    return model, found["missing_keys"]


def cut_layers(config: PretrainedConfig, keep_layers: int | None) -> PretrainedConfig:
    """Returns the configuration of a backbone with its first layers alone; its weights then load without the others.

    Args:
        config: A vision encoder's, that of a model of images and texts, or a UDON student's.
        keep_layers: Number of layers; `None`: all.

    Raises:
        ValueError: If it has fewer, or counts its layers otherwise.
    """
    if keep_layers is None:
        return config
    name = next((name for name in ("backbone_config", "vision_config") if hasattr(config, name)), None)
    if name is not None:
        setattr(config, name, cut_layers(getattr(config, name), keep_layers))
        return config
    check_layer_count(config, keep_layers, "model.keep_layers")
    values = config.to_dict()
    # Names of stages go by the number of layers.
    for derived in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "layer_types"):
        values.pop(derived, None)
    return type(config).from_dict(values | {"num_hidden_layers": keep_layers})


def check_layer_count(config: PretrainedConfig, wanted: int, key: str) -> None:
    """Refuses a number of layers that a backbone does not have.

    Args:
        config: A vision encoder's.
        wanted: The number.
        key: The user's argument that gave it.

    Raises:
        ValueError: If it has fewer, or counts its layers otherwise.
    """
    own = getattr(config, "num_hidden_layers", None)
    if not isinstance(own, int) or not 0 < wanted <= own or getattr(config, "depths", None) is not None:
        what = f"{own} layers" if isinstance(own, int) and not hasattr(config, "depths") else "stages of layers"
        raise ValueError(
            f"`{key}` must be from 1 to the backbone's number of layers. Got {wanted} for "
            f"{config.model_type!r}, which has {what}; name a number that it has, or leave it out."
        )


@contextmanager
def _silent_transformers() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def check_missing(name: str, missing: Any, pooling: str | None) -> None:
    """Refuses a model with weights that are not in its file, since transformers fills them with random numbers.

    Raises:
        ValueError: If one is missing that the pooling reads.
    """
    unread = pooling in ("cls", "mean", "cls+mean")
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


def open_timm(name: str, image_size: int | None = None) -> PreTrainedModel:
    """Opens a model of timm, without its classifier, as transformers wraps it.

    Args:
        name: `timm:NAME`.
        image_size: Side of the images in pixels, where it is not the model's own; position embeddings are resampled.

    Raises:
        ValueError: If timm knows no such model, or has no weights for it.
        ImportError: If timm is missing.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"--model {TIMM_PREFIX}NAME needs timm, which is missing: pip install timm") from error
    source = name.removeprefix(TIMM_PREFIX)
    try:
        model = timm.create_model(source, pretrained=True, num_classes=0)
        data, size = timm.data.resolve_model_data_config(model), {}
        embeds_patches = getattr(getattr(model, "patch_embed", None), "img_size", None) is not None
        if embeds_patches and image_size not in (None, data["input_size"][-1]):
            size = {"img_size": image_size}
            model = timm.create_model(source, pretrained=True, num_classes=0, **size)
    except Exception as error:  # Without a network or weights, timm raises whatever its downloader does.
        raise ValueError(
            f"`model` must name a model of timm with weights after {TIMM_PREFIX}. Got {name!r}: {one_line(error)}"
        ) from None
    known = {key: list(data[key]) for key in ("input_size", "mean", "std")}
    if size:
        known["input_size"] = [3, image_size, image_size]
    architecture = model.pretrained_cfg.get("architecture") or source.partition(".")[0]
    values: dict[str, Any] = {"pretrained_cfg": known, "num_labels": 0}
    config = TimmWrapperConfig(architecture=architecture, model_args=size or None, **values)
    wrapper = TimmWrapperModel(config)
    wrapper.timm_model.load_state_dict(model.state_dict())
    return wrapper.eval()


def own_statistics(config: PretrainedConfig) -> ChannelStatistics | None:
    """Returns the channel statistics that a configuration holds, as those of timm do; `None` if it holds none."""
    known = getattr(config, "pretrained_cfg", None) or {}
    return ChannelStatistics(tuple(known["mean"]), tuple(known["std"])) if "mean" in known else None


def open_processor(name: str, **source: Any) -> BaseImageProcessor:
    """Opens a model's image processor.

    Raises:
        ValueError: If it has none.
    """
    try:
        with _silent_transformers():  # 4 tells of its own plans for fast processors
            return AutoImageProcessor.from_pretrained(name, **source)
    except Exception as error:  # Of a damaged file transformers raises nearly every type there is.
        raise ValueError(
            "`model` must have a preprocessor_config.json, which says how images are prepared. "
            f"Got {name!r}: {one_line(error)}"
        ) from None


def find_processing(name: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any] | None:
    """Returns the values of a model's image processor, `None` for a model without one.

    They are read from its file: some processors open only where torchvision is installed.
    """
    for file, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        values = {} if path is None else read_json(Path(path))
        values = values if section is None else values.get(section, {})
        if values and "image_mean" not in values:
            # What the file leaves out is the class's to say.
            processor = open_processor(name, revision=revision, trust_remote_code=trust_remote_code)
            values = processor_values(processor)
        if values:
            return values
    return None


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
