"""The student as modules of sentence-transformers: exact, bias included, and without code of its own."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.faults import require
from modeling_udon.hub.student_folder import (
    MODULES_FILE,
    TRANSFORMER_FILE,
    TRANSFORMER_TYPE,
    WEIGHTS_FILE,
    save_model,
    transformer_settings,
)
from modeling_udon.modeling_udon import UdonModel, num_prefix_tokens
from modeling_udon.storage import write_json

_BASE = "sentence_transformers.base.modules"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_NORMALIZE = f"{_BASE}.normalize.Normalize"
_DENSE = f"{_BASE}.dense.Dense"


def write_modules(model: UdonModel, processor: BaseImageProcessor, folder: Path) -> None:
    """Writes `Transformer -> [Pooling] -> Normalize -> Dense -> Normalize`: backbone, class token, head.

    Raises:
        ValueError: If the head has hidden layers, or no module of sentence-transformers pools as the student does.
    """
    _check_pooling(model, processor.to_dict()["crop_size"]["height"])
    if model.config.head_hidden_dims:
        raise ValueError(
            "--format sentence-transformers must have a linear head: its Dense takes activations of torch that have "
            f"no arguments, and the tanh-GELU of a head with hidden layers {model.config.head_hidden_dims} is none. "
            "The student's own folder opens in sentence-transformers with trust_remote_code=True."
        )
    projection = model.student_head.projection
    pooled = model.config.pooling == "pooler"
    settings = transformer_settings(
        *(("pooler_output", "sentence_embedding") if pooled else ("last_hidden_state", "token_embeddings"))
    )
    save_model(model.backbone, folder)
    processor.save_pretrained(folder)
    write_json(folder / TRANSFORMER_FILE, settings | _without_pooler(model.backbone))
    modules: list[tuple[str, dict[str, Any]]] = []
    if not pooled:
        modules.append(
            (
                _POOLING,
                {
                    "embedding_dimension": projection.in_features,
                    "pooling_mode": model.config.pooling,
                    "include_prompt": True,
                },
            )
        )
    modules += [(_NORMALIZE, {}), (_DENSE, _dense_settings(projection)), (_NORMALIZE, {})]
    listed = [{"idx": 0, "name": "0", "path": "", "type": TRANSFORMER_TYPE}]
    for number, (kind, values) in enumerate(modules, start=1):
        path = f"{number}_{kind.rpartition('.')[2]}"
        (folder / path).mkdir()
        write_json(folder / path / "config.json", values)
        if kind == _DENSE:
            state = {f"linear.{name}": value.contiguous() for name, value in projection.state_dict().items()}
            save_file(state, folder / path / WEIGHTS_FILE, metadata={"format": "pt"})
        listed.append({"idx": number, "name": str(number), "path": path, "type": kind})
    write_json(folder / MODULES_FILE, listed)


def embed_with_modules(folder: Path, images: list[Image.Image]) -> np.ndarray:
    """Embeds images as a user of sentence-transformers does.

    Raises:
        ImportError: If sentence-transformers is missing.
    """
    library = require("sentence_transformers", "export")
    return library.SentenceTransformer(str(folder), device="cpu").encode(images, show_progress_bar=False)


@torch.no_grad()
def _check_pooling(model: UdonModel, image_size: int) -> None:
    """Refuses a student whose features no module of sentence-transformers gives.

    Raises:
        ValueError: If it does.
    """
    config, reason = model.config, ""
    outputs = model.backbone(torch.zeros(1, 3, image_size, image_size), **model.interpolation())
    read = outputs.pooler_output if config.pooling == "pooler" else outputs.last_hidden_state
    if config.interpolate_pos_encoding:
        reason = "the backbone has to be told to interpolate its position embeddings"
    elif config.pooling == "cls+mean":
        reason = "Pooling normalises neither class token nor mean before they are put side by side"
    elif config.pooling == "mean" and num_prefix_tokens(model.backbone):
        reason = "Pooling takes the class token into the mean"
    elif config.token_norm is not None:
        reason = "Pooling takes the tokens before their final norm"
    elif read.ndim != (2 if config.pooling == "pooler" else 3):
        reason = "Pooling takes tokens, and this backbone gives a map of features"
    if reason:
        raise ValueError(
            f"--format sentence-transformers must pool as the student does. Got pooling {config.pooling!r} of "
            f"{config.backbone_config.model_type!r}, where {reason}. The student's own folder opens in "
            "sentence-transformers with trust_remote_code=True."
        )


def _dense_settings(projection: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": projection.in_features,
        "out_features": projection.out_features,
        "bias": projection.bias is not None,
        "activation_function": f"{torch.nn.Identity.__module__}.Identity",
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }


def _without_pooler(backbone: nn.Module) -> dict[str, Any]:
    # Else a ViT would be given a pooler of random weights, with a warning.
    takes_choice = "add_pooling_layer" in inspect.signature(type(backbone).__init__).parameters
    if takes_choice and getattr(backbone, "pooler", None) is None:
        return {"model_kwargs": {"add_pooling_layer": False}}
    return {}
