"""A published student, opened to be written in another form, and images by which the forms are compared."""

import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.auto_classes import UdonModel
from modeling_udon.encoder import Encoder

_PROBE_SIZES = ((48, 64), (200, 150), (301, 97), (64, 64), (33, 240), (120, 90))


def open_student(model: str, revision: str | None = None) -> Encoder:
    """Opens a student.

    Args:
        model: Folder of a student, folder of a run, whose best student counts, or id on the Hub.
        revision: Commit, tag or branch on the Hub.

    Raises:
        ValueError: If it does not open or is no UDON model.
    """
    encoder = Encoder.open(model, revision=revision)
    if not isinstance(encoder.network, UdonModel):
        raise ValueError(f"`model` must be a UDON student. Got {model!r}, a model of another kind.")
    return encoder


def student_network(student: Encoder) -> UdonModel:
    """Returns the model of an encoder that `open_student` gave."""
    assert isinstance(student.network, UdonModel), "checked when it was opened"
    return student.network


def student_processor(student: Encoder) -> BaseImageProcessor:
    """Returns the image processor of an encoder that `open_student` gave."""
    assert student.processor is not None, "a student in a folder has one"
    return student.processor


def processed(student: Encoder, images: list[Image.Image]) -> torch.Tensor:
    """Returns what the student's image processor makes of images, of shape `(len(images), 3, height, width)`."""
    return student_processor(student)(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def embed_as_published(student: Encoder, images: list[Image.Image]) -> np.ndarray:
    """Embeds images as a user of transformers does: `(len(images), embedding_dim)`."""
    return student_network(student)(processed(student, images)).image_embeds.numpy()


def probe_images() -> list[Image.Image]:
    """Images of several sizes, smooth noise, the same each time."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BILINEAR)
        for size in _PROBE_SIZES
    ]


def require(module: str, extra: str) -> Any:
    """Imports a module that an extra brings.

    Raises:
        ImportError: If its package is missing; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f'this needs {package}, which is missing: pip install "modeling-udon[{extra}]"') from error
