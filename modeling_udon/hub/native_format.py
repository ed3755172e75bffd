"""The student as a plain vision model of transformers, where that is the same up to the last normalisation.

The head sees features of unit norm. Without a bias their length drops out of the direction of its output, so the
projection of a CLIP tower, or the pooler of a ViT, can stand for it; with a bias it cannot.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel, ViTConfig, ViTModel

from modeling_udon.encoder import Encoder
from modeling_udon.hub.student import processed, student_network, student_processor
from modeling_udon.modeling_udon import UdonModel

# The backbones that have a place for the head, and the pooling with which it takes the same token.
_POOLINGS = {"vit": "cls", "clip_vision_model": "pooler"}


def write_native(student: Encoder, folder: Path) -> None:
    """Writes a `CLIPVisionModelWithProjection`, or a `ViTModel` whose pooler is the head.

    Raises:
        ValueError: If no such model is exact.
    """
    _check_exact(student_network(student))
    backbone, head = student_network(student).backbone, student_network(student).student_head.projection
    state, values = backbone.state_dict(), backbone.config.to_dict()
    model: PreTrainedModel
    if backbone.config.model_type == "vit":
        model = ViTModel(
            ViTConfig.from_dict(values | {"pooler_output_size": head.out_features, "pooler_act": "linear"})
        )
        state |= {"pooler.dense.weight": head.weight, "pooler.dense.bias": torch.zeros(head.out_features)}
    else:
        model = CLIPVisionModelWithProjection(
            CLIPVisionConfig.from_dict(values | {"projection_dim": head.out_features})
        )
        # In transformers 4 the tower's names begin so by themselves.
        state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in state.items()}
        state["visual_projection.weight"] = head.weight
    model.load_state_dict(state)
    model.save_pretrained(folder)
    student_processor(student).save_pretrained(folder)


@torch.no_grad()
def embed_natively(student: Encoder, folder: Path, images: list[Image.Image]) -> np.ndarray:
    """Embeds images as a user of the plain model does, with the normalisation that it lacks."""
    pixels = processed(student, images)
    if student_network(student).backbone.config.model_type == "vit":
        embeds = ViTModel.from_pretrained(folder).eval()(pixels).pooler_output
    else:
        embeds = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(pixels).image_embeds
    return F.normalize(embeds, dim=-1).numpy()


def _check_exact(model: UdonModel) -> None:
    config, head = model.config, model.student_head
    kind = config.backbone_config.model_type
    if _POOLINGS.get(kind) != config.pooling:
        known = " or ".join(f"{name} with pooling {pooling}" for name, pooling in _POOLINGS.items())
        raise ValueError(
            f"--format native must have a backbone with a place for the head: {known}. "
            f"Got {kind} with pooling {config.pooling}; use sentence-transformers or onnx."
        )
    if config.head_hidden_dims:
        raise ValueError(
            f"--format native must have a linear head. Got one with hidden layers {config.head_hidden_dims}; use onnx."
        )
    if head.projection.bias is not None and head.projection.bias.any():
        raise ValueError(
            "--format native must have a head without bias: the head sees features of unit norm, which a plain model "
            f"does not make, and beside a bias their length counts. Got a bias of up to "
            f"{head.projection.bias.abs().max():.2g}; use sentence-transformers or onnx, which are exact."
        )
